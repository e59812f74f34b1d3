"""Merging what is not LoRA alone: scales and shifts, tensors trained whole, inserted blocks, a head of its own. The oracle is fp64."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import checkpoint_samples as samples
import numpy as np
import pytest
import torch
from conftest import FAMILIES, random_tokens, tiny_hf_config
from test_merge import as_dtype, assert_nothing_was_written, half_unit, make_base, merged, read, tree_hash

from litlora import peft
from litlora.checkpoint import commit_step, names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import Tensors
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import load_model
from litlora.errors import UserError, WorkError
from litlora.families import config_from_hf, expected_tensors, tensor_name
from litlora.merge import MergeOverflow, merge, prepare
from litlora.methods import METHODS, from_peft, lora_config
from litlora.methods.tuning import EMBEDDING, HEAD, LoRASlot, ScaleShiftSlot, Tuning, merged_config
from litlora.options import AdapterOptions, FreezeOptions, LoRAOptions, ProOptions
from litlora.safetensors_file import SafetensorsFile, write_safetensors
from litlora.verify import compare_logits, prove, reread

Options = AdapterOptions | FreezeOptions | LoRAOptions | ProOptions
METHOD = {AdapterOptions: "adapter", FreezeOptions: "freeze", LoRAOptions: "lora", ProOptions: "pro"}


def scale_shift(**more: Any) -> AdapterOptions:
    return AdapterOptions(kind="scale_shift", **more)


# name -> the base's family, and what was trained on it
CASES: dict[str, tuple[str, Options]] = {
    "scale and shift": ("llama", scale_shift()),
    "scale and shift where biases are": ("llama_biased", scale_shift(layers=["1-2"], norms=False)),
    "scale and shift of one kind": ("qwen3", scale_shift(target_modules=["v_proj"], norms=False, modules_to_save=["embed_tokens"])),
    "scale and shift of q, k, v": ("qwen2", scale_shift(target_modules=["q_proj", "k_proj", "v_proj"])),
    "blocks": ("llama3", ProOptions(n_insert=2)),
    "blocks with biases": ("llama_biased", ProOptions(positions=["0"], modules_to_save=["norm", "q_proj"])),
    "blocks between layers of two types": ("qwen2", ProOptions(positions=["0", "2"])),
    "a block after each": ("mistral", ProOptions(n_insert=3, modules_to_save=["lm_head"])),
    "blocks and a shared head": ("smollm", ProOptions(n_insert=1, modules_to_save=["embed_tokens"])),
    "blocks and a separate head": ("smollm", ProOptions(n_insert=1, modules_to_save=["lm_head"], untie=True)),
    "layers": ("qwen3", FreezeOptions(extra_modules=["norm", "lm_head"])),
    "a shared head": ("smollm", FreezeOptions(layers=["0"], modules=["mlp"], extra_modules=["embed_tokens"])),
    "LoRA and a shared head": ("smollm", LoRAOptions(r=3, alpha=5, modules_to_save=["lm_head"])),
    "LoRA and a separate head": ("smollm", LoRAOptions(r=3, alpha=5, modules_to_save=["lm_head"], untie=True)),
    "LoRA and a separate embedding": ("smollm", LoRAOptions(r=3, alpha=5, modules_to_save=["embed_tokens"], untie=True)),
    "LoRA on a separate head": ("smollm", LoRAOptions(r=3, alpha=5, target_modules=["q_proj", "lm_head"], untie=True)),
    "DoRA and norms": ("mistral", LoRAOptions(r=3, alpha=5, use_dora=True, modules_to_save=["input_layernorm", "embed_tokens"])),
}
UNTYING = [name for name, (_, options) in CASES.items() if options.untie]


# ---- samples ---------------------------------------------------------------------------------------------------------


def base_of(path: Path, family: str, dtype: str = "F32", **more: Any) -> Path:
    return make_base(path, dtype, **{**tiny_hf_config(family), **more})


def tuning_of(options: Options, base: Path) -> Tuning:
    config = Checkpoint(base, "base").config()
    if isinstance(options, LoRAOptions):
        return from_peft(lora_config(options, config), config, untied=options.untie)
    return METHODS[METHOD[type(options)]].tuning(options, config)


def trained(options: Options, base: Path, size: float = 0.1) -> Tensors:
    """What training might have left: what a fresh tuning holds, and noise of `size` times a weight's own on it."""
    config, tuning, random = Checkpoint(base, "base").config(), tuning_of(options, base), np.random.default_rng(3)
    start = {tensor_name(name): values for name, (_, values, _) in read(base).items()}
    if HEAD not in start:
        start[HEAD] = start[EMBEDDING]
    drawn: dict[str, np.ndarray] = {}
    for name, shape in tuning.parameters(config).items():
        noise = random.normal(size=shape)
        part = name.rpartition(".")[2]
        whole = start.get(name.replace(".inserted.", "."))
        if part in ("scale", "shift", "lora_A", "lora_B"):
            drawn[name] = (part == "scale") + noise * size
        elif part == "magnitude":
            drawn[name] = 2 + np.abs(noise)
        else:
            assert whole is not None
            drawn[name] = whole + noise * size * 0.3
    return {stored: ("F32", drawn[name].shape, drawn[name].astype(np.float32)) for stored, name in tuning.file_names(config).items()}


