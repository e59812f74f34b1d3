"""What every method of fine-tuning promises, whatever it does: one table of methods and variants, and each promise a test over it.

A method that METHODS has and the table lacks fails the first test.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY, EXPERTS, FAMILIES, MORE, gradients, random_tokens, relative, state_of, tiny_config, tiny_gpt
from equations import Plain, spoken
from torch import Tensor

from litlora.config import Config
from litlora.errors import UserError
from litlora.families import config_to_hf, expected_tensors, learns, linear_shapes, stored_name, tensor_name
from litlora.methods import METHODS, stored_tuning, tuning_of
from litlora.methods.attach import (
    add,
    as_base,
    attach,
    frozen_state,
    load_tuned_state,
    merge,
    remove,
    restored,
    trainable,
    tuned_state,
)
from litlora.methods.tuning import EMBEDDING, HEAD, Tuning, merged_config, why_unmergeable
from litlora.model import GPT, IGNORE, KVCache
from litlora.options import AdapterOptions, FreezeOptions, FullOptions, LoRAOptions, ProOptions
from litlora.peft.targets import match_targets, modules_of
from litlora.train.loop import of_any_expert

UNIT = ["gate_proj", "up_proj", "down_proj"]
BASES = ("llama_biased", "qwen2", "qwen3", "smollm")  # biases; some biases and sliding windows; norms of q and k; a tied head


@dataclass(frozen=True, kw_only=True)
class Case:
    """One variant of one method, and the bases that it is tried on."""

    options: Any  # in the words of Llama; `options_on` says them in a family's
    families: Sequence[str] = BASES
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the base's config.json
    drawn: bool = True  # whether its seed matters


UNTIED, TIED = ["llama_biased", "qwen2", "qwen3"], ["smollm"]
CASES = {
    "lora": Case(options=LoRAOptions(r=3, alpha=5.0)),
    "dora": Case(options=LoRAOptions(r=3, use_dora=True)),
    "rslora": Case(options=LoRAOptions(r=5, alpha=3.0, use_rslora=True)),
    "pissa": Case(options=LoRAOptions(r=3, init="pissa"), drawn=False),
    "orthogonal": Case(options=LoRAOptions(r=4, init="orthogonal")),
    "patterns": Case(
        options=LoRAOptions(r=4, rank_pattern=["down_proj=2", r"layers\.1\..*q_proj=3"], alpha_pattern=["up_proj=7"], layers=["1-2"])
    ),
    "saved": Case(options=LoRAOptions(r=3, modules_to_save=["embed_tokens", "norm"])),
    "head": Case(options=LoRAOptions(r=3, target_modules=["v_proj", "lm_head"]), families=UNTIED),
    "head-untied": Case(options=LoRAOptions(r=3, target_modules=["v_proj", "lm_head"], untie=True), families=TIED),
    "prompt": Case(options=AdapterOptions(kind="prompt", length=3, layers=["last:2"])),
    "scale-shift": Case(options=AdapterOptions(kind="scale_shift"), drawn=False),
    "scale-shift-some": Case(options=AdapterOptions(kind="scale_shift", target_modules=["k_proj"], norms=False), drawn=False),
    "series": Case(options=AdapterOptions(kind="series", width=5, activation="gelu", layers=["0", "2"])),
    "parallel": Case(options=AdapterOptions(kind="parallel", width=5, positions="mlp", activation="silu", modules_to_save=["norm"])),
    "pro": Case(options=ProOptions(n_insert=2), families=list(FAMILIES), drawn=False),
    "pro-positions": Case(options=ProOptions(positions=["0", "last:1"]), drawn=False),
    "pro-expanded": Case(options=ProOptions(), changes={"num_hidden_layers": 4, "llama_pro_layers": [1, 3]}, drawn=False),
    "pro-untied": Case(options=ProOptions(modules_to_save=["lm_head"], untie=True), families=TIED, drawn=False),
    "freeze": Case(
        options=FreezeOptions(layers=["last:1"], modules=["self_attn", "input_layernorm"], extra_modules=["norm", "lm_head"]), drawn=False
    ),
    "freeze-untied": Case(options=FreezeOptions(layers=[], extra_modules=["lm_head"], untie=True), families=TIED, drawn=False),
    "full": Case(options=FullOptions(), drawn=False),
    "experts": Case(options=LoRAOptions(r=3, target_modules=["all-linear", *UNIT]), families=["qwen3_moe"]),
    "experts-dora": Case(options=LoRAOptions(r=3, target_modules=UNIT, use_dora=True), families=["qwen3_moe"]),
    "experts-beside": Case(options=AdapterOptions(kind="parallel", width=5, positions="mlp"), families=["qwen3_moe"]),
    "experts-freeze": Case(options=FreezeOptions(layers=["last:1"], modules=["mlp"]), families=["qwen3_moe"], drawn=False),
    "experts-full": Case(options=FullOptions(), families=["qwen3_moe"], drawn=False),
}
ROUNDS_AT_FIRST = ("orthogonal", "dora")  # dora: where a bias is taken off and added again
Pairs = list[tuple[str, str]]


def tied_matters(case: Case) -> bool:
    tuning = tuning_of(case.options, tiny_config("smollm", **case.changes))
    return bool(tuning.whole) or tuning.untied


def said_on(config: Config) -> dict[str, str]:
    """What the modules of Llama that the options name are called by this family, with one more word in front where that would mean others
    too; the fused one for its parts, the first norm that there is for the first."""
    modules = modules_of([*expected_tensors(config), HEAD])
    short = [stored_name(name, config).rpartition(".")[2] for name in modules]
    said = {}
    for name in reversed(modules):  # the first of a name wins
        ours, word = name.rpartition(".")[2], stored_name(name, config)
        both = {other.rpartition(".")[2] for other, theirs in zip(modules, short, strict=True) if theirs == word.rpartition(".")[2]}
        said[ours] = ".".join(word.split(".")[-1 if len(both) == 1 else -2 :])
    if config.qkv != "apart":
        said |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), said["qkv_proj"])
    if config.mlp == "fused":
        said |= dict.fromkeys(("gate_proj", "up_proj"), said["gate_up_proj"])
    if config.kv_lora_rank:
        said |= dict.fromkeys(("k_proj", "v_proj"), said["kv_b_proj"]) | {"q_proj": said.get("q_b_proj", "q_proj")}
    first = next((name for name in config.norms.names if name in said), "norm")
    return {"input_layernorm": said.get(first, ""), "norm": ""} | said


def options_on(case: str, config: Config) -> Any:
    """The options of a case as somebody who fine-tunes this family would write them. (Norms without parameters are not named.)"""
    options, said = CASES[case].options, said_on(config)
    lists = {field.name: getattr(options, field.name) for field in fields(options) if isinstance(getattr(options, field.name), list)}
    spelt = {name: [re.sub("[a-z_]+", lambda word: said.get(word[0], word[0]), word) for word in words] for name, words in lists.items()}
    return replace(options, **{name: list(filter(None, dict.fromkeys(words))) for name, words in spelt.items()})


def all_linear(family: str) -> list[str]:
    config = tiny_config(family)
    linears = [stored_name(name, config) for name in linear_shapes(config)]
    return [tensor_name(name, config) for name in match_targets("all-linear", linears)]


def is_for(case: str, family: str) -> bool:
    """Whether a head of its own, or none, or experts, is what the case is about."""
    if case.startswith("experts"):
        return family in EXPERTS and (tiny_config(family).mlp != "stacked" or case not in ("experts", "experts-dora"))
    if case == "patterns" and "down_proj" not in {name.rpartition(".")[2] for name in all_linear(family)}:
        return False
    asks = {family in TIED for family in CASES[case].families}
    return len(asks) == 2 or asks == {tiny_config(family).tie_word_embeddings}


EVERYWHERE: Pairs = [(name, family) for name, case in CASES.items() for family in case.families]
SOMEWHERE: Pairs = [pair for pair in EVERYWHERE if pair[1] == "qwen2" or (pair[1] == "smollm" and tied_matters(CASES[pair[0]]))]
SAME = ("longrope", "dynamic", "pythia_serial", "stablelm_2", "olmo2", "falcon_2", "falcon_serial")  # but for what no method touches
WHOLE = ("patterns", "saved", "scale-shift", "parallel", "freeze", "full")  # names of modules, and parameters trained themselves
CHEAP: Pairs = [("full", "gemma2"), *((name, "phi") for name in WHOLE), *(("lora", family) for family in MORE if family not in SAME)]
ELSEWHERE = [  # every method on every family; on most of them when time is no matter
    pytest.param(name, family, marks=() if (name, family) in CHEAP else pytest.mark.slow)
    for name in CASES
    for family in EVERY
    if (name, family) not in SOMEWHERE and is_for(name, family)
]
ALSO = [case for case in ELSEWHERE if tuple(case.values) not in EVERYWHERE]
FIRST = [
    *SOMEWHERE,
    *(pytest.param(*case.values, marks=() if "pro" in case.values else case.marks) for case in ELSEWHERE),
]
everywhere, somewhere, at_first = (
    pytest.mark.parametrize(("case", "family"), pairs) for pairs in ([*EVERYWHERE, *ALSO], [*SOMEWHERE, *ELSEWHERE], FIRST)
)
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def base_of(case: str, family: str, dtype: torch.dtype = torch.float32) -> GPT:
    return tiny_gpt(family, **CASES[case].changes).to(dtype)


def fresh(case: str, family: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[GPT, Tuning, Config]:
    """A model with a new tuning on it, and its base's config."""
    model = base_of(case, family, dtype)
    config = model.config
    tuning = tuning_of(options_on(case, config), config)
    attach(model, tuning, seed=seed)
    return model, tuning, config


