"""The same numbers as the reference implementations: transformers for models, PEFT for adapters, stories3m's own record."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    EVERY,
    EXPERTS,
    FAMILIES,
    by_our_names,
    gradients,
    random_tokens,
    randomise,
    relative,
    shared_data,
    tiny_config,
    tiny_gpt,
    tiny_hf_config,
    transformers_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import load_model
from litlora.config import Config
from litlora.errors import UserError
from litlora.families import config_from_hf, linear_shapes
from litlora.merge import merge, prepare
from litlora.merge.expand import expand, prepare_expansion
from litlora.methods import from_peft, lora_config, tuning_of
from litlora.methods.attach import add, attach, load_tuned_state, tuned_state
from litlora.methods.tuning import Tuning
from litlora.model import GPT, IGNORE, DoRA, KVCache, Linear, LoRA, Router
from litlora.options import AdapterOptions, LoRAOptions, ProOptions
from litlora.peft import adapter_config_from_peft, adapter_config_to_peft, prompt_from_peft, prompt_to_peft

LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def lengths(family: str) -> list[int]:
    """1, 17, the context, and for a stretched rope the context times its factor."""
    config = tiny_hf_config(family)
    context = config["max_position_embeddings"]
    factor = config.get("rope_scaling", {}).get("factor", 1)
    return sorted({1, 17, context, int(context * factor)})


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def some_graded(tokens: Tensor) -> Tensor:
    """Targets for `tokens` of which about a third are not graded, the last one always is."""
    targets = tokens.roll(-1, 1)
    targets[:, :-1][torch.rand(targets[:, :-1].shape, generator=torch.Generator().manual_seed(5)) < 0.3] = IGNORE
    return targets


@pytest.mark.parametrize("family", EVERY)
def test_logits_equal_those_of_transformers(family: str) -> None:
    """M01, logits, fp32. Must catch: rotating pairs (2i, 2i + 1); a window one token off; norm gains swapped."""
    gpt = tiny_gpt(family)
    theirs = transformers_model(family, gpt)
    assert config_from_hf(theirs.config.to_dict(), "config.json").rope == gpt.config.rope
    largest = 0.0
    for length in lengths(family):
        tokens = random_tokens(2, length)
        with torch.no_grad():
            expected = theirs(tokens).logits
            difference = (gpt(tokens) - expected).abs().max()
            assert difference <= 1e-5 * max(1, expected.abs().max()), length
        largest = max(largest, float(difference / max(1, expected.abs().max())))
    print(f"largest difference {family} {largest:.1e}")  # for tutorials/families.md


@pytest.mark.parametrize("family", EVERY)
def test_the_config_that_transformers_writes_gives_the_same_model(family: str) -> None:
    """M01: from config.to_dict(), in the spelling of transformers 5, through families.py."""
    ours = config_from_hf(transformers_model(family).config.to_dict(), "config.json")
    gpt = randomise(GPT(ours), 3).eval()
    tokens = random_tokens(1, 20)
    torch.testing.assert_close(gpt(tokens), tiny_gpt(family, seed=3)(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("family", EVERY)
def test_every_gradient_equals_that_of_transformers(family: str) -> None:
    """M01, gradients of all parameters, fp32; at every length. Must catch: turning the wrong way in Rotated.backward."""
    gpt = tiny_gpt(family)
    theirs = transformers_model(family, gpt)
    for length in lengths(family):
        tokens = random_tokens(2, length)
        targets = some_graded(tokens)
        gpt.zero_grad()
        theirs.zero_grad()
        gpt(tokens, targets).backward()
        plain_loss(theirs(tokens).logits, targets).backward()
        expected = by_our_names({name: gradient_of(parameter) for name, parameter in theirs.named_parameters()}, gpt.config)
        for name, parameter in gpt.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None and name.endswith("e_score_correction_bias")
                continue
            assert parameter.grad is not None
            if (
                length == 1
                and not gpt.config.attention_sinks
                and name.split(".self_attn.")[-1].startswith(("q_proj", "k_proj", "q_norm", "k_norm"))
            ):
                assert parameter.grad.abs().max() < 1e-5  # one token looks at itself whatever q and k are
                continue
            assert relative(parameter.grad, expected[name]) <= 1e-5, (name, length)


@pytest.mark.parametrize("family", EVERY)
def test_bf16_logits_agree_with_those_of_transformers(family: str) -> None:
    """M01, bf16: KL <= 1e-4, largest difference <= 3% of the largest logit; and no farther from fp32 than transformers is. Of models
    with experts the tenth of the positions that differ most is left out: there two experts are as good as equal, and rounding decides."""
    gpt = tiny_gpt(family).bfloat16()
    theirs = transformers_model(family, gpt).bfloat16()
    tokens = random_tokens(4, 40)
    with torch.no_grad():
        ours, expected, truth = gpt(tokens).float(), theirs(tokens).logits.float(), gpt.float()(tokens)
    kept = 0.9 if family in EXPERTS else 1.0
    assert divergence(ours, expected, kept) <= 1e-4
    assert (ours - expected).abs().amax(-1).quantile(kept) <= 3e-2 * expected.abs().max()
    assert divergence(ours, truth, kept) <= 1.1 * divergence(expected, truth, kept)


@pytest.mark.parametrize("family", EVERY)
def test_a_directory_of_transformers_works_as_it_is(family: str, tmp_path: Path) -> None:
    """M02, N02, N05, N07: in shards; with LoRA of PEFT on every Linear of the blocks, fused ones among them; merged, and made deeper, it is
    read by transformers again under the names that it had. Must catch: a fused projection split another way; a name not mapped back."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    theirs, tokens = transformers_model(family, tiny_gpt(family)), random_tokens(2, 20)
    theirs.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    there = {name.rpartition(".")[2] for name in linear_shapes(tiny_config(family))}
    attention = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj", *LATENT) if name in there]
    targets: Any = attention if family in EXPERTS else "all-linear"
    adapted = get_peft_model(theirs, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)).eval()
    shaken(adapted, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    base, step = resolve(tmp_path / "base"), resolve(tmp_path / "adapter", base_dir=tmp_path / "base")
    expand(prepare_expansion(base, tmp_path / "deep", 2))
    merge(prepare(step, tmp_path / "merged"))
    with torch.no_grad():
        want = adapted(tokens).logits
        with adapted.disable_adapter():
            plain = adapted(tokens).logits
        bound = 1e-5 * max(1, float(want.abs().max()))
        assert (load_model(base)(tokens) - plain).abs().max() <= bound
        assert (load_model(step)(tokens) - want).abs().max() <= bound
        assert relative(plain, want) > 0.01
        for place, expected in (("merged", want), ("deep", plain)):
            model, told = AutoModelForCausalLM.from_pretrained(tmp_path / place, output_loading_info=True, attn_implementation="eager")
            assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert (model(tokens).logits - expected).abs().max() <= bound, place
    stored = {name for path in (tmp_path / "base").glob("*.safetensors") for name in load_file(path)}
    assert {name for path in (tmp_path / "merged").glob("*.safetensors") for name in load_file(path)} == stored


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2", "glm4"])
def test_the_first_step_of_a_new_block_behind_a_norm_is_small(family: str) -> None:
    """N07: what is zero is the norm's gain. Must catch: a zero projection there, which the norm makes as large as any."""
    gpt, tokens = tiny_gpt(family), random_tokens(2, 20)
    before = gpt(tokens).detach()
    attach(gpt, tuning_of(ProOptions(n_insert=2), gpt.config), seed=1)
    assert torch.equal(gpt(tokens), before)
    optimizer = torch.optim.AdamW([parameter for parameter in gpt.parameters() if parameter.requires_grad], lr=2e-4)
    gpt(tokens, some_graded(tokens)).backward()
    optimizer.step()
    assert 0 < relative(gpt(tokens), before) < 0.05


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("length", [1, 6, 7, 8, 15, 47])
@pytest.mark.parametrize("family", [family for family in EVERY if family not in ("longrope", "dynamic")])
def test_a_cache_changes_nothing_in_any_family(family: str, length: int, chunk: int) -> None:
    """M05: prefill in chunks, then token by token. The two ropes that depend on the length of the text are tried below."""
    gpt, tokens = tiny_gpt(family), random_tokens(2, 48)
    cache = KVCache(48, rows=2)
    pieces = [*tokens[:, :length].split(chunk, 1), *tokens[:, length:].unbind(1)]
    with torch.no_grad():
        whole = gpt(tokens)
        parts = torch.cat([gpt(piece.view(2, -1), cache=cache) for piece in pieces], 1)
    assert (parts - whole).abs().max() <= 2e-6 * max(1, whole.abs().max())


@pytest.mark.parametrize("family", EVERY)
def test_packed_samples_are_computed_as_alone_in_any_family(family: str) -> None:
    """N09. Must catch: a rope that depends on the length of the text looking at the whole row's."""
    gpt, lengths = tiny_gpt(family).double(), [3, 30, 9]
    tokens = random_tokens(1, sum(lengths))
    with torch.no_grad():
        packed = gpt(tokens, segments=lengths)
        alone = torch.cat([gpt(part) for part in tokens.split(lengths, 1)], 1)
    assert (packed - alone).abs().max() <= 1e-10


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", [family for family in EVERY if tiny_gpt(family).can_share])
def test_what_packed_samples_begin_with_can_be_computed_once_in_any_family(family: str, dtype: torch.dtype, bound: float) -> None:
    """N09: the loss and every gradient are those of whole samples, also where the beginning is graded and longer than a window.

    Caught: positions that start at 0 after it; a sample that does not see it, or sees another; its tokens counted once.
    """
    gpt, prefix, lengths = tiny_gpt(family).to(dtype), 17, [3, 30, 1]
    first, *rest = random_tokens(1, prefix + sum(lengths)).split([prefix, *lengths], 1)
    first_targets, *targets = random_tokens(1, prefix + sum(lengths), seed=1).split([prefix, *lengths], 1)
    first_targets[0, ::3] = IGNORE
    shared = gpt(torch.cat([first, *rest], 1), torch.cat([first_targets, *targets], 1), segments=lengths, prefix=prefix)
    found = gradients(gpt, shared)
    whole = [(torch.cat((first, part), 1), torch.cat((first_targets, target), 1)) for part, target in zip(rest, targets, strict=True)]
    alone: Tensor = sum((gpt(*sample) for sample in whole), torch.zeros((), dtype=dtype))
    assert relative(shared, alone) <= bound
    wanted = gradients(gpt, alone)
    assert found.keys() == wanted.keys()
    assert all(relative(found[name], gradient) <= bound for name, gradient in wanted.items())


@pytest.mark.parametrize("family", EXPERTS)
def test_the_experts_of_a_token_do_not_depend_on_what_else_is_computed(family: str) -> None:
    """M05, N09: in rows of other texts, and in rows of a cache that differ in length. Must catch: a limit on the tokens of an expert."""
    gpt, tokens = tiny_gpt(family).double(), random_tokens(5, 30)
    with torch.no_grad():
        alone = torch.cat([gpt(row[None]) for row in tokens])
        assert (gpt(tokens) - alone).abs().max() <= 1e-10
        cache, lengths = KVCache(30, rows=5), [3, 12, 1, 25, 7]
        gpt(tokens[:, :25], cache=cache)
        cache.rewind(lengths)
        following = torch.stack([row[n : n + 5] for row, n in zip(tokens, lengths, strict=True)])
        expected = torch.stack([row[n : n + 5] for row, n in zip(alone, lengths, strict=True)])
        assert (gpt(following, cache=cache) - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("family", EXPERTS)
def test_every_token_goes_through_as_many_experts_as_the_config_says(family: str) -> None:
    """And all experts are used: a model in which they are not would pass every other test."""
    gpt, seen = tiny_gpt(family), []
    for module in gpt.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda router, x, y: seen.append(y[1]))
    gpt(random_tokens(4, 40))
    assert len(seen) == sum(gpt.config.has_experts(layer) for layer in range(gpt.config.num_hidden_layers)) > 0
    for chosen in seen:
        assert chosen.size(1) == gpt.config.num_experts_per_tok > 1
        assert all(len(set(row)) == len(row) for row in chosen.tolist())
        assert set(chosen.flatten().tolist()) == set(range(gpt.config.num_experts))


def divergence(ours: Tensor, theirs: Tensor, kept: float = 1.0) -> float:
    """Mean KL of logits (B, T, V), over the share of the positions that differ least."""
    each = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1).flatten()
    return float(each.sort().values[: int(kept * len(each))].mean())


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapt_both(gpt: GPT, theirs: Any, method: type[LoRA], r: int, alpha: int, dropout: float, use_rslora: bool) -> Any:
    """Random adapters on every projection and the head of `gpt`, and the same in PEFT around `theirs`."""
    from peft import LoraConfig, get_peft_model

    gpt.requires_grad_(False)
    for name, host in gpt.named_modules():
        if isinstance(host, Linear):
            assert name.rpartition(".")[2] in PROJECTIONS
            host.adapter = method(host, r, alpha, dropout, use_rslora)
    for name, parameter in randomised_adapters(gpt).items():
        assert parameter.requires_grad, name
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=PROJECTIONS, use_rslora=use_rslora, use_dora=method is DoRA
    )
    theirs = get_peft_model(theirs, config)
    for name, parameter in theirs_by_our_name(theirs).items():
        parameter.data.copy_(gpt.get_parameter(name).view_as(parameter))
    return theirs