def step_of(run: Path, base: Path, options: Options, tensors: Tensors | None = None) -> Path:
    """A committed step, as training would write it."""
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(base, "base")
    files = {}
    if isinstance(options, LoRAOptions):
        described = peft.adapter_config_to_peft(lora_config(options, checkpoint.config(), str(base.resolve())))
        files[names.ADAPTER_CONFIG] = json.dumps(described).encode()
    manifest = samples.manifest_of(100, checkpoint.record(run), method=METHOD[type(options)], options=asdict(options))
    place = names.ADAPTER_WEIGHTS if tuning_of(options, base).in_peft else names.OWN_ADAPTER_WEIGHTS
    return commit_step(run, manifest, tensors={place: tensors or trained(options, base)}, files=files)


def case(tmp_path: Path, name: str, dtype: str = "F32", **more: Any) -> tuple[Path, Path]:
    """A base and a step on it."""
    family, options = CASES[name]
    base = base_of(tmp_path / "base", family, dtype, **more)
    return base, step_of(tmp_path / "run", base, options)


def exact(step: Path, base: Path) -> dict[str, tuple[np.ndarray, np.ndarray | float]]:
    """Tensor of the merged model -> its value in fp64, and how far fp32 arithmetic may be from it before the one rounding."""
    checkpoint = resolve(step)
    tuning, config = checkpoint.tuning(), checkpoint.config()
    with SafetensorsFile(checkpoint.adapter_file()) as file:
        saved = {parameter: file.float32(name).astype(np.float64) for name, parameter in tuning.file_names(config).items()}
    model: dict[str, np.ndarray] = {tensor_name(name): values for name, (_, values, _) in read(base).items()}
    if tuning.untied:
        model[HEAD] = model[EMBEDDING]
    model |= {name: values for name, values in saved.items() if name in tuning.whole or ".inserted." in name}
    errors: dict[str, np.ndarray | float] = {}
    for slot, kind in tuning.slots.items():
        module = slot.removesuffix(".adapter")
        weight = model[f"{module}.weight"]
        if isinstance(kind, ScaleShiftSlot):
            scale, shift = saved[f"{slot}.scale"], saved[f"{slot}.shift"]
            bias = model.get(f"{module}.bias", np.zeros_like(shift))
            model |= {f"{module}.weight": scale[:, None] * weight, f"{module}.bias": scale * (bias + shift)}
            errors[f"{module}.weight"] = 2.0**-24 * np.abs(scale[:, None] * weight)
            errors[f"{module}.bias"] = 2.0**-23 * np.abs(scale) * (np.abs(bias) + np.abs(shift))
            continue
        assert isinstance(kind, LoRASlot)
        a, b, factor = saved[f"{slot}.lora_A"], saved[f"{slot}.lora_B"], kind.alpha / (kind.r**0.5 if kind.use_rslora else kind.r)
        result = weight + factor * b @ a
        error = (kind.r + 2) * 2.0**-24 * (np.abs(weight) + factor * np.abs(b) @ np.abs(a))
        if kind.use_dora:
            length = np.linalg.norm(result, axis=1, keepdims=True)
            gain = saved[f"{slot}.magnitude"][:, None] / length
            result, error = (
                result * gain,
                np.abs(gain) * error + (np.linalg.norm(error, axis=1, keepdims=True) / length + 2.0**-20) * np.abs(result * gain),
            )
        model[f"{module}.weight"], errors[f"{module}.weight"] = result, error
    for name, shape in expected_tensors(replace(merged_config(tuning, config), num_hidden_layers=config.num_hidden_layers)).items():
        model.setdefault(name, np.zeros(shape))  # biases that nothing gives
    line = [(f"model.layers.{layer}.", f"model.layers.{layer}.inserted.") for layer in range(config.num_hidden_layers)]
    blocks = [start for own, inserted in line for start in (own, inserted) if any(name.startswith(start) for name in model)]
    found: dict[str, tuple[np.ndarray, np.ndarray | float]] = {}
    for name, values in model.items():
        start = next(
            (start for start in reversed(blocks) if name.startswith(start) and (".inserted." in name) == (".inserted." in start)), ""
        )
        new = f"model.layers.{blocks.index(start)}.{name.removeprefix(start)}" if start else name
        found[new] = values, errors.get(name, 0.0)
    return found