@torch.no_grad()
def learnt(model: GPT, seed: int = 5) -> GPT:
    """As after training: everything that learns has moved, by far more than rounding."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(case: str, family: str, dtype: torch.dtype = torch.float32, seed: int = 5) -> tuple[GPT, Tuning, dict[str, Tensor]]:
    """A model after training, what its file means, and what is in the file."""
    model, tuning, config = fresh(case, family, dtype)
    learnt(model, seed)
    stored = {name: tensor.clone() for name, tensor in tuned_state(model, tuning, config).items()}
    return model, stored_tuning(options_on(case, config), config), stored


def taught(tuning: Tuning, config: Config) -> set[str]:
    """All that is in its file but a router's correction, which goes along as it was."""
    return set(filter(learns, tuning.parameters(config)))


def copies(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    both = before.keys() & after.keys()
    return (before.keys() ^ after.keys()) | {name for name in both if not torch.equal(before[name], after[name])}


def graded(rows: int = 2, length: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T), a third of them not graded."""
    tokens = random_tokens(rows, length, seed)
    return tokens, tokens.roll(-1, 1).masked_fill(torch.arange(length) % 3 == 1, IGNORE)


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    return model(random_tokens(2, 13, seed=2))


def updates(model: GPT, steps: int, seed: int = 0) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for step in range(steps):
        model(*graded(seed=seed + step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_table_has_every_method_and_every_kind_of_adapter() -> None:
    """Whoever adds a method adds it here, and every promise below is asked of it."""
    assert {type(case.options) for case in CASES.values()} == {method.options for method in METHODS.values()}
    kinds = get_args(get_type_hints(AdapterOptions)["kind"])
    assert {case.options.kind for case in CASES.values() if isinstance(case.options, AdapterOptions)} == set(kinds)
    inits = get_args(get_type_hints(LoRAOptions)["init"])
    assert {case.options.init for case in CASES.values() if isinstance(case.options, LoRAOptions)} == set(inits)


# ---- before training -------------------------------------------------------------------------------------------------


@either_dtype
@at_first
def test_a_fresh_tuning_changes_nothing(case: str, family: str, dtype: torch.dtype) -> None:
    """N07, N08: the logits and the loss are the base's to the bit. Must catch: a gate, B or output projection that is not zero, an
    output bias that is copied, an embedding in fp32 that makes the whole model compute in fp32."""
    plain = base_of(case, family, dtype)
    model, *_ = fresh(case, family, dtype)
    before, after = logits(plain), logits(model)
    loss_before, loss_after = plain(*graded()).detach(), model(*graded()).detach()
    if case in ROUNDS_AT_FIRST:
        bound = 1e-5 if dtype == torch.float32 else 5e-2
        kept = 0.9 if dtype == torch.bfloat16 and family in EXPERTS else 1.0  # where two experts are as good as equal, rounding decides
        assert (after - before).float().abs().amax(-1).quantile(kept) <= bound * max(1, before.abs().max())
        assert relative(loss_after, loss_before) <= bound
        if case == "orthogonal" or any(name.endswith("proj.bias") for name, _ in plain.named_parameters()):
            return
    assert after.dtype == dtype
    assert torch.equal(after, before)
    assert torch.equal(loss_after, loss_before)


@somewhere
def test_attaching_renames_nothing_and_moves_nothing(case: str, family: str) -> None:
    """Names and values of the base; parameters that do not learn are the very same ones."""
    model = base_of(case, family)
    before, values, config = dict(model.named_parameters()), copies(model), model.config
    tuning = tuning_of(options_on(case, config), config)
    attach(model, tuning, seed=1)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], values[name]) for name in before)
    assert all(torch.equal(parameter, values[name]) for name, parameter in before.items())  # nor were the old ones written to
    assert all(after[name] is before[name] for name in before if name not in tuning.whole)
    new = set(after) - set(before)
    assert new <= set(tuning.parameters(config)) | ({"lm_head.weight"} if tuning.untied else set())
    assert all(any(f".{slot}." in f".{name}" for slot in ("adapter", "prompt", "inserted")) or name == "lm_head.weight" for name in new)


@somewhere
def test_what_learns_is_what_is_in_the_file(case: str, family: str) -> None:
    """A03, also of a step in the middle: the same names, and the very tensors that learn. Must catch: a base left unfrozen; a tied
    embedding that the file has under one of PEFT's two names only."""
    model, tuning, config = fresh(case, family)
    for _ in range(2):
        learning, saved = trainable(model), tuned_state(model, tuning, config)
        assert list(learning) == [name for name, _ in model.named_parameters() if name in taught(tuning, config)]
        assert set(learning) == taught(tuning, config)
        assert set(tuning.parameters(config)) == set(tuning.file_names(config).values())
        assert list(saved) == list(tuning.file_names(config))
        described = stored_tuning(options_on(case, config), config)
        assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == described.file_shapes(config)
        if case != "pissa":  # whose file has the start as well
            parameters = dict(model.named_parameters())
            assert all(saved[stored].data_ptr() == parameters[name].data_ptr() for stored, name in tuning.file_names(config).items())
        assert not any(tensor.requires_grad for tensor in saved.values())
        updates(model, 1)
    names = [name for name, own in tuning.file_names(config).items() if own == "model.embed_tokens.weight"]
    if case == "saved" and config.tie_word_embeddings:  # one matrix, under both the names that PEFT looks for
        assert names == [f"base_model.model.{stored_name(name, config)}" for name in (EMBEDDING, HEAD)]
    else:
        assert len(names) == ("model.embed_tokens.weight" in tuning.whole)


@somewhere
def test_the_seed_decides_and_torchs_own_random_state_does_not(case: str, family: str) -> None:
    """N17. Must catch: a draw from torch's global generator; a seed that is not used."""
    states = []
    for noise, seed in ((1, 1), (2, 1), (3, 2)):
        model = base_of(case, family)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        tuning = tuning_of(options_on(case, model.config), model.config)
        config = model.config
        attach(model, tuning, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        states.append({name: tensor.clone() for name, tensor in tuned_state(model, tuning, config).items()})
    first, again, other = states
    assert not differing(first, again)
    assert bool(differing(first, other)) == CASES[case].drawn or case == "pissa"  # its SVD is found with random vectors


# ---- while training --------------------------------------------------------------------------------------------------


@somewhere
def test_every_trained_tensor_has_a_gradient_by_the_second_update(case: str, family: str) -> None:
    """N07, N08: nothing that was declared to learn cannot. Must catch: both projections of an inserted block's MLP zero."""
    model, *_ = fresh(case, family)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    alive = set()
    for step in range(2):
        optimizer.zero_grad()
        model(*graded(seed=step)).backward()
        alive |= {name for name, parameter in trainable(model).items() if parameter.grad is not None and parameter.grad.any()}
        optimizer.step()
    assert set(map(of_any_expert, alive)) == set(map(of_any_expert, trainable(model)))  # two small batches do not reach every expert
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@somewhere
def test_validation_and_generation_in_the_middle_change_nothing_and_all_that_is_declared_learns(case: str, family: str) -> None:
    """N08, N07 (old blocks). Must catch: a prompt whose keys a validation pass cached, so that it never learns."""
    model, tuning, config = fresh(case, family)
    before, undisturbed = copies(model), fresh(case, family)[0]
    for steps in (2, 3):
        used(model)
        updates(model, steps)
        updates(undisturbed, steps)
    after = copies(model)
    assert not differing(after, copies(undisturbed))
    assert differing(before, after) == taught(tuning, config)
    assert torch.equal(logits(model), logits(undisturbed))
    assert not torch.equal(logits(model), logits(base_of(case, family)))


@torch.no_grad()
def used(model: GPT) -> None:
    """A validation pass and some cached decoding, as a run does between two updates."""
    model(*graded(seed=9))
    cache, tokens = KVCache(24, rows=2), random_tokens(2, 7)
    for _ in range(4):
        tokens = model(tokens, cache=cache)[:, -1:].argmax(-1)


@somewhere
def test_trained_weights_in_fp32_on_a_bf16_base_compute_in_bf16_and_learn_in_fp32(case: str, family: str) -> None:
    """Must catch: an embedding trained in fp32 from which on the whole stream is fp32; a gradient rounded to bf16."""
    model, *_ = fresh(case, family, torch.bfloat16)
    seen: set[torch.dtype] = set()
    for block in model.model.layers:
        last = [module for name, module in block.mlp.named_modules() if name.endswith("down_proj")]
        for part in (block, block.self_attn, block.mlp, *last, *([block.inserted] if block.inserted is not None else [])):
            part.register_forward_hook(lambda module, inputs, output: seen.update({inputs[0].dtype, output.dtype}))
    loss = model(*graded())
    loss.backward()
    assert loss.dtype == torch.float32
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in trainable(model).values() if parameter.grad is not None} == {torch.float32}
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {parameter.dtype for name, parameter in frozen.items() if learns(name)} <= {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    assert seen == {torch.bfloat16}


@somewhere
def test_no_gradient_is_computed_below_the_lowest_layer_that_learns(case: str, family: str) -> None:
    """What is frozen and lies below costs a forward pass and no more. Must catch: an x that requires grad from the start."""
    model, tuning, _ = fresh(case, family)
    entered: dict[str, bool] = {}
    for name, module in model.named_modules():
        if name.endswith(".inserted") or name.rpartition(".")[0] == "model.layers":
            module.register_forward_pre_hook(lambda module, inputs, name=name: entered.update({name: inputs[0].requires_grad}))
    model(*graded())
    layers = [int(name.split(".")[2]) for name in trainable(model) if name.startswith("model.layers.")]
    lowest = min(layers, default=len(model.model.layers))
    embeds = "model.embed_tokens.weight" in trainable(model)
    for layer in range(len(model.model.layers)):
        assert entered[f"model.layers.{layer}"] == (embeds or layer > lowest), layer
    if tuning.inserted:
        assert entered[f"model.layers.{lowest}.inserted"] == embeds


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "family"), [pair for pair in EVERYWHERE if pair[1] in BASES])
def test_logits_and_gradients_are_those_of_the_equations(case: str, family: str) -> None:
    """In fp64, against a model written in plain autograd. Must catch: a scale squared, a shift after the scale, prompts that are
    rotated, a parallel adapter that reads the stream before its norm, a gradient of Normed or Gated that forgets a term."""
    model, tuning, config = fresh(case, family, torch.float64)
    learnt(model)
    values = {name: parameter.detach().clone().requires_grad_(parameter.requires_grad) for name, parameter in model.named_parameters()}
    values |= frozen_state(model)
    plain = Plain(tuning.carrying(config), values, spoken(tuning, config, values))
    tokens, targets = graded()
    expected = plain.logits(tokens)
    assert relative(model(tokens), expected) <= 1e-10
    assert relative(expected, logits_of_base(case, family, tokens)) > 1e-3
    found = gradients(model, model(tokens, targets))
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    wanted = {name: tensor.grad for name, tensor in values.items() if tensor.requires_grad}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient is not None
        assert relative(found[name], gradient) <= 1e-9, name


