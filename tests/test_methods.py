"""methods.py: what an adapter promises before, while and after it learns, and that PEFT computes the same from the same file."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from litlora.config import Config
from litlora.errors import UserError
from litlora.families import config_to_hf, linear_shapes
from litlora.methods import (
    METHODS,
    Method,
    adapter_state,
    add_adapter,
    attach,
    attach_from,
    linears,
    load_adapter_state,
    remove_adapters,
    trainable,
)
from litlora.model import GPT, IGNORE, Composed
from litlora.options import LoRAOptions
from litlora.peft import AdapterConfig, adapter_config, adapter_config_from_peft, adapter_config_to_peft, expected_adapter_tensors

ALL = ["all-linear", "lm_head"]


def tiny(**changes: Any) -> Config:
    """Unfriendly: K < H, H * D is not C, biases, nothing a power of two."""
    sizes: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": 53,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "attention_bias": True,
    }
    return Config(**{**sizes, **changes})


def base(seed: int = 0, **changes: Any) -> GPT:
    """Every tensor random, gains and biases too."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(tiny(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def learnt(model: GPT, seed: int = 5) -> GPT:
    """As after training: every parameter of the adapters moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tokens(rows: int = 2, length: int = 17) -> Tensor:
    return torch.randint(0, 53, (rows, length), generator=torch.Generator().manual_seed(9))  # (B, T)


def logits(model: GPT) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens())


def snapshot(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


OPTIONS = {
    "plain": LoRAOptions(r=3, alpha=7.0),
    "rslora-all-and-head": LoRAOptions(r=5, alpha=3.0, use_rslora=True, target_modules=ALL),
    "attention": LoRAOptions(r=2, target_modules=["q_proj", "v_proj"]),
    "one-layer": LoRAOptions(r=2, target_modules=["layers.1.mlp.up_proj"]),
    "dora": LoRAOptions(r=3, use_dora=True, target_modules=ALL),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


# ---- promises of every method ----------------------------------------------------------------------------------------


@each_method
@each_options
def test_a_fresh_adapter_changes_nothing(method: Method, options: LoRAOptions) -> None:
    """Must catch: a B that is not zero, a magnitude of 1. (DoRA subtracts and adds a bias again, which may round.)"""
    model = base()
    before = logits(model)
    method.attach(model, options, seed=1)
    after = logits(model)
    assert torch.allclose(before, after, rtol=0, atol=1e-5) if options.use_dora else torch.equal(before, after)


@each_method
def test_a_fresh_dora_without_biases_changes_not_a_bit(method: Method) -> None:
    model = base(model_type="llama", attention_bias=False)
    before = logits(model)
    method.attach(model, OPTIONS["dora"], seed=1)
    assert torch.equal(before, logits(model))


@each_method
@each_options
def test_attaching_renames_and_moves_nothing(method: Method, options: LoRAOptions) -> None:
    model = base()
    before, parameters = snapshot(model), dict(model.named_parameters())
    names = method.attach(model, options, seed=1)
    after = dict(model.named_parameters())
    assert {name: after[name] for name in parameters} == parameters  # the very same Parameters
    assert same({name: snapshot(model)[name] for name in before}, before)
    assert set(after) - set(parameters) == {name for name in after if any(name.startswith(f"{host}.adapter.") for host in names)}


@each_method
@each_options
def test_what_learns_is_what_is_saved(method: Method, options: LoRAOptions) -> None:
    """A03. Must catch: a base left unfrozen, a parameter that the file does not hold."""
    model = base()
    names = method.attach(model, options, seed=1)
    learning, saved = trainable(model), adapter_state(model)
    assert [parameter.data_ptr() for parameter in learning.values()] == [tensor.data_ptr() for tensor in saved.values()]
    assert {name.partition(".adapter.")[0] for name in learning} == set(names)
    config = adapter_config(options, list(linears(model)))
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected_adapter_tensors(config, linear_shapes(model.config))


@each_method
@each_options
def test_everything_declared_trainable_gets_a_gradient_and_nothing_else_does(method: Method, options: LoRAOptions) -> None:
    model = base()
    method.attach(model, options, seed=1)
    learnt(model)  # away from B = 0, where A has no gradient yet
    model(tokens(), tokens().roll(-1, 1)).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert with_gradient == set(trainable(model))


@each_method
@each_options
def test_saved_and_loaded_is_the_same(method: Method, options: LoRAOptions) -> None:
    model = base()
    method.attach(model, options, seed=1)
    learnt(model)
    again = base()
    attach_from(again, adapter_config(options, list(linears(again))), seed=2)
    load_adapter_state(again, adapter_state(model), "adapter")
    assert same(snapshot(again), snapshot(model))
    assert torch.equal(logits(again), logits(model))
    assert set(trainable(again)) == set(trainable(model))


# ---- initialisation --------------------------------------------------------------------------------------------------


def test_the_seed_decides_and_torchs_own_random_state_does_not() -> None:
    models = [base(), base(), base()]
    for noise, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        attach(model, LoRAOptions(r=3), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (adapter_state(model) for model in models)
    assert same(first, again)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_another_target_does_not_change_the_numbers_of_the_first() -> None:
    """Must catch: one generator for all modules."""
    few, many = base(), base()
    attach(few, LoRAOptions(r=3, target_modules=["v_proj"]), seed=1)
    attach(many, LoRAOptions(r=3, target_modules=ALL), seed=1)
    few_state, many_state = adapter_state(few), adapter_state(many)
    assert same(few_state, {name: many_state[name] for name in few_state})
    assert len({tuple(tensor.flatten()[:4].tolist()) for name, tensor in many_state.items() if "lora_A" in name}) == 15  # no two alike


def test_a_is_uniform_as_in_peft() -> None:
    """Kaiming with a = sqrt 5: a bound of 1 / sqrt(in)."""
    model = base(hidden_size=900, num_attention_heads=6, head_dim=10, intermediate_size=8, num_hidden_layers=1)
    attach(model, LoRAOptions(r=64, target_modules=["q_proj"]), seed=1)
    (a,) = (tensor for name, tensor in adapter_state(model).items() if "lora_A" in name)
    bound = 900**-0.5
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.99 * bound
    assert abs(a.std().item() / (bound / 3**0.5) - 1) < 0.02
    assert abs(a.mean().item()) < 0.02 * bound


@pytest.mark.parametrize(
    ("weights", "adapters"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_adapters_are_kept_in_fp32_whatever_the_weights(weights: torch.dtype, adapters: torch.dtype) -> None:
    model = base().to(weights)
    attach(model, OPTIONS["dora"], seed=1)
    assert {parameter.dtype for parameter in trainable(model).values()} == {adapters}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {weights}
    assert logits(model).dtype == weights


def test_an_adapter_of_a_model_that_is_in_use_does_not_drop_out() -> None:
    model = base().eval()
    attach(model, LoRAOptions(r=3, dropout=0.5), seed=1)
    learnt(model)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(tokens()), model(tokens()))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_lora_on_a_head_that_is_the_embedding_is_refused_with_the_reason() -> None:
    model = base(tie_word_embeddings=True)
    config = AdapterConfig(r=2, alpha=2, target_modules=["q_proj", "lm_head"])
    for attempt in (
        lambda: attach(model, LoRAOptions(target_modules=ALL), seed=1),
        lambda: attach_from(model, config),
        lambda: add_adapter(model, config, {}),
    ):
        with pytest.raises(UserError, match="embedding's own matrix"):
            attempt()
    assert all(host.adapter is None for host in linears(model).values())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_attach_is_refused() -> None:
    model = base()
    attach(model, LoRAOptions(r=2), seed=1)
    before = snapshot(model)
    with pytest.raises(UserError, match="already"):
        attach(model, LoRAOptions(r=2), seed=2)
    assert same(snapshot(model), before)


def test_a_target_that_matches_nothing_leaves_the_model_alone() -> None:
    model = base()
    with pytest.raises(UserError, match="q_prj"):
        attach(model, LoRAOptions(target_modules=["q_proj", "q_prj"]), seed=1)
    assert all(parameter.requires_grad for parameter in model.parameters())


def missing(tensors: dict[str, Tensor], a: str, b: str) -> list[str]:
    del tensors[a], tensors[b]
    return [f"missing: {a} ", f"missing: {b} "]


def extra(tensors: dict[str, Tensor], a: str, b: str) -> list[str]:
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(3, 36)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(53, 36)
    return [
        "unexpected: base_model.model.model.layers.9.mlp.up_proj.lora_A.weight ",
        "unexpected: base_model.model.model.embed_tokens.weight ",
    ]


def wrong_shape(tensors: dict[str, Tensor], a: str, b: str) -> list[str]:
    tensors[a], tensors[b] = tensors[a].t().contiguous(), tensors[b][:-1]
    return [f"wrong shape: {a} ", f"wrong shape: {b} "]


def renamed(tensors: dict[str, Tensor], a: str, b: str) -> list[str]:
    tensors[a.replace("lora_", "lora.")] = tensors.pop(a)
    tensors[b.removeprefix("base_model.model.")] = tensors.pop(b)
    return [
        f"missing: {a} ",
        f"missing: {b} ",
        f"unexpected: {a.replace('lora_', 'lora.')} ",
        f"unexpected: {b.removeprefix('base_model.model.')} ",
    ]


def wrong_rank(tensors: dict[str, Tensor], a: str, b: str) -> list[str]:
    for name, tensor in tensors.items():
        tensors[name] = tensor[:-1] if "lora_A" in name else tensor[:, :-1]
    return [f"wrong shape: {name} " for name in tensors]


@pytest.mark.parametrize("entrance", ["attached", "added"])
@pytest.mark.parametrize("fault", [missing, extra, wrong_shape, renamed, wrong_rank])
def test_every_fault_of_an_adapter_file_is_listed_and_nothing_is_loaded(
    fault: Callable[[dict[str, Tensor], str, str], list[str]], entrance: str
) -> None:
    """A01. Must catch: strict=False, a loop that copies before it has looked at everything."""
    source = base()
    attach(source, LoRAOptions(r=3), seed=1)
    learnt(source)
    tensors = dict(adapter_state(source))
    names = list(tensors)
    listed = fault(tensors, names[2], names[-1])
    model = base()
    config = adapter_config(LoRAOptions(r=3), list(linears(model)))
    if entrance == "attached":
        attach_from(model, config, seed=7)
    before = snapshot(model)
    where = "step/adapter_model.safetensors"
    load: Callable[[], object] = lambda: load_adapter_state(model, tensors, where)  # noqa: E731
    add: Callable[[], object] = lambda: add_adapter(model, config, tensors, where=where)  # noqa: E731
    enter = load if entrance == "attached" else add
    with pytest.raises(UserError) as refused:
        enter()
    report = refused.value.report()
    assert where in report
    assert [fault for fault in listed if fault not in report] == []
    assert same(snapshot(model), before)


def test_whole_numbers_are_no_adapter() -> None:
    model = base()
    attach(model, LoRAOptions(r=3), seed=1)
    tensors = dict(adapter_state(model))
    name = next(iter(tensors))
    with pytest.raises(UserError, match="int8"):
        load_adapter_state(model, tensors | {name: tensors[name].to(torch.int8)}, "adapter")


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def peft_base(model: GPT, directory: Path) -> PreTrainedModel:
    """transformers' model with the weights of ours."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_to_hf(model.config)))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).to(model.lm_head.weight.dtype).eval()
    theirs.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".adapter." not in name})
    return theirs