# ---- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", CASES)
def test_every_element_of_every_method_is_exact_and_rounded_once(tmp_path: Path, name: str, dtype: str) -> None:
    """N04, A04. (Mutations seen to fail: the shift added after scaling; a shared head's second copy left as it was; a new block in its
    layer's place; whole tensors rounded to bf16 first; a separate head taken from the trained embedding; missing biases not written.)"""
    base, step = case(tmp_path, name, dtype)
    before, after, oracle = read(base), read(merged(step)), exact(step, base)
    assert after.keys() == oracle.keys() == expected_tensors(merged_config(resolve(step).tuning(), resolve(step).config())).keys()
    kept = {raw for _, _, raw in before.values()}
    for tensor, (stored, values, raw) in after.items():
        result, error = oracle[tensor]
        assert stored == dtype
        assert values.shape == result.shape
        excess = np.abs(values - result) / (half_unit(values, dtype) + error)
        assert excess.max() <= 1, f"{tensor}: {excess.max()} of what is allowed"
        if np.any([np.array_equal(result, old) for _, old, _ in before.values() if old.shape == result.shape]):
            assert raw in kept, f"{tensor} was not touched and changed"
    assert sum(raw in kept for _, _, raw in after.values()) < len(after), "the sample trains nothing"


@pytest.mark.parametrize("name", CASES)
def test_merged_logits_are_those_of_the_step(tmp_path: Path, name: str) -> None:
    """N05, N07, A04, A07: in litlora, and in transformers, which finds every tensor it looks for and no other."""
    transformers = pytest.importorskip("transformers")
    base, step = case(tmp_path, name)
    out = merged(step)
    found = compare_logits(resolve(step), resolve(out))
    assert found["largest_difference"] <= found["bound"], found
    tokens = random_tokens(2, 20)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    with torch.inference_mode():
        theirs, ours, of_base = model.eval()(tokens).logits, load_model(resolve(step))(tokens), load_model(resolve(base))(tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, float(ours.abs().max()))
    assert (ours - of_base).abs().max() > 1e-3, "the sample's training moves nothing"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("name", CASES)
def test_coarse_dtypes_cost_no_more_than_they_must(tmp_path: Path, name: str, dtype: str) -> None:
    """N05: what `--verify full` would refuse."""
    _, step = case(tmp_path, name, dtype)
    found = prove(resolve(step), merged(step))
    assert found["largest_difference"] <= found["bound"]
    assert found["kl"] <= found["kl_bound"]


@pytest.mark.parametrize("name", ["scale and shift", "blocks with biases", "blocks and a separate head", "layers"])
def test_the_dtype_may_change_on_the_way(tmp_path: Path, name: str) -> None:
    """N04: new tensors take the whole model's dtype too."""
    base, step = case(tmp_path, name, "BF16")
    out = merged(step, dtype="float32")
    oracle = exact(step, base)
    for tensor, (stored, values, _) in read(out).items():
        result, error = oracle[tensor]
        assert stored == "F32"
        assert (np.abs(values - result) <= half_unit(values, "F32") + error).all(), tensor
    assert json.loads((out / names.CONFIG).read_text())["torch_dtype"] == "float32"