def logits_of_base(case: str, family: str, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return base_of(case, family, torch.float64)(tokens)


@somewhere
def test_packed_samples_learn_what_separate_ones_do(case: str, family: str) -> None:
    """N09 and N10 with everything attached. Must catch: a prompt or a bottleneck that mixes samples, positions that go on."""
    model = learnt(fresh(case, family, torch.float64)[0])
    segments = [5, 9, 1, 8]
    tokens, targets = graded(rows=1, length=sum(segments))
    packed = model(tokens, targets, segments=segments)
    found = gradients(model, packed)
    alone: Any = sum(model(*piece) for piece in zip(tokens.split(segments, 1), targets.split(segments, 1), strict=True))
    assert relative(packed, alone) <= 1e-12
    wanted = gradients(model, alone)
    assert found.keys() == wanted.keys()
    least = 1e-3 * max(gradient.norm() for gradient in wanted.values())  # a shift of keys that do not turn has none but rounding's
    assert all((found[name] - gradient).norm() <= 1e-11 * max(gradient.norm(), least) for name, gradient in wanted.items())
    other = tokens.clone()
    other[0, : segments[0]] += 1
    with torch.no_grad():
        before, after = model(tokens, segments=segments), model(other, segments=segments)
    assert (before - after)[:, segments[0] :].abs().max() <= 1e-7
    assert not torch.equal(before[:, : segments[0]], after[:, : segments[0]])


@somewhere
@torch.no_grad()
def test_cached_decoding_equals_the_whole_at_once(case: str, family: str) -> None:
    """M05, M07 with everything attached, rows of unequal length. Must catch: an inserted block that shares its host's cache."""
    model = learnt(fresh(case, family, torch.float64)[0])
    lengths, more = (6, 11, 1), random_tokens(3, 9, seed=3)
    prompts = [random_tokens(1, n, seed=n) for n in lengths]
    cache = KVCache(24, rows=3)
    model(torch.cat([F.pad(prompt, (0, max(lengths) - prompt.size(1))) for prompt in prompts]), cache=cache)
    cache.rewind(lengths)
    parts = [model(more[:, :3], cache=cache), *(model(token, cache=cache) for token in more[:, 3:].split(1, 1))]
    for row, prompt in enumerate(prompts):
        whole = model(torch.cat((prompt, more[row : row + 1]), 1))[0, -9:]
        assert relative(torch.cat(parts, 1)[row], whole) <= 1e-12


# ---- saved and loaded ------------------------------------------------------------------------------------------------

STORED = [
    (*pair, dtype) for pair in SOMEWHERE for dtype in (torch.bfloat16, torch.float32) if dtype == torch.bfloat16 or pair[1] == "smollm"
] + [pytest.param(*case.values, torch.bfloat16, marks=case.marks) for case in ELSEWHERE]


@pytest.mark.parametrize(("case", "family", "dtype"), STORED, ids=str)
def test_saved_and_loaded_is_the_same_to_the_bit(case: str, family: str, dtype: torch.dtype) -> None:
    """A03: into a fresh one that goes on learning, and onto a plain base for use."""
    model, stored, tensors = trained(case, family, dtype)
    again, tuning, config = fresh(case, family, dtype, seed=7)
    load_tuned_state(again, tuning, tensors, "step", config)
    for name, tensor in frozen_state(model).items():
        assert relative(again.get_buffer(name), tensor) <= 1e-6
        again.get_buffer(name).copy_(tensor)  # what PiSSA's start loses to rounding goes with the training state
    assert not differing(copies(model), copies(again))
    assert torch.equal(logits(again), logits(model))
    assert trainable(again).keys() == trainable(model).keys()
    served = base_of(case, family, dtype)
    add(served, stored, tensors)
    assert torch.equal(logits(served), logits(model))
    assert served.config == stored.carrying(config)
    assert not any(parameter.requires_grad for name, parameter in served.named_parameters() if name in stored.parameters(config))
    assert {served.get_parameter(name).dtype for name in tuning.whole} <= {dtype}


@somewhere
def test_what_was_added_comes_off_without_a_trace(case: str, family: str) -> None:
    """Also a new block, replaced parameters and a separated head, and what learns; the very same Parameters are back."""
    _, stored, tensors = trained(case, family)
    model = base_of(case, family)
    before, parameters, config = logits(model), dict(model.named_parameters(remove_duplicate=False)), model.config

    def is_as_it_was() -> bool:
        now = dict(model.named_parameters(remove_duplicate=False))
        same = now.keys() == parameters.keys() and all(now[name] is parameters[name] for name in now)
        return same and model.config == config and model.model.dtype is None and torch.equal(logits(model), before)

    with restored(model):
        add(model, stored, tensors)
        assert not torch.equal(logits(model), before)
    assert is_as_it_was()
    add(model, stored, tensors)
    tuned = logits(model)
    with as_base(model):
        assert is_as_it_was()
    assert torch.equal(logits(model), tuned)
    with pytest.raises(ZeroDivisionError), as_base(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), tuned)
    remove(model)
    assert is_as_it_was()
    learning = tuning_of(options_on(case, config), config)
    attach(model, learning, seed=1)
    if not learning.whole:  # what is trained itself is not kept as it was
        learnt(model)
        with as_base(model):
            assert is_as_it_was()
        remove(model)
        assert is_as_it_was()