def randomised_adapters(gpt: GPT) -> dict[str, torch.nn.Parameter]:
    """|B A| is some tenths of |W|, far more than 1%."""
    generator = torch.Generator().manual_seed(9)
    adapters = {name: p for name, p in gpt.named_parameters() if ".adapter." in name}
    for name, parameter in adapters.items():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * (1 + 0.2 * noise) if name.endswith("magnitude") else 0.1 * noise
    return adapters


def theirs_by_our_name(theirs: Any) -> dict[str, torch.nn.Parameter]:
    names = {"lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B", "lora_magnitude_vector.default.weight": "magnitude"}
    found = {}
    for name, parameter in theirs.named_parameters():
        for their_end, our_end in names.items():
            if name.endswith(their_end):
                found[name.removeprefix("base_model.model.").removesuffix(their_end) + "adapter." + our_end] = parameter
    return found


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "llama_biased", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_adapters_compute_and_learn_as_in_peft(method: type[LoRA], family: str, kv_heads: int, use_rslora: bool) -> None:
    """N01. Must catch: alpha / r for rsLoRA; the bias inside DoRA's gain; the norm inside DoRA's gradient."""
    gpt = tiny_gpt(family, num_key_value_heads=kv_heads)
    theirs = transformers_model(family, gpt, num_key_value_heads=kv_heads)
    theirs = adapt_both(gpt, theirs, method, r=5, alpha=12, dropout=0.0, use_rslora=use_rslora)
    tokens = random_tokens(2, 20)
    targets = some_graded(tokens)
    expected = theirs(tokens).logits
    assert (gpt(tokens) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    gpt(tokens, targets).backward()
    plain_loss(expected, targets).backward()
    learnt = theirs_by_our_name(theirs)
    assert len(learnt) == (3 if method is DoRA else 2) * (7 * 3 + 1)
    for name, parameter in learnt.items():
        ours = gpt.get_parameter(name).grad
        assert ours is not None
        assert parameter.grad is not None
        assert relative(ours, parameter.grad.view_as(ours)) <= 1e-5, name


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_dropout_drops_what_peft_drops(method: type[LoRA]) -> None:
    """N01 with dropout: the same draws give the same logits and gradients. Must catch: DoRA's base part on the dropped-out x only."""
    gpt = tiny_gpt("llama_biased")
    theirs = adapt_both(gpt, transformers_model("llama_biased", gpt), method, r=3, alpha=6, dropout=0.4, use_rslora=False).train()
    gpt.train()
    tokens = random_tokens(2, 20)
    torch.manual_seed(11)
    ours = gpt(tokens)
    torch.manual_seed(11)
    expected = theirs(tokens).logits
    assert (ours - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    ours.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in theirs_by_our_name(theirs).items():
        grad = gpt.get_parameter(name).grad
        assert grad is not None
        assert parameter.grad is not None
        assert relative(grad, parameter.grad.view_as(grad)) <= 1e-5, name


# ---- PEFT's files, theirs and ours -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TheirFile:
    """What PEFT trained and wrote: its model, with the adapter on it, and our reading of the file."""

    model: Any
    directory: Path
    tuning: Tuning
    tensors: dict[str, Tensor]

    def gradients(self) -> dict[str, Tensor]:
        """Of what it trains, by the names in the file."""
        found = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                assert parameter.grad is not None
                name = name.replace("modules_to_save.default.", "").replace(".default.", ".")
                found[name.removesuffix(".weight") if "magnitude" in name else name] = parameter.grad
        return found


@torch.no_grad()
def shaken(model: torch.nn.Module, by: float = 0.1) -> None:
    """As after training."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def by_peft(config: Any, theirs: Any, base: Config, directory: Path) -> TheirFile:
    from peft import get_peft_model

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says what it does with a head
        model = get_peft_model(theirs, config)
        shaken(model, 0.5 if config.is_prompt_learning or config.is_adaption_prompt else 0.1)
        model.save_pretrained(directory)
    tuning, tensors = opened(directory, base)
    return TheirFile(model=model.eval(), directory=directory, tuning=tuning, tensors=tensors)


def opened(directory: Path, base: Config) -> tuple[Tuning, dict[str, Tensor]]:
    """A file of PEFT's form, as anybody's."""
    values = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    if values["peft_type"] == "LORA":
        return from_peft(adapter_config_from_peft(values, directory), base), tensors
    return tuning_of(AdapterOptions(**prompt_from_peft(values, directory)), base), tensors


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config))


def in_peft(directory: Path, theirs: Any) -> Any:
    """A directory, loaded by PEFT."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(theirs, directory).eval()


PEFT_LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("qwen3", {"lora_alpha": 9, "target_modules": "all-linear"}),
    "rslora": ("llama_biased", {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "head": ("qwen2", {"r": 3, "lora_alpha": 3, "target_modules": ["gate_proj", "up_proj", "down_proj", "lm_head"]}),
    "dora": ("llama_biased", {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}),
    "patterns": (
        "qwen2",
        {
            "lora_alpha": 8,
            "target_modules": r".*\.(q_proj|up_proj|o_proj)",
            "rank_pattern": {"layers.1.mlp.up_proj": 2, "q_proj": 7},
            "alpha_pattern": {"o_proj": 3},
        },
    ),
    "layers": ("mistral", {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1], "exclude_modules": ["up_proj"]}),
    "head of a tied base": ("smollm", {"target_modules": ["q_proj", "lm_head"]}),
    "saved": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "every norm": ("qwen3", {"target_modules": ["up_proj"], "modules_to_save": ["norm"]}),
    "the last norm": ("llama3", {"target_modules": ["up_proj"], "modules_to_save": ["model.norm"]}),
    "a whole MLP": ("llama_biased", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]}),
    "tied: embedding": ("smollm", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied: head": ("smollm", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "tied: both": ("smollm", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied: embedding, kept so": (
        "smollm",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied: head, kept so": ("smollm", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize(("family", "values"), PEFT_LORA.values(), ids=list(PEFT_LORA))
def test_an_adapter_of_peft_computes_and_learns_the_same_here_and_goes_back_unchanged(
    family: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """N01, N02, A04. In fp64, where rounding hides nothing (transformers' norms stay in fp32). Must catch: alpha / r where rsLoRA is
    asked; a pattern's rank with the default's alpha; a head that PEFT separated and we kept, or the other way round; a key not
    written that changes the result; a tensor renamed."""
    from peft import LoraConfig

    gpt, plain = tiny_gpt(family).double(), transformers_model(family, tiny_gpt(family)).double()
    base, tokens = gpt.config, random_tokens(2, 15)
    untouched = plain(tokens).logits.detach()
    theirs = by_peft(LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **values}), plain, base, tmp_path / "theirs")
    attach(gpt, theirs.tuning, seed=1)
    load_tuned_state(gpt, theirs.tuning, theirs.tensors, tmp_path, base)
    want = theirs.model(tokens).logits
    assert (gpt(tokens) - want).abs().max() <= 1e-5 * max(1, want.abs().max())
    assert relative(untouched, want) > 0.01  # the adapter matters

    targets = some_graded(tokens)
    plain_loss(want, targets).backward()
    gpt(tokens, targets).backward()
    expected, names = theirs.gradients(), theirs.tuning.file_names(base)
    assert expected.keys() == names.keys()
    for stored, name in names.items():
        grad = gpt.get_parameter(name).grad
        assert grad is not None
        assert relative(grad, expected[stored].view_as(grad)) <= 1e-5, name

    described = adapter_config_from_peft(json.loads((theirs.directory / "adapter_config.json").read_text()), "adapter_config.json")
    ours = tuned_state(gpt, theirs.tuning, base)
    copied = {name for name in theirs.tensors if ".base_layer." in name}  # of a head with LoRA, PEFT saves the base's as well
    assert ours.keys() == theirs.tensors.keys() - copied
    assert all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.items())
    write(tmp_path / "back", adapter_config_to_peft(described), ours)
    with torch.no_grad():
        back, kept = (
            in_peft(directory, transformers_model(family, tiny_gpt(family)).double())(tokens).logits
            for directory in (tmp_path / "back", theirs.directory)
        )
    assert torch.equal(back, kept)


OUR_LORA: dict[str, tuple[str, LoRAOptions]] = {
    "plain": ("qwen2", LoRAOptions(r=3, alpha=7.0)),
    "rslora and head": ("llama_biased", LoRAOptions(r=5, alpha=3.0, use_rslora=True, target_modules=["all-linear", "lm_head"])),
    "one layer": ("qwen3", LoRAOptions(r=2, target_modules=["layers.1.mlp.up_proj"])),
    "dora": ("llama_biased", LoRAOptions(r=3, use_dora=True, target_modules=["all-linear", "lm_head"])),
    "patterns": ("qwen2", LoRAOptions(r=3, rank_pattern=["up_proj=5"], alpha_pattern=[r"layers\.1\..*=2.5"], layers=["last:2"])),
    "regular expression": ("mistral", LoRAOptions(r=3, target_modules=[r".*\.[02]\..*(q|up)_proj", "o_proj"])),
    "orthogonal": ("qwen3", LoRAOptions(r=4, init="orthogonal")),
    "pissa": ("llama_biased", LoRAOptions(r=3, init="pissa")),
    "pissa, rslora, patterns": (
        "qwen2",
        LoRAOptions(r=3, init="pissa", use_rslora=True, rank_pattern=["up_proj=5"], alpha_pattern=["q_proj=9"]),
    ),
    "saved": ("qwen2", LoRAOptions(r=3, modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "saved norms": ("qwen3", LoRAOptions(r=3, modules_to_save=["input_layernorm", "norm", "q_norm"])),
    "saved MLP": ("llama_biased", LoRAOptions(r=3, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"])),
    "tied: saved embedding": ("smollm", LoRAOptions(r=3, modules_to_save=["embed_tokens", "norm"])),
    "tied: saved head": ("smollm", LoRAOptions(r=3, modules_to_save=["lm_head"])),
    "separated: saved embedding": ("smollm", LoRAOptions(r=3, modules_to_save=["embed_tokens"], untie=True)),
    "separated: saved head": ("smollm", LoRAOptions(r=3, modules_to_save=["lm_head"], untie=True)),
    "separated: LoRA on the head": ("smollm", LoRAOptions(r=3, target_modules=["q_proj", "lm_head"], untie=True)),
}


@pytest.mark.parametrize(("family", "options"), OUR_LORA.values(), ids=list(OUR_LORA))
def test_an_adapter_of_litlora_computes_the_same_in_peft(family: str, options: LoRAOptions, tmp_path: Path) -> None:
    """N02, A04: under the config that its options mean, and under that config here as well, as anybody reads it. Must catch: `norm`
    written for the last one, which to PEFT is every norm; PiSSA's file with an init that makes PEFT subtract from the base."""
    gpt, tokens = tiny_gpt(family), random_tokens(2, 15)
    base, tuning = gpt.config, tuning_of(options, gpt.config)
    attach(gpt, tuning, seed=1)
    shaken(gpt, 0.05)
    write(tmp_path, adapter_config_to_peft(lora_config(options, base, "base")), tuned_state(gpt, tuning, base))
    plain = transformers_model(family, tiny_gpt(family))
    theirs = in_peft(tmp_path, plain)
    with torch.no_grad():
        want = gpt(tokens)
        assert relative(tiny_gpt(family)(tokens), want) > 0.01
        assert (theirs(tokens).logits - want).abs().max() <= 1e-5 * max(1, want.abs().max())
        theirs.base_model.disable_adapter_layers()
        untouched = tiny_gpt(family)(tokens)
        assert (theirs(tokens).logits - untouched).abs().max() <= 1e-5 * max(1, untouched.abs().max())  # it left the base alone
        again = tiny_gpt(family)
        add(again, *opened(tmp_path, base))
        assert (again(tokens) - want).abs().max() <= 1e-5 * max(1, want.abs().max())


def test_a_copy_of_the_base_in_an_adapter_file_must_be_the_base(tmp_path: Path) -> None:
    """PEFT saves the whole head along when the head has LoRA: the same numbers are no fault, others are another base."""
    from peft import LoraConfig

    gpt = tiny_gpt("qwen2")
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["up_proj", "lm_head"])
    theirs = by_peft(config, transformers_model("qwen2", gpt), gpt.config, tmp_path)
    (copied,) = (name for name in theirs.tensors if ".base_layer." in name)
    add(tiny_gpt("qwen2"), theirs.tuning, theirs.tensors)
    theirs.tensors[copied][7, 3] += 0.5
    with pytest.raises(UserError, match="another base"):
        add(gpt, theirs.tuning, theirs.tensors)


# ---- learnt prompts --------------------------------------------------------------------------------------------------

SQUARE = {"head_dim": 10}  # H * D = C: PEFT counts the key and value heads by it
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", SQUARE),
    ("llama3", SQUARE),
    ("llama", {**SQUARE, "num_key_value_heads": 1, "mlp_bias": True}),
    ("mistral", SQUARE),
    ("smollm", SQUARE),
]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("family", "changes"), PROMPTS, ids=str)
def test_a_prompt_of_peft_computes_and_learns_the_same_here_and_goes_back(
    family: str, changes: dict[str, Any], layers: int, tmp_path: Path
) -> None:
    """PEFT's ADAPTION_PROMPT, with and without grouped heads. Must catch: prompts that are rotated; one softmax over prompt and text;
    the gate through a tanh; layers counted from below."""
    from peft import AdaptionPromptConfig

    gpt, tokens = tiny_gpt(family, **changes), random_tokens(2, 15)
    base, plain = gpt.config, transformers_model(family, gpt, **changes)
    untouched = gpt(tokens).detach()
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=layers)
    theirs = by_peft(config, plain, base, tmp_path / "theirs")
    assert theirs.tuning.in_peft
    attach(gpt, theirs.tuning, seed=1)
    load_tuned_state(gpt, theirs.tuning, theirs.tensors, tmp_path, base)
    want = theirs.model(tokens).logits
    assert (gpt(tokens) - want).abs().max() <= 1e-5 * max(1, want.abs().max())
    assert relative(untouched, want) > 0.01

    targets = some_graded(tokens)
    plain_loss(want, targets).backward()
    gpt(tokens, targets).backward()
    expected, names = theirs.gradients(), theirs.tuning.file_names(base)
    assert expected.keys() == names.keys() == theirs.tensors.keys()
    for stored, name in names.items():
        grad = gpt.get_parameter(name).grad
        assert grad is not None
        least = 0.1 if grad.numel() == 1 else 0.0  # a gate's is one sum, in which large numbers may cancel each other
        assert (grad - expected[stored]).norm() <= 2e-5 * max(least, expected[stored].norm()), name

    options = AdapterOptions(kind="prompt", length=4, layers=[f"last:{layers}"])
    shaken(gpt, 0.2)
    write(tmp_path / "ours", prompt_to_peft(options, len(theirs.tuning.slots), "base"), tuned_state(gpt, theirs.tuning, base))
    with torch.no_grad():
        want = gpt(tokens)
        loaded = in_peft(tmp_path / "ours", transformers_model(family, tiny_gpt(family, **changes), **changes))
        assert (loaded(tokens).logits - want).abs().max() <= 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize(("family", "changes"), [("llama_biased", SQUARE), ("llama", {}), ("qwen2", SQUARE), ("qwen3", SQUARE)], ids=str)
def test_a_prompt_is_not_written_for_peft_where_peft_computes_something_else(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """llama with biases: PEFT adds the output's bias a second time. H * D other than C: it counts the heads wrong, and fails.
    qwen: it knows no such model type. Should one of these begin to agree, `peft_prompts` is due for a look."""
    from peft import AdaptionPromptConfig, get_peft_model

    gpt, tokens = tiny_gpt(family, **changes), random_tokens(2, 15)
    base, tuning = gpt.config, tuning_of(AdapterOptions(kind="prompt", length=4), gpt.config)
    assert not tuning.in_peft
    attach(gpt, tuning, seed=1)
    shaken(gpt, 0.5)
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=3)
    theirs = transformers_model(family, tiny_gpt(family, **changes), **changes)
    if family.startswith("qwen"):
        with pytest.raises(ValueError, match="Unsupported model type"):
            get_peft_model(theirs, config)
        return
    wrapped = get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "adaption_" in name:
                parameter.copy_(gpt.get_parameter(name.removeprefix("base_model.model.").replace("adaption_", "prompt.adaption_")))
        if base.attention_out_bias:
            assert (wrapped(tokens).logits - gpt(tokens)).abs().max() > 1e-2
            for block in theirs.model.layers:  # the whole difference: with the bias taken off once they agree
                block.self_attn.register_forward_hook(lambda module, inputs, output: (output[0] - module.model.o_proj.bias, *output[1:]))
            want = gpt(tokens)
            assert (wrapped(tokens).logits - want).abs().max() <= 1e-5 * max(1, want.abs().max())
        else:
            with pytest.raises((ZeroDivisionError, RuntimeError)):
                wrapped(tokens)


def test_a_prompt_is_written_for_peft_only_where_its_config_can_say_it() -> None:
    """It knows the upper layers, all of one length, and nothing that is trained besides."""
    config = tiny_config("llama", **SQUARE)
    upper = AdapterOptions(kind="prompt", layers=["last:2"])
    assert tuning_of(upper, config).in_peft
    assert not tuning_of(replace(upper, layers=["0-1"]), config).in_peft
    assert not tuning_of(replace(upper, layers=["0", "2"]), config).in_peft
    assert not tuning_of(replace(upper, modules_to_save=["norm"]), config).in_peft
    assert not tuning_of(AdapterOptions(kind="series"), config).in_peft


class Letters:
    """A tokenizer of one letter per id, for conversations about nothing."""

    size = 131

    def decode(self, ids: list[int], **how: Any) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


def test_a_long_rope_changes_for_the_whole_text_once_it_outgrows_its_first_context() -> None:
    """M05: token by token as computed anew each time, across the border (24 tokens), and back in a shorter prompt. Must catch: keys of
    the short text kept; a long prompt's first part computed as a short text."""
    from litlora.generation import Conversation

    gpt, tokens = tiny_gpt("longrope"), random_tokens(1, 40)[0].tolist()
    talk = Conversation(gpt, Letters(), ())  # type: ignore[arg-type]

    def anew(length: int) -> Tensor:
        with torch.inference_mode():
            return gpt(torch.tensor([tokens[:length]]))[0, -1]

    assert (talk.prefill(tokens[:20]) - anew(20)).abs().max() <= 1e-5
    for length in range(21, 40):
        step = talk.step(torch.tensor(tokens[length - 1]), tokens[length - 1])
        assert (step - anew(length)).abs().max() <= 1e-5, length
    assert (talk.prefill(tokens[:22]) - anew(22)).abs().max() <= 1e-5
    assert talk.reused == 0
    assert (talk.prefill(tokens[:24]) - anew(24)).abs().max() <= 1e-5
    assert talk.reused == 22


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> tuple[GPT, dict[str, Any]]:
    """The real 3M model, read with nothing of ours but model.py and families.py, and what transformers said about it."""
    from safetensors.torch import load_file

    directory = shared_data("models/stories3m-llama")
    with torch.device("meta"):
        gpt = GPT(config_from_hf(json.loads((directory / "config.json").read_text()), directory / "config.json"))
    tensors = load_file(directory / "model.safetensors")
    gpt.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, assign=True)
    gpt.tie()
    return gpt.eval(), json.loads((directory / "reference.json").read_text())