def test_rows_and_blocks_of_rows_join_without_a_seam(tmp_path: Path) -> None:
    """N04: tensors that take several blocks of memory, whole ones and scaled ones. (Mutation: every block reads the adapter's first.)"""
    shape = {"hidden_size": 296, "intermediate_size": 2803, "vocab_size": 2551, "num_hidden_layers": 1}
    base = base_of(tmp_path / "base", "llama", "BF16", **shape)
    step = step_of(tmp_path / "run", base, scale_shift(target_modules=["up_proj", "down_proj"], modules_to_save=["embed_tokens"]))
    oracle = exact(step, base)
    for tensor, (_, values, _) in read(merged(step)).items():
        result, error = oracle[tensor]
        assert (np.abs(values - result) <= half_unit(values, "BF16") + error).all(), tensor


# ---- names, files, config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_deeper_models_config_says_what_it_is(tmp_path: Path, family: str) -> None:
    """N07, A07: every key of the base's config.json that need not change stays."""
    base = base_of(tmp_path / "base", family, our_own_key=[1, {"two": 3}])
    step = step_of(tmp_path / "run", base, ProOptions(positions=["1"]))
    before, after = (json.loads((place / names.CONFIG).read_text()) for place in (base, merged(step)))
    changed = {key for key in after if key not in before or after[key] != before[key]}
    assert before.keys() <= after.keys()
    kinds = {"layer_types", "max_window_layers", "no_rope_layers", "mlp_only_layers", "decoder_sparse_step"}
    assert changed <= {"num_hidden_layers", "llama_pro_layers"} | kinds
    assert (after["num_hidden_layers"], after["llama_pro_layers"]) == (4, [2])
    first, deeper = (config_from_hf(values, "config") for values in (before, after))
    assert [deeper.window(layer) for layer in range(4)] == [first.window(layer) for layer in (0, 1, 1, 2)]


@pytest.mark.parametrize("name", ["scale and shift", "blocks between layers of two types", *UNTYING])
def test_a_sharded_base_stays_sharded(tmp_path: Path, name: str) -> None:
    """A07: what is new lies in the file of what it follows, and the index knows it. (Mutation: the base's index copied.)"""
    base, step = case(tmp_path, name, shards=3)
    index = json.loads((base / names.WEIGHTS_INDEX).read_text())
    (base / names.WEIGHTS_INDEX).write_text(json.dumps({**index, "metadata": {"total_parameters": 5, "total_size": 20}}))
    out = merged(step)
    values = json.loads((out / names.WEIGHTS_INDEX).read_text())
    found = {tensor: path.name for path in out.glob("*.safetensors") for tensor in SafetensorsFile(path).tensors}
    assert values["weight_map"] == found
    assert values["metadata"] == {"total_size": sum(len(raw) for _, _, raw in read(out).values())}
    assert set(found.values()) == {path.name for path in base.glob("*.safetensors")}
    if name == "blocks between layers of two types":
        old = index["weight_map"]
        for new, layer in ((1, 0), (4, 2)):
            assert all(found[tensor.replace(f".{layer}.", f".{new}.", 1)] == old[tensor] for tensor in old if f"layers.{layer}." in tensor)
    assert reread(out) == []
    report = prove(resolve(step), out)
    assert report["tensors"] == len(found)


def test_files_that_get_nothing_new_keep_their_header(tmp_path: Path) -> None:
    """N04: a head of its own changes one file of three."""
    base, step = case(tmp_path, "LoRA on a separate head", shards=3)
    out = merged(step)
    same = [SafetensorsFile(path).header() == SafetensorsFile(out / path.name).header() for path in sorted(base.glob("*.safetensors"))]
    assert sorted(same) == [False, True, True]