@somewhere
def test_a_refusal_leaves_the_model_as_it_was(case: str, family: str) -> None:
    """A01. Must catch: slots filled or parameters replaced one after the other, so that a refusal leaves half a tuning behind."""
    _, stored, tensors = trained(case, family)
    config = base_of(case, family).config
    lora = tuning_of(LoRAOptions(r=2, target_modules=[said_on(config)["o_proj"]]), config)
    learner = base_of(case, family)
    attach(learner, lora, seed=3)
    first = tuned_state(learnt(learner, seed=8), lora, config)
    last = list(tensors)[-1]
    faults: list[dict[str, Tensor]] = [
        {name: tensor for name, tensor in tensors.items() if name != last},
        tensors | {last: tensors[last].to(torch.int8)},
        tensors | {last: tensors[last].unsqueeze(0)},
        tensors | {"base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": torch.zeros(2)},
    ]
    for carried in (False, True):
        model = base_of(case, family)
        if carried:
            add(model, lora, first, 0.5)
        before, modules, values = logits(model), list(model.named_modules()), copies(model)
        for fault in faults:
            with pytest.raises(UserError) as refused:
                add(model, stored, fault, where="step-3/the-file")
            assert "step-3/the-file" in refused.value.report()
            assert list(model.named_modules()) == modules
            assert not differing(values, copies(model))
            assert model.config == config
            assert torch.equal(logits(model), before)