def trained_by_peft(model: GPT, directory: Path, **config: Any) -> PeftModel:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves a targeted head
        theirs = get_peft_model(peft_base(model, directory / "base"), LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                assert parameter.requires_grad == (".lora_" in name)
        theirs.save_pretrained(directory / "peft")
    return theirs.eval()


def opened(directory: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    file = directory / "adapter_config.json"
    return adapter_config_from_peft(json.loads(file.read_text()), file), load_file(directory / "adapter_model.safetensors")


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 4, "lora_alpha": 9, "target_modules": "all-linear"},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "head": {"r": 3, "lora_alpha": 3, "target_modules": ["gate_proj", "up_proj", "down_proj", "lm_head"]},
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": r".*\.(q_proj|up_proj|o_proj)",
        "rank_pattern": {"layers.1.mlp.up_proj": 2, "q_proj": 7},
        "alpha_pattern": {"o_proj": 3},
    },
    "layers": {"r": 4, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1], "exclude_modules": ["up_proj"]},
}
each_peft_config = pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=list(PEFT_CONFIGS))


@each_peft_config
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_outputs_and_gradients_are_pefts(config: dict[str, Any], kv_heads: int, tmp_path: Path) -> None:
    """N01, in fp64, where rounding hides nothing (transformers' norms stay in fp32). The next test does it in fp32.

    Must catch: alpha / r where rsLoRA is asked, A and B swapped, k and v of GQA mixed up, a pattern's rank with the default's alpha.
    """
    model = base(num_key_value_heads=kv_heads).double()
    theirs = trained_by_peft(model, tmp_path, **config)
    ours_config, tensors = opened(tmp_path / "peft")
    attach_from(model, ours_config)
    load_adapter_state(model, tensors, tmp_path)
    inputs = tokens()
    want = theirs(inputs).logits
    assert (logits(model) - want).abs().max() <= 1e-5
    assert (want - peft_base(model, tmp_path / "base")(inputs).logits).norm() > 0.01 * want.norm()  # the adapter matters

    targets = inputs.roll(-1, 1).masked_fill(torch.arange(17) % 3 == 0, IGNORE)
    torch.nn.functional.cross_entropy(want.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    model(inputs, targets).backward()
    expected = {
        name.removesuffix(".default").replace(".default.", "."): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    grads = {name: parameter.grad for name, parameter in zip(adapter_state(model), trainable(model).values(), strict=True)}
    expected = {name.removesuffix(".weight") if "magnitude" in name else name: grad for name, grad in expected.items()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@each_peft_config
def test_an_adapter_of_peft_goes_through_litlora_and_back(config: dict[str, Any], tmp_path: Path) -> None:
    """N02. Must catch: a key not written that changes the result, a tensor renamed, lora_alpha rounded."""
    model = base()
    trained_by_peft(model, tmp_path, **config)
    ours_config, tensors = opened(tmp_path / "peft")
    attach_from(model, ours_config)
    load_adapter_state(model, tensors, tmp_path)
    written = tmp_path / "litlora"
    written.mkdir()
    save_file(adapter_state(model), written / "adapter_model.safetensors", {"format": "pt"})
    (written / "adapter_config.json").write_text(json.dumps(adapter_config_to_peft(ours_config)))

    back = load_file(written / "adapter_model.safetensors")
    assert same(back, {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name})
    with torch.no_grad():
        ours = PeftModel.from_pretrained(peft_base(model, tmp_path / "base"), written).eval()(tokens()).logits
        theirs = PeftModel.from_pretrained(peft_base(model, tmp_path / "base"), tmp_path / "peft").eval()(tokens()).logits
    assert torch.equal(ours, theirs)
    assert (logits(model) - ours).abs().max() <= 1e-5


@each_options
def test_an_adapter_of_litlora_computes_the_same_in_peft(options: LoRAOptions, tmp_path: Path) -> None:
    """N02, the other way round: what `attach` made, under the config that its options mean."""
    model = base()
    attach(model, options, seed=1)
    learnt(model)
    config = adapter_config_to_peft(adapter_config(options, list(linears(model)), "base"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(adapter_state(model), tmp_path / "adapter_model.safetensors", {"format": "pt"})
    theirs = PeftModel.from_pretrained(peft_base(model, tmp_path / "base"), tmp_path)
    loaded = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert same(loaded, adapter_state(model))
    with torch.no_grad():
        assert (logits(model) - theirs.eval()(tokens()).logits).abs().max() <= 1e-5


def test_a_copy_of_the_base_in_an_adapter_file_must_be_the_base(tmp_path: Path) -> None:
    """PEFT saves the whole head along when the head has LoRA: the same numbers are no fault, others are another base."""
    model = base()
    trained_by_peft(model, tmp_path, **PEFT_CONFIGS["head"])
    config, tensors = opened(tmp_path / "peft")
    (copied,) = (name for name in tensors if ".base_layer." in name)
    tensors[copied][7, 3] += 0.5
    attach_from(model, config)
    with pytest.raises(UserError, match="another base"):
        load_adapter_state(model, tensors, tmp_path)


def test_an_adapter_in_bf16_is_loaded_exactly() -> None:
    model = base().to(torch.bfloat16)
    attach(model, LoRAOptions(r=3), seed=1)
    tensors = {name: torch.randn(tensor.shape).to(torch.bfloat16) for name, tensor in adapter_state(model).items()}
    load_adapter_state(model, tensors, "adapter")
    assert same(adapter_state(model), {name: tensor.float() for name, tensor in tensors.items()})


# ---- composition -----------------------------------------------------------------------------------------------------


def adapter(seed: int, **options: Any) -> tuple[AdapterConfig, dict[str, Tensor]]:
    chosen = LoRAOptions(**{"r": 3, "target_modules": ALL, **options})
    model = base()
    attach(model, chosen, seed=seed)
    learnt(model, seed)
    return adapter_config(chosen, list(linears(model))), adapter_state(model)


def test_one_added_adapter_is_the_attached_one_bit_for_bit_and_does_not_learn() -> None:
    config, tensors = adapter(1)
    attached, added = base(), base()
    attach_from(attached, config)
    load_adapter_state(attached, tensors, "adapter")
    add_adapter(added, config, tensors)
    assert torch.equal(logits(added), logits(attached))
    assert not any(parameter.requires_grad for name, parameter in added.named_parameters() if ".adapter." in name)


def test_added_adapters_add_up_with_their_weights() -> None:
    """Each sees the base's y. Must catch: a chain in which the second sees the first's, a weight used as its square."""
    (a, a_tensors), (b, b_tensors) = adapter(1), adapter(2, r=5, alpha=3.0, target_modules=["q_proj", "down_proj", "lm_head"])
    model, plain = base(), base()
    add_adapter(model, a, a_tensors, 0.75)
    add_adapter(model, b, b_tensors, -0.5)
    with torch.no_grad():
        for name, host in linears(plain).items():
            for config, tensors, weight in ((a, a_tensors, 0.75), (b, b_tensors, -0.5)):
                if (up := tensors.get(f"base_model.model.{name}.lora_B.weight")) is not None:
                    host.weight += weight * config.alpha / config.r * up @ tensors[f"base_model.model.{name}.lora_A.weight"]
    assert (logits(model) - logits(plain)).abs().max() <= 1e-4
    assert isinstance(model.lm_head.adapter, Composed)


def test_an_adapter_joins_the_one_that_a_step_carries() -> None:
    (a, a_tensors), (b, b_tensors) = adapter(1), adapter(2)
    step, both = base(), base()
    attach_from(step, a)
    load_adapter_state(step, a_tensors, "adapter")
    add_adapter(step, b, b_tensors, 0.5)
    add_adapter(both, a, a_tensors, 1.0)
    add_adapter(both, b, b_tensors, 0.5)
    assert torch.equal(logits(step), logits(both))


def test_removing_the_adapters_gives_the_base_back() -> None:
    model = base()
    before, names = logits(model), set(model.state_dict())
    for seed in (1, 2):
        add_adapter(model, *adapter(seed), 0.5)
    assert not torch.equal(logits(model), before)
    remove_adapters(model)
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == names
    attach(model, LoRAOptions(r=2), seed=1)


def test_dora_composes_with_nothing_and_a_refusal_changes_nothing() -> None:
    """Must catch: slots filled one after the other, so that a refusal leaves half an adapter behind."""
    lora, dora = adapter(1, target_modules=["down_proj"]), adapter(2, use_dora=True)
    alone, model = base(), base()
    add_adapter(alone, *dora)
    with pytest.raises(UserError, match="DoRA"):
        add_adapter(base(), *dora, 0.5)
    add_adapter(model, *lora, 0.5)
    before = snapshot(model)
    with pytest.raises(UserError, match="DoRA"):
        add_adapter(model, *dora)
    assert same(snapshot(model), before)
    with pytest.raises(UserError, match="DoRA"):
        add_adapter(alone, *lora)