@pytest.mark.parametrize("name", ["blocks and a shared head", "blocks and a separate head", "LoRA on a separate head", "a shared head"])
def test_names_without_their_prefix_become_whole_where_a_tensor_is_new(tmp_path: Path, name: str) -> None:
    """A07: a reader that puts the missing `model.` before every name would lose the head. (Mutation: the base's names kept.)"""
    transformers = pytest.importorskip("transformers")
    family, options = CASES[name]
    values = tiny_hf_config(family)
    tensors = as_dtype(samples.base_tensors(**values), "F32", 0.3)
    base = samples.make_base(tmp_path / "base", tensors={tensor.removeprefix("model."): one for tensor, one in tensors.items()}, **values)
    (base / names.TOKENIZER).unlink()
    step = step_of(tmp_path / "run", base, options)
    out = merged(step)
    found = set(read(out))
    new = name != "a shared head"
    assert found == ({*exact(step, base)} if new else set(read(base)))
    model, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    assert not told["missing_keys"]
    tokens = random_tokens(1, 20)
    with torch.inference_mode():
        theirs, ours = model.eval()(tokens).logits, load_model(resolve(step))(tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, float(ours.abs().max()))


def with_copy_of_the_head(base: Path, change: float = 0.0) -> Path:
    """Some models hold the matrix that embedding and head share under both names."""
    tensors: dict[str, Any] = {name: (dtype, values.shape, raw) for name, (dtype, values, raw) in read(base).items()}
    dtype, shape, raw = tensors[EMBEDDING]
    copied = np.frombuffer(raw, np.float32).copy()
    copied[-1] += change
    write_safetensors(base / names.WEIGHTS, {**tensors, HEAD: (dtype, shape, copied)}, {"format": "pt"})
    return base


@pytest.mark.parametrize("name", ["a shared head", "LoRA and a shared head", *UNTYING])
def test_a_shared_head_that_is_stored_twice_changes_twice(tmp_path: Path, name: str) -> None:
    """A04: else the merged model would be refused, or be two models. (Mutation: the copy left as it was.)"""
    family, options = CASES[name]
    base = with_copy_of_the_head(base_of(tmp_path / "base", family))
    step = step_of(tmp_path / "run", base, options)
    out = merged(step)
    after = read(out)
    assert (after[HEAD][2] == after[EMBEDDING][2]) == (name not in UNTYING)
    found = compare_logits(resolve(step), resolve(out))
    assert found["largest_difference"] <= found["bound"], found


def test_a_copy_of_the_head_that_differs_is_refused(tmp_path: Path) -> None:
    """A04."""
    family, options = CASES["a shared head"]
    base = with_copy_of_the_head(base_of(tmp_path / "base", family), 0.5)
    step = step_of(tmp_path / "run", base, options)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        prepare(resolve(step))


def test_tensors_that_no_model_reads_move_with_their_layer(tmp_path: Path) -> None:
    """Old Llamas store their rotary frequencies, in every layer."""
    values = tiny_hf_config("llama")
    tensors = as_dtype(samples.base_tensors(**values), "BF16", 0.3)
    derived = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ("F32", (6,), np.full(6, i, np.float32)) for i in range(3)}
    base = samples.make_base(tmp_path / "base", tensors={**tensors, **derived}, **values)
    (base / names.TOKENIZER).unlink()
    after = read(merged(step_of(tmp_path / "run", base, ProOptions(positions=["0"]))))
    found = {name: (dtype, found[0]) for name, (dtype, found, _) in after.items() if "inv_freq" in name}
    assert found == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ("F32", j) for i, j in ((0, 0), (2, 1), (3, 2))}


@pytest.mark.parametrize("name", ["scale and shift", "blocks with biases", "LoRA on a separate head", "layers"])
def test_merging_any_method_twice_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    """A05."""
    base, step = case(tmp_path, name, "BF16", shards=2)
    untouched = tree_hash(base), tree_hash(step)
    first, second = merged(step, tmp_path / "one"), merged(step, tmp_path / "two")
    assert tree_hash(first) == tree_hash(second)
    assert (tree_hash(base), tree_hash(step)) == untouched, "base or step was written to"


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_tells_what_is_new(tmp_path: Path) -> None:
    """DESIGN 6: equal or not, the size is explained; the fingerprints are those that the resolver finds."""
    base, step = case(tmp_path, "blocks and a separate head")
    out = merged(step)
    report, card = json.loads((out / names.MERGE_REPORT).read_text()), (out / names.README).read_text()
    own = len(read(base))
    assert report["adapter"]["method"] == "pro"
    assert report["tensors"] == {"changed": 0, "converted": 0, "copied": own, "new": 10}
    assert report["new_layers"] == [3]
    assert report["size"] == f"{report['merged']['bytes'] / report['base']['bytes']:.2f} times the base: 1 block was inserted; " \
        "the head was separated from the embedding"  # fmt: skip
    assert report["modules"].keys() == {"lm_head"}
    assert report["base"]["fingerprint"] == resolve(base).fingerprint()
    assert report["merged"]["fingerprint"] == resolve(out).fingerprint()
    assert "1 new block (LLaMA-Pro) and 1 tensor trained whole" in card
    assert "LoRA" not in card