# ---- merged ----------------------------------------------------------------------------------------------------------


@everywhere
def test_merged_equals_unmerged_or_is_refused_with_the_reason(case: str, family: str) -> None:
    """N05 in fp64, where rounding hides nothing; the merged model is a plain one of the config that was foretold."""
    _, stored, tensors = trained(case, family, torch.float64)
    model = base_of(case, family, torch.float64)
    config = model.config
    add(model, stored, tensors)
    before, parameters = logits(model), dict(model.named_parameters())
    if why := why_unmergeable(stored, config):
        what = f"a {config.model_type} model has no place for the shifts" if case.startswith("scale-shift") else "computes more than"
        assert what in why
        with pytest.raises(UserError, match=what):
            merge(model)
        assert dict(model.named_parameters()) == parameters
        assert torch.equal(logits(model), before)
        assert case in ("prompt", "series", "parallel", "scale-shift", "scale-shift-some", "experts-beside")
        return
    merged = merge(model)
    assert merged.config == merged_config(stored, config)
    assert set(dict(merged.named_parameters())) == set(expected_tensors(merged.config))
    plain = GPT(merged.config).double()
    plain.load_state_dict(merged.state_dict(), strict=True)
    plain.tie()
    assert relative(logits(plain), before) <= 1e-10
    assert relative(logits(merged), before) <= 1e-10


EXPORTED: Pairs = [(name, "smollm") for name in ("scale-shift-some", "freeze-untied", "saved", "head-untied")]
EXPORTED += [("pro", family) for family in EVERY]


@pytest.mark.parametrize(("case", "family"), EXPORTED)
def test_a_merged_model_is_one_that_transformers_computes_alike(case: str, family: str) -> None:
    """N07, A04: what was exported. Must catch: a deeper model whose windows moved, a bias that config.json does not announce."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model, *_ = fresh(case, family)
    merged = merge(learnt(model))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_to_hf(merged.config), attn_implementation="eager")).eval()
    theirs.load_state_dict(state_of(merged), strict=True)
    with torch.no_grad():
        expected = theirs(random_tokens(2, 13, seed=2)).logits
    assert (logits(merged) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
