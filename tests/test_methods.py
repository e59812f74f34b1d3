"""methods: how LoRA starts, what is refused and with what words, and what several adapters at once compute.

What every method promises is in test_promises.py, that PEFT computes the same in test_parity.py.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_tokens, relative, tiny_config, tiny_gpt
from equations import Plain, spoken
from torch import Tensor

from litlora.errors import UserError
from litlora.families import expected_tensors
from litlora.methods import from_peft, stored_tuning, tuning_of
from litlora.methods.attach import add, attach, linears, load_tuned_state, merge, remove, trainable, tuned_state
from litlora.methods.tuning import Tuning, evenly
from litlora.model import GPT, Composed
from litlora.options import AdapterOptions, FreezeOptions, FullOptions, LoRAOptions, ProOptions
from litlora.peft import AdapterConfig

ALL = ["all-linear", "lm_head"]


def base(dtype: torch.dtype = torch.float32, family: str = "qwen2", **changes: Any) -> GPT:
    return tiny_gpt(family, **changes).to(dtype)


def put_on(model: GPT, options: Any, seed: int = 1) -> Tuning:
    """Attach what `options` mean; what they mean."""
    tuning = tuning_of(options, model.config)
    attach(model, tuning, seed=seed)
    return tuning


def state(model: GPT, tuning: Tuning, family: str = "qwen2") -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tuned_state(model, tuning, tiny_config(family)).items()}


def learnt(model: GPT, seed: int = 5) -> GPT:
    """As after training: everything that learns has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def logits(model: GPT) -> Tensor:
    with torch.no_grad():
        return model.eval()(random_tokens(2, 13))