def test_the_report_measures_whole_tensors_and_scaled_modules(tmp_path: Path) -> None:
    """DESIGN 6, against fp64; a module's weight and bias together."""
    base, step = case(tmp_path, "scale and shift of one kind", "BF16")
    out = merged(step)
    report, before, after, oracle = json.loads((out / names.MERGE_REPORT).read_text()), read(base), read(out), exact(step, base)
    assert report["adapter"]["method"] == "adapter"
    assert report["tensors"]["changed"] == 2 * 3 + 1
    assert report["tensors"]["new"] == 0
    assert report["size"].startswith("as large as the base")
    assert report["modules"].keys() == {"model.embed_tokens", *(f"model.layers.{i}.self_attn.v_proj" for i in range(3))}
    for module, told in report["modules"].items():
        parts = [name for name in before if name.rpartition(".")[0] == module]
        weight, update, lost = (
            np.concatenate([values.ravel() for values in of])
            for of in (
                [before[name][1] for name in parts],
                [oracle[name][0] - before[name][1] for name in parts],
                [oracle[name][0] - after[name][1] for name in parts],
            )
        )
        assert told["relative_norm"] == pytest.approx(np.linalg.norm(update) / np.linalg.norm(weight), rel=2e-3)
        assert told["lost_to_rounding"] == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(update), rel=2e-3)


def test_added_biases_are_counted_and_explained(tmp_path: Path) -> None:
    """DESIGN 6: the merged model needs biases where nothing was trained, too."""
    base = base_of(tmp_path / "base", "llama")
    out = merged(step_of(tmp_path / "run", base, scale_shift(target_modules=["down_proj"], norms=False)))
    report = json.loads((out / names.MERGE_REPORT).read_text())
    assert "9 biases were added" in report["size"]
    assert report["tensors"]["new"] == 9
    assert json.loads((out / names.CONFIG).read_text())["mlp_bias"] is True
    after = read(out)
    assert not any(after[f"model.layers.{i}.mlp.{kind}_proj.bias"][1].any() for i in range(3) for kind in ("gate", "up"))


def test_a_module_that_was_zero_has_no_relative_norm(tmp_path: Path) -> None:
    """A report is JSON, which has no infinity: the blocks that `litlora expand` made begin at zero."""
    values = tiny_hf_config("llama", llama_pro_layers=[2])
    tensors = as_dtype(samples.base_tensors(**values), "F32", 0.3)
    last = "model.layers.2.mlp.down_proj.weight"
    tensors[last] = ("F32", tensors[last][1], np.zeros(tensors[last][1], np.float32))
    base = samples.make_base(tmp_path / "base", tensors=tensors, **values)
    (base / names.TOKENIZER).unlink()
    step = step_of(tmp_path / "run", base, ProOptions())
    report = json.loads((merged(step) / names.MERGE_REPORT).read_text(), parse_constant=lambda word: pytest.fail(word))
    assert report["modules"]["model.layers.2.mlp.down_proj"]["relative_norm"] is None
    assert report["update_relative_norm"] > 0
    assert report["new_layers"] == []


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("llama", AdapterOptions(kind="parallel", width=4), "a bottleneck with an activation"),
        ("llama", AdapterOptions(kind="prompt", length=3), "a learnt prompt"),
        ("qwen2", scale_shift(), "a qwen2 model has no place for the shifts"),
        ("mistral", scale_shift(target_modules=["q_proj"]), "a mistral model has no place for the shifts"),
    ],
)
def test_what_no_weights_can_hold_is_refused_with_the_way_to_use_it(tmp_path: Path, family: str, options: Options, why: str) -> None:
    """DESIGN 5."""
    base = base_of(tmp_path / "base", family)
    shapes = tuning_of(options, base).file_shapes(Checkpoint(base, "base").config())
    step = step_of(tmp_path / "run", base, options, {name: ("F32", shape, np.ones(shape, np.float32)) for name, shape in shapes.items()})
    with pytest.raises(UserError, match=f"cannot be merged: {why}") as caught:
        prepare(resolve(step))
    assert f"litlora chat {step}" in caught.value.hint
    assert_nothing_was_written(step)