def test_a_real_model_gives_the_recorded_logits_and_loss(stories: tuple[GPT, dict[str, Any]]) -> None:
    """M01 on stories3m-llama."""
    gpt, reference = stories
    with torch.no_grad():
        logits = gpt(torch.tensor([reference["prompt_ids"]]))[0, -1]
        text = torch.tensor([reference["text_ids"]])
        loss = gpt(text[:, :-1], text[:, 1:]) / (text.size(1) - 1)
    expected = torch.tensor(reference["last_logits"])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert float(loss) == pytest.approx(reference["text_mean_loss"], rel=1e-6)


def test_a_real_model_writes_the_recorded_story(stories: tuple[GPT, dict[str, Any]]) -> None:
    """M05 on stories3m-llama: 64 greedy tokens through the cache."""
    gpt, reference = stories
    cache, tokens, story = KVCache(128), torch.tensor([reference["prompt_ids"]]), []
    for _ in reference["greedy_ids"]:
        tokens = gpt(tokens, cache=cache)[:, -1:].argmax(-1)
        story.append(int(tokens))
    assert story == reference["greedy_ids"]


def test_the_tiny_models_are_unfriendly() -> None:
    """Shapes that agree by chance hide mistakes: the conventions of YARDSTICK's acceptance tests."""
    for family in FAMILIES:
        config = tiny_config(family)
        assert (config.num_attention_heads * config.head_dim != config.hidden_size) == (family != "stablelm")  # nothing else is one
        assert config.window(2) == (7 if family in ("mistral", "qwen2", "gemma3", "phi3") else None)


def test_a_real_model_is_read_from_its_directory() -> None:
    """`GPT.from_pretrained` gives the model that was put together by hand above."""
    reference = json.loads((shared_data("models/stories3m-llama") / "reference.json").read_text())
    gpt = GPT.from_pretrained(shared_data("models/stories3m-llama"))
    expected = torch.tensor(reference["last_logits"])
    with torch.no_grad():
        assert (gpt(torch.tensor([reference["prompt_ids"]]))[0, -1] - expected).abs().max() <= 1e-5 * expected.abs().max()
    rough = GPT.from_pretrained(shared_data("models/stories3m-llama"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in rough.parameters()} == {torch.bfloat16}