def snapshot(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- how LoRA starts -------------------------------------------------------------------------------------------------


def test_a_fresh_dora_without_biases_changes_not_a_bit() -> None:
    model = base(family="llama3")
    before = logits(model)
    put_on(model, LoRAOptions(r=3, use_dora=True, target_modules=ALL))
    assert torch.equal(before, logits(model))


def test_another_target_does_not_change_the_numbers_of_the_first() -> None:
    """Must catch: one generator for all modules."""
    few, many = base(), base()
    few_state = state(few, put_on(few, LoRAOptions(r=3, target_modules=["v_proj"])))
    many_state = state(many, put_on(many, LoRAOptions(r=3, target_modules=ALL)))
    assert same(few_state, {name: many_state[name] for name in few_state})
    assert len({tuple(tensor.flatten()[:4].tolist()) for name, tensor in many_state.items() if "lora_A" in name}) == 22  # no two alike


def test_a_is_uniform_as_in_peft() -> None:
    """Kaiming with a = sqrt 5: a bound of 1 / sqrt(in)."""
    model = base(family="llama", hidden_size=900, intermediate_size=8, num_hidden_layers=1)
    put_on(model, LoRAOptions(r=64, target_modules=["q_proj"]))
    (a,) = (tensor for name, tensor in trainable(model).items() if name.endswith("lora_A"))
    bound = 900**-0.5
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.99 * bound
    assert abs(a.std().item() / (bound / 3**0.5) - 1) < 0.02
    assert abs(a.mean().item()) < 0.02 * bound


def test_orthogonal_a_and_b_are_not_zero_and_their_product_is() -> None:
    """Of the size that PEFT draws them in. Must catch: rows and columns of the basis taken from the same half."""
    from peft import LoraConfig, get_peft_model

    model = base(family="llama", hidden_size=600, intermediate_size=8, num_hidden_layers=1)
    put_on(model, LoRAOptions(r=8, init="orthogonal", target_modules=["q_proj"]))
    a, b = (trainable(model)[f"model.layers.0.self_attn.q_proj.adapter.lora_{side}"] for side in "AB")
    assert (b @ a).abs().max() <= 1e-6 * a.norm() * b.norm()
    plain = torch.nn.Sequential(torch.nn.Linear(600, 48))
    theirs = get_peft_model(plain, LoraConfig(r=8, target_modules=["0"], init_lora_weights="orthogonal"))
    own = dict(theirs.named_parameters())
    for ours, name in ((a, "lora_A"), (b, "lora_B")):
        assert ours.std().item() == pytest.approx(own[f"base_model.model.0.{name}.default.weight"].std().item(), rel=0.15)
        assert torch.linalg.matrix_rank(ours) == 4


def test_pissa_starts_at_the_principal_components_and_leaves_the_weight_alone() -> None:
    """arXiv:2404.02948, equations 2 and 3. Must catch: a start scaled twice; a base that the start was subtracted from."""
    model = base(family="llama3")
    before = snapshot(model)
    put_on(model, LoRAOptions(r=4, alpha=6.0, init="pissa", target_modules=["up_proj"]))
    for host in linears(model).values():
        if host.adapter is not None:
            u, s, v = torch.linalg.svd(host.weight, full_matrices=False)
            start: Any = host.adapter
            found = start.scale * start.start_B @ start.start_A
            assert relative(found, (u[:, :4] * s[:4]) @ v[:4]) <= 2e-2  # found by iteration; what is left over is what counts
            assert (host.weight - found).norm() <= 1.0001 * s[4:].norm()
            assert relative(start.start_A.norm(dim=1), start.start_B.norm(dim=0)) <= 1e-4
    after = snapshot(model)
    assert same({name: after[name] for name in before}, before)


@pytest.mark.parametrize(
    ("weights", "adapters"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_adapters_are_kept_in_fp32_whatever_the_weights(weights: torch.dtype, adapters: torch.dtype) -> None:
    model = base(weights)
    put_on(model, LoRAOptions(r=3, use_dora=True, target_modules=ALL))
    assert {parameter.dtype for parameter in trainable(model).values()} == {adapters}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {weights}
    assert logits(model).dtype == weights


def test_an_adapter_of_a_model_that_is_in_use_does_not_drop_out() -> None:
    model = base().eval()
    put_on(model, LoRAOptions(r=3, dropout=0.5))
    learnt(model)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(random_tokens(1, 9)), model(random_tokens(1, 9)))


# ---- what options mean -----------------------------------------------------------------------------------------------


def test_new_blocks_are_spread_evenly() -> None:
    """LLaMA-Pro's figure 2, and its 32 + 8: after 3, 7, ..., 31."""
    assert evenly(32, 8) == tuple(range(3, 32, 4))
    assert evenly(3, 2) == (0, 2)
    assert evenly(7, 7) == tuple(range(7))
    assert tuning_of(ProOptions(), tiny_config(num_hidden_layers=9)).inserted == (2, 5, 8)  # a quarter, rounded up
    assert tuning_of(ProOptions(positions=["first:1", "2"]), tiny_config()).inserted == (0, 2)


def test_an_expanded_base_trains_its_new_blocks_unless_others_are_asked_for() -> None:
    config = tiny_config(num_hidden_layers=4, llama_pro_layers=[1, 3])
    tuning = tuning_of(ProOptions(), config)
    assert {name.split(".")[2] for name in tuning.whole} == {"1", "3"}
    assert len(tuning.whole) == 18
    assert not tuning.inserted
    assert tuning_of(ProOptions(n_insert=1), config).inserted == (3,)


def test_freezing_means_what_it_says_and_the_last_norm_is_not_one_of_the_blocks() -> None:
    """Must catch: `norm` matched inside input_layernorm; extra modules looked for inside the layers."""
    config = tiny_config("qwen3")
    options = FreezeOptions(layers=["1"], modules=["input_layernorm", "self_attn.q_norm", "down_proj"], extra_modules=["norm"])
    assert tuning_of(options, config).whole == (
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.norm.weight",
    )
    everything = tuning_of(FreezeOptions(layers=["0-2"], extra_modules=["embed_tokens", "norm", "lm_head"]), config).whole
    assert everything == tuning_of(FullOptions(), config).whole == tuple(expected_tensors(config))


def test_a_tied_head_saved_is_the_embedding_unless_it_is_separated() -> None:
    """DESIGN: one shared matrix that stays tied; `untie` separates it."""
    config = tiny_config("smollm")
    for word in ("embed_tokens", "lm_head"):
        tuning = tuning_of(LoRAOptions(modules_to_save=[word]), config)
        assert (tuning.whole, tuning.untied) == (("model.embed_tokens.weight",), False)
        apart = tuning_of(LoRAOptions(modules_to_save=[word], untie=True), config)
        assert apart.whole == ("model.embed_tokens.weight",) if word == "embed_tokens" else ("lm_head.weight",)
        assert apart.untied
    model = base(family="smollm")
    put_on(model, FreezeOptions(layers=[], extra_modules=["embed_tokens"], untie=True))
    learnt(model)
    assert torch.equal(model.lm_head.weight, base(family="smollm").lm_head.weight)
    assert not torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)


REFUSED: dict[str, tuple[Any, str]] = {
    "a target": (LoRAOptions(target_modules=["q_proj", "q_prj"]), "q_prj"),
    "an embedding": (LoRAOptions(target_modules=["q_proj", "embed_tokens"]), "--lora.modules_to_save embed_tokens trains it whole"),
    "a module to save": (LoRAOptions(modules_to_save=["embed_token"]), "did you mean embed_tokens"),
    "saved and adapted": (LoRAOptions(modules_to_save=["up_proj"]), "trained whole"),
    "saved around the adapted": (LoRAOptions(modules_to_save=["mlp"]), "trained whole"),
    "one saved and adapted": (LoRAOptions(modules_to_save=["layers.1.mlp.up_proj"]), "trained whole"),
    "saved and scaled": (AdapterOptions(kind="scale_shift", modules_to_save=["mlp"]), "trained whole"),
    "a layer": (LoRAOptions(layers=["3"]), "layers 0 to 2"),
    "a pattern": (LoRAOptions(rank_pattern=["gate=3"]), "gate matches none of the targets"),
    "no pattern": (LoRAOptions(rank_pattern=["gate_proj"]), "NAME=NUMBER"),
    "no rank": (LoRAOptions(rank_pattern=["gate_proj=2.5"]), "whole number"),
    "no alpha": (LoRAOptions(alpha_pattern=["gate_proj=much"]), "a number"),
    "an odd orthogonal rank": (LoRAOptions(r=3, init="orthogonal"), "even"),
    "an odd orthogonal pattern": (LoRAOptions(r=4, rank_pattern=["up_proj=3"], init="orthogonal"), "even"),
    "a start for DoRA": (LoRAOptions(init="pissa", use_dora=True), "DoRA"),
    "nothing to separate": (LoRAOptions(untie=True), "already"),
    "two ways to insert": (ProOptions(n_insert=1, positions=["0"]), "cannot both"),
    "too many blocks": (ProOptions(n_insert=4), "1 to 3"),
    "nothing that learns": (FreezeOptions(layers=[]), "nothing is left to learn"),
    "a module that is elsewhere": (FreezeOptions(extra_modules=["q_proj"]), "q_proj"),
    "a part of a name": (FreezeOptions(modules=["layernorm"]), "layernorm"),
    "a scale's target": (AdapterOptions(kind="scale_shift", target_modules=["q"]), "target named q"),
}


@pytest.mark.parametrize(("options", "why"), REFUSED.values(), ids=list(REFUSED))
def test_what_means_nothing_here_is_refused_before_anything_is_done(options: Any, why: str) -> None:
    """Must catch: a word that is silently ignored; a conflict that only the loading of what was trained for hours finds."""
    with pytest.raises(UserError) as refused:
        tuning_of(options, tiny_config())
    assert re.search(why, refused.value.report())


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_lora_on_a_head_that_is_the_embedding_is_refused_with_the_reason() -> None:
    config = tiny_config("smollm")
    with pytest.raises(UserError, match="one matrix"):
        tuning_of(LoRAOptions(target_modules=ALL), config)
    assert tuning_of(LoRAOptions(target_modules=ALL, untie=True), config).untied


def test_lora_on_a_tied_head_is_read_as_peft_does_who_separates_it() -> None:
    """A04."""
    described = AdapterConfig(r=2, alpha=2, target_modules=["q_proj", "lm_head"])
    assert from_peft(described, tiny_config("smollm")).untied
    assert not from_peft(described, tiny_config("llama")).untied


def test_a_second_attach_is_refused() -> None:
    """Whatever sits there; a block that follows another, too."""
    for options in (LoRAOptions(r=2), AdapterOptions(kind="prompt", length=2), ProOptions(n_insert=1)):
        model = base()
        put_on(model, options)
        before = snapshot(model)
        with pytest.raises(UserError, match="already"):
            put_on(model, LoRAOptions(r=2))
        assert same(snapshot(model), before)


def missing(tensors: dict[str, Tensor], a: str, b: str) -> list[str]:
    del tensors[a], tensors[b]
    return [f"missing: {a} ", f"missing: {b} "]


def extra(tensors: dict[str, Tensor], a: str, b: str) -> list[str]:
    more = (
        "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    )
    tensors.update({name: torch.zeros(3, 40) for name in more})
    return [f"unexpected: {name} " for name in more]


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
    tuning = put_on(source, LoRAOptions(r=3))
    tensors = state(learnt(source), tuning)
    names = list(tensors)
    listed = fault(tensors, names[2], names[-1])
    model = base()
    config = model.config
    if entrance == "attached":
        attach(model, tuning, seed=7)
    before = snapshot(model)
    where = "step/adapter_model.safetensors"
    load: Callable[[], object] = lambda: load_tuned_state(model, tuning, tensors, where, config)  # noqa: E731
    put: Callable[[], object] = lambda: add(model, tuning, tensors, where=where)  # noqa: E731
    enter = load if entrance == "attached" else put
    with pytest.raises(UserError) as refused:
        enter()
    report = refused.value.report()
    assert where in report
    assert [fault for fault in listed if fault not in report] == []
    assert same(snapshot(model), before)


def test_whole_numbers_are_no_adapter() -> None:
    model = base()
    tuning = put_on(model, LoRAOptions(r=3))
    tensors = state(model, tuning)
    name = next(iter(tensors))
    with pytest.raises(UserError, match="int8"):
        load_tuned_state(model, tuning, tensors | {name: tensors[name].to(torch.int8)}, "adapter", tiny_config("qwen2"))


def test_a_shared_matrix_must_be_the_same_under_both_names() -> None:
    """A04: a file of PEFT's in which embedding and head went apart does not fit a head that stays tied."""
    model = base(family="smollm")
    tuning = put_on(model, LoRAOptions(r=2, modules_to_save=["embed_tokens"]))
    tensors = state(learnt(model), tuning, "smollm")
    tensors["base_model.model.lm_head.weight"][3, 5] += 1
    before = snapshot(model)
    with pytest.raises(UserError, match=r"lm_head.*differs from the embedding"):
        load_tuned_state(model, tuning, tensors, "adapter", tiny_config("smollm"))
    assert same(snapshot(model), before)


def test_an_adapter_in_bf16_is_loaded_exactly() -> None:
    model = base(torch.bfloat16)
    tuning = put_on(model, LoRAOptions(r=3))
    tensors = {name: torch.randn(tensor.shape).to(torch.bfloat16) for name, tensor in state(model, tuning).items()}
    load_tuned_state(model, tuning, tensors, "adapter", tiny_config("qwen2"))
    assert same(state(model, tuning), {name: tensor.float() for name, tensor in tensors.items()})


# ---- composition -----------------------------------------------------------------------------------------------------

Trained = tuple[Tuning, dict[str, Tensor]]
Parts = list[tuple[Any, float]]


def trained(options: Any, seed: int, family: str = "llama_biased", dtype: torch.dtype = torch.float64) -> Trained:
    """What a file holds after training, and what it means."""
    model = base(dtype, family)
    config, tuning = model.config, put_on(model, options, seed)
    learnt(model, seed)
    return stored_tuning(options, config), {name: tensor.clone() for name, tensor in tuned_state(model, tuning, config).items()}


def composed(parts: list[tuple[Trained, float]], family: str = "llama_biased", dtype: torch.dtype = torch.float64) -> GPT:
    model = base(dtype, family)
    for (tuning, tensors), weight in parts:
        add(model, tuning, tensors, weight)
    return model


def by_equations(parts: list[tuple[Trained, float]], family: str) -> Tensor:
    """y + sum of w_i (adapter_i(x, y) - y), each seeing the base's y; W + sum of w_i (W_i - W); written down once more."""
    config = tiny_config(family)
    plain = {name: tensor.double() for name, tensor in tiny_gpt(family).named_parameters()}
    values, spoken_by = dict(plain), []
    if any(tuning.untied for (tuning, _), _ in parts):
        plain["lm_head.weight"] = values["lm_head.weight"] = plain["model.embed_tokens.weight"]
    for (tuning, tensors), weight in parts:
        own = {name: tensors[stored] for stored, name in tuning.file_names(config).items()}
        changes = {name: weight * (own[name] - plain[name]) for name in tuning.whole}
        if "model.embed_tokens.weight" in tuning.whole and not tuning.untied and "lm_head.weight" in values and config.tie_word_embeddings:
            changes["lm_head.weight"] = changes["model.embed_tokens.weight"]  # it was trained as the head, too
        values |= {name: values[name] + change for name, change in changes.items()}
        spoken_by.append((tuning, own, weight))

    def seen(name: str, x: Tensor, y: Tensor) -> Tensor:
        return y + sum(weight * (spoken(tuning, config, values | own)(name, x, y) - y) for tuning, own, weight in spoken_by)

    with torch.no_grad():
        return Plain(config, values, seen).logits(random_tokens(2, 13))


LORA = LoRAOptions(r=3, alpha=7.0)
FEW = LoRAOptions(r=5, alpha=3.0, use_rslora=True, target_modules=["q_proj", "down_proj"])
SCALES = AdapterOptions(kind="scale_shift")
SERIES = AdapterOptions(kind="series", width=4)
PARALLEL = AdapterOptions(kind="parallel", width=6, activation="gelu", layers=["1"])
LEARNT_PROMPT = AdapterOptions(kind="prompt", length=3)
LAST = FreezeOptions(layers=["last:1"], extra_modules=["norm", "lm_head"])
SAVED = LoRAOptions(r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens", "norm"])
HEAD = FreezeOptions(layers=[], extra_modules=["lm_head"], untie=True)
TOGETHER: dict[str, tuple[str, Parts]] = {
    "two LoRAs": ("llama_biased", [(LORA, 0.75), (FEW, -0.5)]),
    "three LoRAs": ("llama_biased", [(LORA, 0.5), (LoRAOptions(r=2, init="pissa"), 1.0), (LORA, 2.0)]),
    "LoRA and scales on the same": ("llama_biased", [(LORA, 0.8), (SCALES, 0.6)]),
    "two scales": ("llama_biased", [(SCALES, 0.7), (SCALES, -0.2)]),
    "LoRA and scales elsewhere": (
        "llama_biased",
        [(FEW, 1.0), (AdapterOptions(kind="scale_shift", target_modules=["k_proj", "gate_proj"], norms=False), 1.0)],
    ),
    "LoRA and weights": ("llama_biased", [(LORA, 1.5), (LAST, 0.5)]),
    "weights and weights": ("llama_biased", [(LAST, 1.0), (LAST, 0.5)]),
    "two series": ("llama_biased", [(SERIES, 0.5), (SERIES, -0.25)]),
    "all around": ("qwen2", [(SERIES, 1.0), (PARALLEL, 0.5), (FEW, 1.0)]),
    "two prompts": ("qwen3", [(LEARNT_PROMPT, 2.0), (LEARNT_PROMPT, -0.5)]),
    "saved twice, tied": ("smollm", [(SAVED, 0.75), (SAVED, 0.5)]),
    "a head of its own, twice": ("smollm", [(HEAD, 0.75), (HEAD, 0.5), (LORA, 1.0)]),
    "an embedding and a head of its own": ("smollm", [(SAVED, 0.75), (HEAD, 0.5)]),
    "a new block and LoRA": ("llama_biased", [(LORA, 0.5), (ProOptions(positions=["1"]), 1.0)]),
}
UNMERGED = ("two series", "a new block and LoRA")
together = pytest.mark.parametrize(("family", "parts"), TOGETHER.values(), ids=list(TOGETHER))


@together
def test_several_at_once_compute_the_weighted_sum_of_what_each_changes(family: str, parts: Parts) -> None:
    """DESIGN, in fp64, in any order. Must catch: a chain in which the second sees the first's y; a weight used as its square; a
    difference from what the first left rather than from the base."""
    added = [(trained(options, seed, family), weight) for seed, (options, weight) in enumerate(parts)]
    expected = by_equations(added, family)
    model = composed(added, family)
    assert relative(logits(model), expected) <= 1e-10
    assert relative(logits(composed(added[::-1], family)), expected) <= 1e-10
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".adapter." in name or ".prompt." in name)
    before = logits(base(torch.float64, family))
    assert relative(expected, before) > 1e-2
    remove(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", [name for name, (family, _) in TOGETHER.items() if family == "llama_biased" and name not in UNMERGED])
def test_what_can_be_merged_adds_up_to_the_merged_weights(name: str) -> None:
    """W + sum of w_i (merged_i - W), of each merged alone; and the composed model merged is the same plain one."""
    family, parts = TOGETHER[name]
    added = [(trained(options, seed, family), weight) for seed, (options, weight) in enumerate(parts)]
    plain = {key: tensor.detach() for key, tensor in base(torch.float64, family).named_parameters()}
    total = dict(plain)
    for part, weight in added:
        alone = dict(merge(composed([(part, 1.0)], family)).named_parameters())
        total = {key: tensor + weight * (alone[key].detach() - plain[key]) for key, tensor in total.items()}
    expected = base(torch.float64, family)
    expected.load_state_dict(total, strict=True)
    model = composed(added, family)
    assert relative(logits(model), logits(expected)) <= 1e-10
    merged = dict(merge(model).named_parameters())
    assert all(relative(merged[key], total[key]) <= 1e-12 for key in total)


def test_one_added_adapter_is_the_attached_one_bit_for_bit_and_does_not_learn() -> None:
    tuning, tensors = trained(LoRAOptions(r=3, target_modules=ALL), 1, dtype=torch.float32)
    attached, added = base(family="llama_biased"), base(family="llama_biased")
    attach(attached, tuning, seed=4)
    load_tuned_state(attached, tuning, tensors, "adapter", tiny_config("llama_biased"))
    add(added, tuning, tensors)
    assert torch.equal(logits(added), logits(attached))
    assert not any(parameter.requires_grad for name, parameter in added.named_parameters() if ".adapter." in name)


def test_an_adapter_joins_the_one_that_a_step_carries() -> None:
    a, b = trained(LORA, 1, dtype=torch.float32), trained(FEW, 2, dtype=torch.float32)
    step = base(family="llama_biased")
    attach(step, a[0], seed=4)
    load_tuned_state(step, a[0], a[1], "adapter", tiny_config("llama_biased"))
    add(step, *b, 0.5)
    assert torch.equal(logits(step), logits(composed([(a, 1.0), (b, 0.5)], dtype=torch.float32)))
    assert isinstance(step.model.layers[0].self_attn.q_proj.adapter, Composed)


def test_removing_what_was_added_makes_room_again() -> None:
    model = base(family="llama_biased")
    before, names = logits(model), set(model.state_dict())
    for seed in (1, 2):
        add(model, *trained(LORA, seed), 0.5)
    assert not torch.equal(logits(model), before)
    remove(model)
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == names
    put_on(model, LoRAOptions(r=2))


DORA, BLOCK = LoRAOptions(r=2, use_dora=True), ProOptions(positions=["1"])
ALONE: dict[str, tuple[Parts, tuple[Any, float], str]] = {
    "DoRA weighted": ([], (DORA, 0.5), "DoRA"),
    "DoRA after LoRA": ([(FEW, 0.5)], (DORA, 1.0), "DoRA"),
    "LoRA after DoRA": ([(DORA, 1.0)], (FEW, 1.0), "DoRA"),
    "DoRA twice": ([(DORA, 1.0)], (DORA, 1.0), "DoRA"),
    "DoRA on weights that were replaced": ([(LAST, 1.0)], (DORA, 1.0), "trained whole"),
    "weights under DoRA replaced": ([(DORA, 1.0)], (LAST, 1.0), "trained whole"),
    "weights under scales replaced": ([(SCALES, 1.0)], (LAST, 0.5), "trained whole"),
    "a new block weighted": ([], (BLOCK, 0.5), "inserted blocks"),
    "new blocks twice": ([(BLOCK, 1.0)], (ProOptions(positions=["0"]), 1.0), "inserted blocks"),
}


@pytest.mark.parametrize(("carried", "more", "why"), ALONE.values(), ids=list(ALONE))
def test_dora_and_new_blocks_go_alone_and_a_refusal_changes_nothing(carried: Parts, more: tuple[Any, float], why: str) -> None:
    """DESIGN. Must catch: slots filled one after the other, so that a refusal leaves half an adapter behind."""
    model = composed([(trained(options, seed), weight) for seed, (options, weight) in enumerate(carried)])
    modules, before, output = list(model.named_modules()), snapshot(model), logits(model)
    with pytest.raises(UserError, match=why):
        add(model, *trained(more[0], 9), more[1])
    assert list(model.named_modules()) == modules
    assert same(snapshot(model), before)
    assert torch.equal(logits(model), output)


def test_a_base_that_is_trained_whole_is_not_claimed_to_be_still_there() -> None:
    """What was replaced is not kept in memory, so neither the base nor a difference to it can be had from this model."""
    model = tiny_gpt()
    tuning = tuning_of(FreezeOptions(layers=["last:1"]), model.config)
    attach(model, tuning, seed=0)
    state = {name: tensor.clone() for name, tensor in tuned_state(model, tuning, model.config).items()}
    with pytest.raises(UserError, match="not kept"):
        remove(model)
    with pytest.raises(UserError, match="not kept"):
        add(model, tuning, state)