def altered(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None], dtype: str = "F32") -> Path:
    family, options = CASES[name]
    base = base_of(tmp_path / "base", family, dtype)
    tensors = dict(trained(options, base))
    change(tensors)
    return step_of(tmp_path / "run", base, options, tensors)


@pytest.mark.parametrize("name", ["scale and shift", "blocks", "layers", "LoRA and a separate head"])
def test_every_tensor_at_fault_is_named_whatever_the_method(tmp_path: Path, name: str) -> None:
    """A01."""
    wrong: list[str] = []

    def change(tensors: dict[str, Any]) -> None:
        missing, odd, *_ = tensors
        del tensors[missing]
        tensors[odd] = ("F32", (2, 2), np.ones((2, 2), np.float32))
        tensors["left.over.weight"] = ("F32", (1,), np.ones(1, np.float32))
        wrong.extend([missing, odd, "left.over.weight"])

    step = altered(tmp_path, name, change)
    with pytest.raises(UserError) as caught:
        prepare(resolve(step))
    assert all(tensor in str(caught.value) for tensor in wrong)
    assert_nothing_was_written(step)


@pytest.mark.parametrize("name", ["scale and shift", "blocks", "layers"])
def test_values_that_are_not_finite_or_no_numbers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """Promise 12."""
    last: list[str] = []

    def spoil(value: float, dtype: str) -> Callable[[dict[str, Any]], None]:
        def change(tensors: dict[str, Any]) -> None:
            last.append([*tensors][-1])
            _, shape, raw = tensors[last[-1]]
            raw.reshape(-1)[-1] = value
            tensors[last[-1]] = (dtype, shape, raw)

        return change

    for place, change, told in (("a", spoil(np.nan, "F32"), "not finite"), ("b", spoil(0, "I32"), "no floating-point numbers")):
        step = altered(tmp_path / place, name, change)
        with pytest.raises(UserError, match=told) as caught:
            prepare(resolve(step))
        assert last[-1] in str(caught.value)


def as_fresh(options: Options, base: Path) -> Tensors:
    """What a tuning holds before training."""
    tensors = dict(trained(options, base, size=0.0))
    for name, (dtype, shape, _) in tensors.items():
        if ".inserted." in name and any(last in name for last in ("o_proj", "down_proj")):
            tensors[name] = (dtype, shape, np.zeros(shape, np.float32))
        elif "lora_A" in name:
            tensors[name] = (dtype, shape, np.ones(shape, np.float32))
    return tensors


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("scale and shift", "every scale is 1 and every shift 0; what was trained whole equals the base"),
        ("blocks with biases", "what was trained whole equals the base; the new blocks add zero"),
        ("layers", "what was trained whole equals the base"),
        ("LoRA and a separate head", "every lora_B is zero; what was trained whole equals the base"),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_training_that_changed_nothing_is_refused(tmp_path: Path, name: str, why: str, dtype: str) -> None:
    """DESIGN 6. (Mutations: an untrained block counts as a change; equality by bytes, which a base in bf16 never has.)"""
    family, options = CASES[name]
    base = base_of(tmp_path / "base", family, dtype)
    step = step_of(tmp_path / "run", base, options, as_fresh(options, base))
    with pytest.raises(UserError, match=why):
        prepare(resolve(step))
    assert_nothing_was_written(step)


def test_one_trained_number_is_a_change(tmp_path: Path) -> None:
    """The bias of a new block's last projection, and nothing else."""
    family, options = CASES["blocks with biases"]
    base = base_of(tmp_path / "base", family)
    tensors = dict(as_fresh(options, base))
    tensors["model.layers.0.inserted.mlp.down_proj.bias"][2][-1] = 1.0
    merge(prepare(resolve(step_of(tmp_path / "run", base, options, tensors))))


@pytest.mark.parametrize("name", ["layers", "blocks with biases"])
def test_a_change_that_rounding_takes_away_is_refused(tmp_path: Path, name: str) -> None:
    """DESIGN 6: also where layers were renumbered, and hashes cannot be compared. (Mutation: hashes compared.)"""
    family, options = CASES[name]
    base = base_of(tmp_path / "base", family, "BF16")
    tensors = {name: (d, s, np.asarray(raw) * np.float32(1 + 1e-6)) for name, (d, s, raw) in as_fresh(options, base).items()}
    step = step_of(tmp_path / "run", base, options, tensors)
    with pytest.raises(WorkError, match="rounding"):
        merge(prepare(resolve(step)))
    assert_nothing_was_written(step)
    merge(prepare(resolve(step), tmp_path / "wide", dtype="float32"))


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("scale and shift", "mlp.up_proj.adapter.scale"),
        ("scale and shift", "self_attn.o_proj.adapter.shift"),
        ("blocks", "inserted.self_attn.k_proj.weight"),
        ("layers", "post_attention_layernorm.weight"),
    ],
)
def test_whatever_overflows_fp16_is_named(tmp_path: Path, name: str, end: str) -> None:
    """N05: biases, new blocks and whole tensors too."""

    def change(tensors: dict[str, Any]) -> None:
        chosen = next(tensor for tensor in tensors if tensor.endswith(end))
        tensors[chosen][2].reshape(-1)[0] = 1e7

    step = altered(tmp_path, name, change, "F16")
    module = end.partition(".adapter")[0].removeprefix("inserted.").removesuffix(".weight")
    with pytest.raises(MergeOverflow, match=f"{module}.* reaches .* float16 holds"):
        merge(prepare(resolve(step)))
    assert_nothing_was_written(step)


def test_a_shared_matrix_that_peft_stores_twice_must_be_one(tmp_path: Path) -> None:
    """A04."""

    def change(tensors: dict[str, Any]) -> None:
        dtype, shape, raw = tensors["base_model.model.lm_head.weight"]
        tensors["base_model.model.lm_head.weight"] = (dtype, shape, raw + np.float32(0.1))

    with pytest.raises(UserError, match="to share a matrix"):
        prepare(resolve(altered(tmp_path, "LoRA and a shared head", change)))


def test_a_base_that_changed_is_noticed_whatever_the_method(tmp_path: Path) -> None:
    """A02: also where the tensor itself is replaced, and its layer renumbered."""
    for name in ("layers", "blocks"):
        base, step = case(tmp_path / name, name)
        plan = prepare(resolve(step))
        samples.flip(base / names.WEIGHTS, 8 * (base / names.WEIGHTS).stat().st_size - 3)
        with pytest.raises(UserError, match="instead of"):
            merge(plan)
        assert_nothing_was_written(step)


# ---- PEFT's own files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept", [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}]
)
def test_an_adapter_of_peft_on_a_shared_head_is_merged_as_peft_computes(tmp_path: Path, kept: Mapping[str, Any]) -> None:
    """A04: PEFT separates the two unless told otherwise."""
    transformers, peft_package = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = base_of(tmp_path / "base", "smollm")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = peft_package.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **kept})
    adapted = peft_package.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    merge(prepare(resolve(tmp_path / "adapter", base_dir=base), tmp_path / "merged"))
    tokens = random_tokens(1, 20)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.inference_mode():
        theirs = peft_package.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()(tokens).logits
        ours = again(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, float(theirs.abs().max()))
    assert again.config.tie_word_embeddings is False


def test_whole_tensors_of_fp32_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    """N04: nothing is computed, so nothing may be lost."""
    _, step = case(tmp_path, "layers")
    after = read(merged(step))
    with SafetensorsFile(step / names.OWN_ADAPTER_WEIGHTS) as file:
        assert all(after[name][2] == bytes(file.bytes(name)) for name in file.tensors)
