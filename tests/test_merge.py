"""Merging: exact arithmetic, the whole directory, and nothing half-written. The oracle is fp64."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import checkpoint_samples as samples
import numpy as np
import pytest
import torch
from conftest import ROOT, shared_data

from litlora import peft
from litlora.checkpoint import commit_step, names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import Tensors
from litlora.checkpoint.fingerprint import fingerprint
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import load_model
from litlora.commands.merge_lora import merge_lora
from litlora.cpu import library, low_rank
from litlora.errors import UserError, WorkError
from litlora.families import config_from_hf, linear_shapes
from litlora.merge import MergeOverflow, merge, prepare
from litlora.merge.tensors import WIDTH, load, store
from litlora.methods import from_peft
from litlora.options import MergeLoRA
from litlora.safetensors_file import SafetensorsFile, from_float32, header_bytes, to_float32
from litlora.verify import compare_logits, prove, reread

MANTISSA = {"F32": 23, "F16": 10, "BF16": 7}
SMALLEST = {"F32": 2.0**-126, "F16": 2.0**-14, "BF16": 2.0**-126}  # normal numbers
PATTERNS = {"r": 6, "lora_alpha": 5, "rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"down_proj": 7.5}}
ALL = {"target_modules": "all-linear"}


def as_dtype(tensors: Tensors, dtype: str, size: float = 1.0) -> Tensors:
    """The same tensors, of the size of real weights, stored as `dtype`."""
    return {name: (dtype, shape, from_float32(np.asarray(raw) * np.float32(size), dtype)) for name, (_, shape, raw) in tensors.items()}


def make_base(path: Path, dtype: str = "F32", *, shards: int = 1, **changes: Any) -> Path:
    base = samples.make_base(path, shards=shards, tensors=as_dtype(samples.base_tensors(**changes), dtype, 0.3), **changes)
    (base / names.TOKENIZER).unlink()  # the sample's is none that anybody could load
    return base


def make_step(
    run: Path, base: Path, *, size: float = 0.1, tensors: Tensors | None = None, files: Mapping[str, bytes] | None = None, **changes: Any
) -> Path:
    """A step on `base` whose update is at least a percent of the weights; `changes` are keys of adapter_config.json."""
    values = {**samples.ADAPTER, "base_model_name_or_path": str(base.resolve()), **changes}
    config = json.loads((base / names.CONFIG).read_text())
    if tensors is None:
        of_base = config_from_hf(config, "config")
        shapes = from_peft(peft.adapter_config_from_peft(values, "adapter"), of_base).file_shapes(of_base)
        random = np.random.default_rng(5)
        tensors = {name: ("F32", shape, (random.normal(size=shape) * size).astype(np.float32)) for name, shape in shapes.items()}
    if values.get("use_dora"):
        tensors = {name: (d, s, np.abs(np.asarray(raw)) * 20 + 1 if "magnitude" in name else raw) for name, (d, s, raw) in tensors.items()}
    run.mkdir(parents=True, exist_ok=True)
    record = Checkpoint(base, "base").record(run)
    contents = {names.ADAPTER_CONFIG: json.dumps(values).encode(), **(files or {})}
    return commit_step(run, samples.manifest_of(100, record), tensors={names.ADAPTER_WEIGHTS: tensors}, files=contents)


def merged(step: Path, out_dir: Path | None = None, **options: Any) -> Path:
    plan = prepare(resolve(step), out_dir, **options)
    merge(plan)
    return plan.out_dir


def read(directory: Path) -> dict[str, tuple[str, np.ndarray, bytes]]:
    """Name -> dtype, values in fp64, bytes; of all files of weights."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            found |= {
                name: (info.dtype, file.float32(name).astype(np.float64), bytes(file.bytes(name))) for name, info in file.tensors.items()
            }
    return found


def half_unit(values: np.ndarray, dtype: str) -> np.ndarray:
    """Half the distance between neighbours of `dtype` at each value."""
    exponent = np.floor(np.log2(np.maximum(np.abs(values), SMALLEST[dtype])))
    return 2.0 ** (exponent - MANTISSA[dtype] - 1)


def tree_hash(directory: Path) -> str:
    state = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            state.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def exact(step: Path, base: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor -> W' in fp64, and how far fp32 arithmetic may be from it before the one rounding."""
    checkpoint = resolve(step)
    config = checkpoint.adapter_config()
    before = read(base)
    with SafetensorsFile(step / names.ADAPTER_WEIGHTS) as file:
        tensors = {name: file.float32(name).astype(np.float64) for name in file.tensors}
    found = {}
    for module in peft.targets(config, list(linear_shapes(checkpoint.config()))):
        r, alpha = peft.rank_and_alpha(config, module)
        scale = alpha / np.sqrt(r) if config.use_rslora else alpha / r
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        weight = before[f"{module}.weight"][1]
        assert a.shape[0] == r, "the sample's rank is not the pattern's"
        result = weight + scale * b @ a
        error = (r + 2) * 2.0**-24 * (np.abs(weight) + scale * np.abs(b) @ np.abs(a))
        if config.use_dora:
            length = np.linalg.norm(result, axis=1, keepdims=True)
            factor = tensors[f"base_model.model.{module}.lora_magnitude_vector"][:, None] / length
            relative = np.linalg.norm(error, axis=1, keepdims=True) / length
            result = result * factor
            error = error * np.abs(factor) + (relative + 8 * 2.0**-24) * np.abs(result)
        found[f"{module}.weight"] = result, error
    return found


# ---- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.fixture
def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many blocks of each dtype `put_on` of native.c took, in place of numpy."""
    count: Counter[str] = Counter()
    real = low_rank.put_on

    def counted(dtype: str, *args: Any) -> Any:
        count[dtype] += 1
        return real(dtype, *args)

    monkeypatch.setattr(low_rank, "put_on", counted)
    return count


PANELS = {"hidden_size": 48, "intermediate_size": 80}  # whole ones, but for the output of heads


@pytest.mark.parametrize("sizes", [{}, PANELS], ids=["", "whole panels"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "patterns", "patterns and rslora"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_element_is_the_exact_result_rounded_once(
    tmp_path: Path, dtype: str, kind: str, sizes: dict[str, int], in_one_pass: Counter[str]
) -> None:
    """N04, in numpy and, with whole panels, in C. (Mutations seen to fail: the product rounded to bf16 before it is added; truncation;
    scale alpha/r for rsLoRA's; the patterns ignored; DoRA without the division by the length; fp16 computed in fp16.)"""
    options = {
        "lora": ALL,
        "rslora": {**ALL, "use_rslora": True},
        "dora": {**ALL, "use_dora": True},
        "patterns": PATTERNS,
        "patterns and rslora": {**PATTERNS, "use_rslora": True},
    }[kind]
    base = make_base(tmp_path / "base", dtype, **sizes)
    step = make_step(tmp_path / "run", base, **options)
    before, after = read(base), read(merged(step))
    oracle = exact(step, base)
    assert after.keys() == before.keys()
    assert oracle
    assert bool(in_one_pass[dtype]) == (sizes == PANELS and dtype in low_rank.KINDS and kind != "dora" and library.working() is not None)
    for name, (stored, values, raw) in after.items():
        assert stored == dtype == before[name][0]
        if name not in oracle:
            assert raw == before[name][2], f"{name} has no adapter and changed"
            continue
        result, error = oracle[name]
        assert np.linalg.norm(result - before[name][1]) > 0.01 * np.linalg.norm(before[name][1]), (
            "the sample's update is too small to test with"
        )
        excess = np.abs(values - result) / (half_unit(values, dtype) + error)
        assert excess.max() <= 1, f"{name}: {excess.max()} of what is allowed"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rounding_in_place_is_rounding(dtype: str) -> None:
    """N04: the merge's own conversions are those of safetensors_file.py, which are torch's; ties above all. (Mutation: ties go down.)"""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    values = np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    values = np.ascontiguousarray(values[np.isfinite(values)])
    stored, rounded = np.empty(len(values) * WIDTH[dtype], np.uint8), np.empty_like(values)
    with np.errstate(all="ignore"):
        store(values, dtype, stored, rounded)
    assert stored.tobytes() == from_float32(values, dtype)
    assert np.array_equal(rounded, to_float32(stored, dtype, rounded.shape))
    again = np.empty_like(values)
    load(stored, dtype, again)
    assert np.array_equal(again, rounded)


@pytest.mark.parametrize("hidden_size", [296, 304])
@pytest.mark.parametrize(("stored", "wanted"), [("BF16", "keep"), ("F32", "bfloat16"), ("BF16", "float32"), ("F32", "keep")])
def test_blocks_of_rows_join_without_a_seam(tmp_path: Path, stored: str, wanted: str, hidden_size: int, in_one_pass: Counter[str]) -> None:
    """N04 where a tensor takes several blocks, the last one short and no multiple of the group, and the dtype may change; 304 are whole
    panels, which are put on in C. (Mutations: one row off in a block, in numpy and in C; places computed with the other dtype's width.)"""
    base = make_base(tmp_path / "base", stored, hidden_size=hidden_size, intermediate_size=2803, vocab_size=2551)
    step = make_step(tmp_path / "run", base, size=0.05, target_modules=["gate_proj", "down_proj"])
    before, after = read(base), read(merged(step, dtype=wanted))
    oracle = exact(step, base)
    for name, (dtype, values, _) in after.items():
        result, error = oracle.get(name, (before[name][1], 0.0))
        assert (np.abs(values - result) <= half_unit(values, dtype) + error).all(), name
    assert (in_one_pass[stored] > 3) == (hidden_size == 304 and wanted == "keep" and library.working() is not None)


@pytest.mark.parametrize(("dtype", "bound", "kl_bound"), [("F32", 1e-5, 1e-8), ("F16", 5e-3, 1e-5), ("BF16", 4e-2, 1e-4)])
def test_merged_and_unmerged_logits_agree(tmp_path: Path, dtype: str, bound: float, kl_bound: float) -> None:
    """N05; `verify full` measures it. (Mutation: half the scale.)"""
    base = make_base(tmp_path / "base", dtype)
    step = make_step(tmp_path / "run", base, size=0.15, **ALL)
    found = compare_logits(resolve(step), resolve(merged(step)))
    assert found["largest_difference"] <= bound * max(1, found["largest_logit"]), found
    assert found["kl"] <= kl_bound, found
    with torch.inference_mode():
        tokens = torch.arange(1, 30)[None]
        of_base, of_step = (load_model(resolve(path), dtype=torch.float32)(tokens) for path in (base, step))
    assert (of_base - of_step).abs().max() > 10 * found["largest_difference"], "the adapter itself moves nothing"


def test_the_result_is_what_peft_merges(tmp_path: Path) -> None:
    """Another program's file, with another program's arithmetic as the oracle."""
    transformers, peft_package = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = make_base(tmp_path / "base")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft_package.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=True, use_rslora=True, task_type="CAUSAL_LM"
    )
    adapted = peft_package.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    plan = prepare(resolve(tmp_path / "adapter", base_dir=base), tmp_path / "merged")
    assert merge(plan)["base_was_proven"] is False
    theirs = adapted.merge_and_unload().state_dict()
    for name, (_, values, _) in read(tmp_path / "merged").items():
        assert np.allclose(values, theirs[name].double().numpy(), rtol=1e-5, atol=1e-6), name


# ---- the same bytes, and only whole directories ----------------------------------------------------------------------


def test_merging_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """A05. The report too: it holds no time. (Mutation: a timestamp in the report.)"""
    base = make_base(tmp_path / "base", "BF16")
    step = make_step(tmp_path / "run", base, **ALL)
    untouched = tree_hash(base), tree_hash(step)
    first = merged(step, tmp_path / "one")
    second = merged(step, tmp_path / "two")
    assert tree_hash(first) == tree_hash(second)
    assert (tree_hash(base), tree_hash(step)) == untouched, "base or step was written to"


def test_a_merged_model_is_not_merged_again(tmp_path: Path) -> None:
    """A05."""
    base = make_base(tmp_path / "base")
    out = merged(make_step(tmp_path / "run", base))
    with pytest.raises(UserError, match="already merged"):
        prepare(resolve(out))
    with pytest.raises(UserError, match="nothing to merge"):
        prepare(resolve(base))
    assert not (out / names.ADAPTER_CONFIG).exists(), "transformers would ignore the merged weights"


def test_a_merge_never_writes_into_its_base(tmp_path: Path) -> None:
    """A05: input and output the same path, also through a link. (Mutation: paths compared as they are given.)"""
    base = make_base(tmp_path / "base")
    step = make_step(tmp_path / "run", base)
    (tmp_path / "link").symlink_to(base)
    for place in (base, base / "merged", tmp_path / "link" / "merged", base / ".." / "base"):
        with pytest.raises(UserError, match="no command writes into a base"):
            prepare(resolve(step), place, overwrite=True)


def test_only_an_earlier_merge_can_be_overwritten(tmp_path: Path) -> None:
    """A05. The step itself, or anybody's directory, is no earlier merge."""
    base = make_base(tmp_path / "base")
    step = make_step(tmp_path / "run", base)
    out = merged(step)
    with pytest.raises(UserError, match="already"):
        prepare(resolve(step))
    for place in (step, tmp_path):
        with pytest.raises(UserError, match="no earlier merge"):
            prepare(resolve(step), place, overwrite=True)
    (out / "old").write_text("")
    merged(step, overwrite=True)
    assert not (out / "old").exists()
    assert reread(out) == []
    assert [path.name for path in step.iterdir() if names.MERGED in path.name] == [names.MERGED], "something was left beside it"


def test_overwriting_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    """Somebody's `NAME.new` beside it, a living process's work. What dead merges left goes. Caught: `.new` as the temporary name."""
    step = make_step(tmp_path / "run", make_base(tmp_path / "base"))
    place = tmp_path / "place"
    out = merged(step, place / "foo")
    dead, alive = 4_194_305, os.getppid()  # larger than any process's number
    kept = ["foo.new", names.temporary_name("foo", alive), names.temporary_name("other", dead)]
    inner = names.temporary_name("foo", dead)
    gone = [inner, names.temporary_name(inner, dead), names.temporary_name("foo.earlier", dead)]
    for name in (*kept, *gone):
        (place / name).mkdir()
        (place / name / "letter").write_text("dear")
    merged(step, out, overwrite=True)
    assert sorted(path.name for path in place.iterdir()) == sorted(["foo", *kept])
    assert all((place / name / "letter").read_text() == "dear" for name in kept)
    assert reread(out) == []


@pytest.mark.parametrize("name", ["n" * 255, "n" * 244, "\u00fc" * 127], ids=["longest", "long", "two bytes a letter"])
def test_a_result_may_be_called_by_the_longest_name_there_is(tmp_path: Path, name: str) -> None:
    """F01: written, replaced, and what a dead merge left goes. Caught: names of what is half-written that are never shortened, or
    shortened by cutting (the earlier one's is then the new one's)."""
    step = make_step(tmp_path / "run", make_base(tmp_path / "base"))
    place, dead = tmp_path / "place", 4_194_305
    merged(step, place / name)
    for remains in (name, f"{name}.earlier", names.temporary_name(name, dead)):
        (place / names.temporary_name(remains, dead)).mkdir()
    assert len(list(place.iterdir())) == 4
    merged(step, place / name, overwrite=True)
    assert [path.name for path in place.iterdir()] == [name]
    assert reread(place / name) == []


def test_two_directories_swap_their_names_also_without_the_systems_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way taken where renameat2 is missing. Caught: the earlier one put aside under the new one's name."""
    monkeypatch.setattr("litlora.merge.ctypes.CDLL", lambda *args, **more: None)
    step = make_step(tmp_path / "run", make_base(tmp_path / "base"))
    out = merged(step)
    (out / "old").write_text("")
    merged(step, overwrite=True)
    assert not (out / "old").exists()
    assert reread(out) == []
    assert [path.name for path in step.iterdir() if names.MERGED in path.name] == [names.MERGED]


def test_an_earlier_merge_outlives_a_failed_one(tmp_path: Path) -> None:
    """A05: it is replaced when the new one is complete, and not before. (Mutation: the old one removed first.)"""
    base = make_base(tmp_path / "base")
    step = make_step(tmp_path / "run", base)
    out = merged(step)
    before = tree_hash(out)

    def fail(directory: Path) -> dict[str, Any]:
        raise WorkError("no")

    with pytest.raises(WorkError):
        merge(prepare(resolve(step), overwrite=True), prove=fail)
    assert tree_hash(out) == before
    assert [path.name for path in step.iterdir() if "merged" in path.name] == [names.MERGED]


def test_a_killed_merge_leaves_no_half_directory(tmp_path: Path) -> None:
    """A05: kill -9 as soon as there is something to see; the next merge clears up. (Mutation: writing at the final name.)"""
    base = make_base(tmp_path / "base", "BF16", hidden_size=1000, intermediate_size=3000, vocab_size=8000)
    step = make_step(tmp_path / "run", base, **ALL)
    command = [sys.executable, "-m", "litlora", "merge_lora", str(step)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    killed = 0
    for _ in range(5):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and not any((place / names.WEIGHTS).exists() for place in step.glob(".tmp-merged-*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
            assert not (step / names.MERGED).exists()
            assert list(step.glob(".tmp-merged-*")), "it was killed before it began"
            break
        shutil.rmtree(step / names.MERGED)
    assert killed, "the merge was never slow enough to be killed"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(step / names.MERGED)
    assert not list(step.glob(".tmp-*"))
    assert reread(step / names.MERGED) == []


# ---- what is refused -------------------------------------------------------------------------------------------------


def assert_nothing_was_written(step: Path) -> None:
    assert not [path.name for path in step.iterdir() if "merged" in path.name]


def altered_adapter(tmp_path: Path, change: Any, **options: Any) -> Path:
    """A step whose adapter was changed before it was committed."""
    base = make_base(tmp_path / "base", options.pop("dtype", "F32"))
    values = {**samples.ADAPTER, **options}
    tensors = samples.adapter_tensors(5, values)
    change(tensors)
    return make_step(tmp_path / "run", base, tensors=tensors, **options)


def test_every_tensor_at_fault_is_named(tmp_path: Path) -> None:
    """A01: missing, left over, renamed, of the wrong shape: all in one message. (Mutation: the left-over ones are dropped.)"""
    q, v, down = (f"base_model.model.model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))

    def change(tensors: dict[str, Any]) -> None:
        del tensors[f"{q}.lora_A.weight"]
        tensors[f"{down}.lora_C.weight"] = tensors.pop(f"{down}.lora_B.weight")
        tensors[f"{v}.lora_A.weight"] = ("F32", (4, 24), np.ones((4, 24), np.float32))

    step = altered_adapter(tmp_path, change)
    with pytest.raises(UserError) as caught:
        prepare(resolve(step))
    told = str(caught.value)
    assert all(name in told for name in (f"{q}.lora_A.weight", f"{down}.lora_C.weight", f"{down}.lora_B.weight", f"{v}.lora_A.weight")), (
        told
    )
    assert_nothing_was_written(step)


def test_a_base_that_is_not_its_configs_is_refused(tmp_path: Path) -> None:
    """A01, of the base: missing, extra, wrong shape."""
    tensors = dict(samples.base_tensors())
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = ("F32", (61, 23), np.ones((61, 23), np.float32))
    base = samples.make_base(tmp_path / "base", tensors=tensors)
    adapter = samples.make_adapter(tmp_path / "adapter", str(base))
    with pytest.raises(UserError) as caught:
        prepare(resolve(adapter))
    assert all(
        word in str(caught.value)
        for word in ("missing: model.norm.weight", "unexpected: model.extra.weight", "wrong shape: lm_head.weight")
    )


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    """A02: the same shapes, other weights."""
    base, other = make_base(tmp_path / "base"), samples.make_base(tmp_path / "other", 1)
    step = make_step(tmp_path / "run", base)
    with pytest.raises(UserError) as caught:
        prepare(resolve(step, base_dir=other))
    told = caught.value.report()
    assert all(fingerprint(Checkpoint(path, "base").shards()) in told for path in (base, other)), told


def test_a_base_that_changes_under_the_merge_is_noticed(tmp_path: Path) -> None:
    """A02: what was merged into is what counts, not what a cache remembers. (Mutation: no check after the weights streamed by.)"""
    base = make_base(tmp_path / "base")
    step = make_step(tmp_path / "run", base)
    plan = prepare(resolve(step))
    samples.flip(base / names.WEIGHTS, 8 * (base / names.WEIGHTS).stat().st_size - 3)
    with pytest.raises(UserError, match="instead of"):
        merge(plan)
    assert_nothing_was_written(step)


def test_a_renamed_and_resharded_base_is_accepted(tmp_path: Path) -> None:
    """A02."""
    base = make_base(tmp_path / "base", "BF16")
    step = make_step(tmp_path / "run", base)
    first = read(merged(step, tmp_path / "one"))
    resharded = make_base(tmp_path / "resharded", "BF16", shards=3)
    shutil.rmtree(base)
    merge(prepare(resolve(step, base_dir=resharded), tmp_path / "two"))
    second = read(tmp_path / "two")
    assert {name: raw for name, (_, _, raw) in first.items()} == {name: raw for name, (_, _, raw) in second.items()}
    assert (tmp_path / "two" / names.WEIGHTS_INDEX).read_bytes() == (resharded / names.WEIGHTS_INDEX).read_bytes()
    fingerprints = {json.loads((tmp_path / place / names.MERGE_REPORT).read_text())["merged"]["fingerprint"] for place in ("one", "two")}
    assert fingerprints == {resolve(tmp_path / "one").fingerprint()} == {resolve(tmp_path / "two").fingerprint()}


def test_a_missing_or_torn_base_is_named(tmp_path: Path) -> None:
    """F13."""
    base = make_base(tmp_path / "base", shards=2)
    step = make_step(tmp_path / "run", base)
    shard = sorted(base.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=shard.name):
        prepare(resolve(step))
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        prepare(resolve(step))
    shutil.rmtree(base)
    with pytest.raises(UserError, match="holds no base weights"):
        prepare(resolve(step))
    assert_nothing_was_written(step)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_with_values_that_are_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    """Promise 12."""
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"

    def change(tensors: dict[str, Any]) -> None:
        tensors[name][2][1, 2] = value

    step = altered_adapter(tmp_path, change)
    with pytest.raises(UserError, match=name):
        prepare(resolve(step))


@pytest.mark.parametrize("sizes", [{}, PANELS], ids=["", "whole panels"])
def test_a_base_with_values_that_are_not_finite_is_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    """Promise 12: where they would be computed with, in numpy and in C."""
    tensors = samples.base_tensors(**sizes)
    tensors["model.layers.0.self_attn.q_proj.weight"][2][3, 4] = np.nan
    base = samples.make_base(tmp_path / "base", tensors=tensors, **sizes)
    step = make_step(tmp_path / "run", base)
    with pytest.raises(WorkError, match=r"layers\.0\.self_attn\.q_proj\.weight of the base"):
        merge(prepare(resolve(step)))
    assert_nothing_was_written(step)


@pytest.mark.parametrize(("dtype", "size"), [("BF16", 1e30), ("F32", 1e30), ("BF16", 3.38e38)])
def test_numbers_whose_squares_are_too_large_for_fp32_are_merged(tmp_path: Path, dtype: str, size: float) -> None:
    """N04: what the pass in C cannot sum up is merged in numpy, with sums in fp64. (Mutation: the block's totals added twice.)"""
    tensors = as_dtype(samples.base_tensors(**PANELS), dtype, 0.3)
    name = "model.layers.0.self_attn.q_proj.weight"
    values = to_float32(tensors[name][2], dtype, tensors[name][1]).copy()
    values[3, 4] = size
    tensors[name] = (dtype, tensors[name][1], from_float32(values, dtype))
    base = samples.make_base(tmp_path / "base", tensors=tensors, **PANELS)
    step = make_step(tmp_path / "run", base)
    plan = prepare(resolve(step))
    merge(plan)
    result, error = exact(step, base)[name]
    found = read(plan.out_dir)[name][1]
    assert (np.abs(found - result) <= half_unit(result, dtype) + error).all()


@pytest.mark.parametrize(("dtype", "options"), [("F16", {}), ("F32", {"dtype": "float16"}), ("BF16", {"dtype": "float16"})])
def test_what_overflows_fp16_is_named_and_nothing_is_written(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    """N05. (Mutation: infinities are stored.)"""

    def change(tensors: dict[str, Any]) -> None:
        for side in "AB":
            tensors[f"base_model.model.model.layers.1.self_attn.v_proj.lora_{side}.weight"][2][:] *= 300

    step = altered_adapter(tmp_path, change, dtype=dtype)
    with pytest.raises(MergeOverflow, match=r"layers\.1\.self_attn\.v_proj\.weight reaches .* float16 holds"):
        merge(prepare(resolve(step), **options))  # with the command's own word for the dtype
    assert_nothing_was_written(step)


def test_an_update_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    """DESIGN 6: zero B before the work, an update below the rounding after it. (Mutation: no comparison of the bytes.)"""

    def zero(tensors: dict[str, Any]) -> None:
        for name, (_, _, raw) in tensors.items():
            raw[:] *= "lora_A" in name

    def tiny(tensors: dict[str, Any]) -> None:
        for name, (_, _, raw) in tensors.items():
            raw[:] *= 1e-12 if "lora_B" in name else 1

    step = altered_adapter(tmp_path / "zero", zero)
    with pytest.raises(UserError, match="every lora_B is zero"):
        prepare(resolve(step))
    step = altered_adapter(tmp_path / "tiny", tiny, dtype="BF16")
    with pytest.raises(WorkError, match="rounding"):
        merge(prepare(resolve(step)))
    assert_nothing_was_written(step)
    assert json.loads((merged(step, dtype="float32") / names.MERGE_REPORT).read_text())["update_lost_to_rounding"] < 0.01


def test_lora_on_a_head_that_stays_the_embedding_is_refused_in_advance(tmp_path: Path) -> None:
    """A04. (How a separated one is merged: test_merge_methods.py.)"""
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    values = {**samples.ADAPTER, "target_modules": ["lm_head"]}
    shapes = {f"base_model.model.lm_head.lora_{side}.weight": shape for side, shape in (("A", (3, 24)), ("B", (61, 3)))}
    tensors = {name: ("F32", shape, np.ones(shape, np.float32)) for name, shape in shapes.items()}
    step = make_step(tmp_path / "run", base, tensors=tensors, **values)  # its manifest does not say that the two were separated
    with pytest.raises(UserError, match="cannot be merged: the head is the embedding's own matrix") as caught:
        prepare(resolve(step))
    assert f"litlora chat {step}" in caught.value.hint


def test_the_head_of_an_untied_base_is_merged(tmp_path: Path) -> None:
    """A04."""
    base = make_base(tmp_path / "base")
    adapter = samples.make_adapter(tmp_path / "adapter", str(base), target_modules=["lm_head"])
    merge(prepare(resolve(adapter), tmp_path / "merged"))
    after, (result, error) = read(tmp_path / "merged"), exact(adapter, base)["lm_head.weight"]
    assert (np.abs(after["lm_head.weight"][1] - result) <= half_unit(result, "F32") + error).all()


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F08 and a full disk: exit code 2 when it is seen before."""
    base = make_base(tmp_path / "base")
    step = make_step(tmp_path / "run", base)
    (tmp_path / "file").write_text("")
    for place, told in ((tmp_path / "file", "no earlier merge"), (tmp_path / "file" / "merged", "is no directory")):
        with pytest.raises(UserError, match=told):
            prepare(resolve(step), place)
    monkeypatch.setattr("litlora.checkpoint.commit.free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="disk is full"):
        prepare(resolve(step))


def test_a_read_only_directory_is_refused_before_the_work() -> None:
    """F08, as somebody for whom modes count. (Mutation: no look at the directory.)"""
    place = Path(tempfile.mkdtemp())  # not below pytest's own directory, which nobody else may enter
    before = os.geteuid()
    try:
        place.chmod(0o755)
        base = make_base(place / "base")
        step = make_step(place / "run", base)
        step.chmod(0o555)
        checkpoint = resolve(step)
        if before == 0:
            os.seteuid(65534)
        with pytest.raises(UserError, match="cannot be written to"):
            prepare(checkpoint)
    finally:
        os.seteuid(before)
        step.chmod(0o755)
        shutil.rmtree(place)


# ---- the whole directory ---------------------------------------------------------------------------------------------


def with_tokenizer(base: Path) -> Path:
    """A tokenizer that transformers loads, and what else a published model has."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(base / names.TOKENIZER))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (base / names.TOKENIZER_CONFIG).write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special, "chat_template": "old"})
    )
    (base / names.SPECIAL_TOKENS).write_text(json.dumps(special))
    (base / names.GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": [2, 4], "pad_token_id": 2, "max_length": 64}))
    (base / "LICENSE").write_text("Do what you like.")
    (base / names.README).write_text("---\nlicense: apache-2.0\n---\n# base\n")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    return base


def test_the_merged_directory_is_a_complete_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A07: transformers loads it offline; logits, end and padding ids are those of base and adapter. (Mutation: no generation config.)"""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = with_tokenizer(make_base(tmp_path / "base", eos_token_id=2, pad_token_id=2, bos_token_id=1))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    carried = {name: (base / name).read_bytes() for name in (names.TOKENIZER, names.TOKENIZER_CONFIG, names.SPECIAL_TOKENS)}
    step = make_step(tmp_path / "run", base, files={names.CHAT_TEMPLATE: template.encode(), **carried}, **ALL)
    out = merged(step)
    found = {path.name for path in out.iterdir()}
    assert found == {
        names.CONFIG, names.GENERATION_CONFIG, names.WEIGHTS, names.TOKENIZER, names.TOKENIZER_CONFIG, names.SPECIAL_TOKENS,
        names.CHAT_TEMPLATE, "LICENSE", names.README, names.MERGE_REPORT,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    of_base = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.arange(1, 30)[None]
    with torch.inference_mode():
        ours = load_model(resolve(step))(tokens)
        theirs = model(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, float(ours.abs().max()))
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(model.config, key) == getattr(of_base.config, key)
    assert model.generation_config.eos_token_id == [2, 4]
    assert model.generation_config.pad_token_id == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == template
    assert tokenizer("hello world")["input_ids"] == [3, 4]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert json.loads((out / names.TOKENIZER_CONFIG).read_text())["chat_template"] == template == (out / names.CHAT_TEMPLATE).read_text()
    assert "license: apache-2.0" in (out / names.README).read_text()


def test_a_real_model_is_merged_and_loads_in_transformers(tmp_path: Path) -> None:
    """A04, A07 with published weights (tied or not, as they are) and their own tokenizer."""
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "base"
    shutil.copytree(shared_data("models/stories3m-llama"), base)
    step = make_step(tmp_path / "run", base, size=0.02, r=8, lora_alpha=16, **ALL)
    report = merge(prepare(resolve(step)), prove=lambda directory: prove(resolve(step), directory))
    assert report["proof"]["largest_difference"] <= report["proof"]["bound"]
    out = step / names.MERGED
    ids = transformers.AutoTokenizer.from_pretrained(out)("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(ids).logits
        ours = load_model(resolve(step), dtype=torch.float32)(ids)
    assert (theirs - ours).abs().max() <= 1e-4 * max(1, float(ours.abs().max()))
    assert not any(name.endswith(".py") for name in os.listdir(out))


def test_the_dtype_of_the_whole_model_can_be_changed(tmp_path: Path) -> None:
    """N04: every floating tensor, config and index say so; the untouched ones are rounded once too. (Mutation: config left as it is.)"""
    base = make_base(tmp_path / "base", "F32", shards=2, torch_dtype="float32")
    step = make_step(tmp_path / "run", base)
    out = merged(step, dtype="bfloat16")
    before, after, oracle = read(base), read(out), exact(step, base)
    for name, (dtype, values, raw) in after.items():
        assert dtype == "BF16"
        if name in oracle:
            result, error = oracle[name]
            assert (np.abs(values - result) <= half_unit(values, "BF16") + error).all()
        else:
            assert raw == from_float32(before[name][1].astype(np.float32), "BF16")
    assert json.loads((out / names.CONFIG).read_text())["torch_dtype"] == "bfloat16"
    size = sum(len(raw) for _, _, raw in after.values())
    assert json.loads((out / names.WEIGHTS_INDEX).read_text())["metadata"]["total_size"] == size
    report = json.loads((out / names.MERGE_REPORT).read_text())
    assert report["merged"]["bytes"] == size
    assert report["size"].startswith("0.50 times")
    assert report["tensors"]["converted"] == len(after)


def test_an_unusual_header_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """DESIGN 6: where no tensor is added, renamed or converted, the file is the base's but for the adapted numbers."""
    base = make_base(tmp_path / "base")
    tensors = {name: (dtype, values.shape, raw) for name, (dtype, values, raw) in reversed(read(base).items())}
    header, places = header_bytes({name: one[:2] for name, one in tensors.items()}, {"by": "hand"}, keep_order=True)
    (base / names.WEIGHTS).write_bytes(header + b"".join(tensors[name][2] for name in places))
    out = merged(make_step(tmp_path / "run", base))
    assert (out / names.WEIGHTS).read_bytes().startswith(header)
    assert (out / names.WEIGHTS).stat().st_size == (base / names.WEIGHTS).stat().st_size


def test_dtypes_that_cannot_be_computed_with_are_refused_where_they_would_be(tmp_path: Path) -> None:
    """N04: a tensor that nothing was trained on may have any dtype."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = dict(samples.base_tensors())
    tensors[name] = ("F64", tensors[name][1], np.asarray(tensors[name][2]).astype(np.float64))
    base = samples.make_base(tmp_path / "base", tensors=tensors)
    with pytest.raises(UserError, match=rf"{name} is F64, which cannot be computed with"):
        prepare(resolve(make_step(tmp_path / "run", base)))
    out = merged(make_step(tmp_path / "other", base, target_modules=["down_proj"]))
    assert read(out)[name][2] == read(base)[name][2]


def test_names_without_their_prefix_are_kept(tmp_path: Path) -> None:
    """A base that was saved without its head drops `model.`: the merged one has the same names."""
    tensors = samples.base_tensors(tie_word_embeddings=True)
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    base = samples.make_base(tmp_path / "base", tensors=bare, tie_word_embeddings=True)
    step = make_step(tmp_path / "run", base)
    assert read(merged(step)).keys() == bare.keys()


# ---- the report and the proof ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, PANELS], ids=["", "whole panels"])
def test_the_report_says_what_changed_and_what_rounding_took(tmp_path: Path, sizes: dict[str, int]) -> None:
    """DESIGN 6, against fp64, in numpy and in C. (Mutations: the norm of the rounded update for the share lost; none added in C.)"""
    base = make_base(tmp_path / "base", "BF16", **sizes)
    step = make_step(tmp_path / "run", base, size=0.01)
    out = merged(step)
    report, before, after, oracle = json.loads((out / names.MERGE_REPORT).read_text()), read(base), read(out), exact(step, base)
    assert report["tensors"] == {"changed": 6, "converted": 0, "copied": len(before) - 6, "new": 0}
    assert report["new_layers"] == []
    assert report["adapter"]["method"] == "lora"
    assert list(report["modules"]) == [name.removesuffix(".weight") for name in oracle], "not in the model's order"
    for name, (result, _) in oracle.items():
        weight, update = before[name][1], result - before[name][1]
        told = report["modules"][name.removesuffix(".weight")]
        assert told["relative_norm"] == pytest.approx(np.linalg.norm(update) / np.linalg.norm(weight), rel=2e-3)
        assert told["lost_to_rounding"] == pytest.approx(np.linalg.norm(after[name][1] - result) / np.linalg.norm(update), rel=2e-3)
    assert report["update_lost_to_rounding"] > 0.5, "the sample should lose much"
    assert report["base"]["fingerprint"] == resolve(base).fingerprint()
    assert report["merged"]["fingerprint"] == resolve(out).fingerprint()
    assert report["adapter"]["sha256"] == hashlib.sha256((step / names.ADAPTER_WEIGHTS).read_bytes()).hexdigest()
    assert report["base"]["bytes"] == report["merged"]["bytes"]
    assert report["size"].startswith("as large as the base")
    assert reread(out) == []


def test_an_altered_result_is_found_by_reading_it_again(tmp_path: Path) -> None:
    """Promise 2."""
    base = make_base(tmp_path / "base")
    out = merged(make_step(tmp_path / "run", base))
    samples.flip(out / names.WEIGHTS, 8 * (out / names.WEIGHTS).stat().st_size - 1)
    (out / names.CONFIG).write_text((out / names.CONFIG).read_text() + "\n")
    (out / names.README).unlink()
    faults = reread(out)
    assert {"config.json was altered", "README.md is missing"} < set(faults)
    assert len(faults) == 3, faults
    with pytest.raises(WorkError, match="not what was written"):
        prove(resolve(tmp_path / "run" / "step-100"), out)


def test_logits_of_another_merge_are_refused(tmp_path: Path) -> None:
    """N05: `--verify full` fails, and nothing gets the final name. (Mutation: a bound of 1.)"""
    base = make_base(tmp_path / "base", "BF16")
    step = make_step(tmp_path / "run", base, size=0.2)
    other = make_step(tmp_path / "other", base, size=0.2, lora_alpha=9)
    with pytest.raises(WorkError, match="computes something else"):
        merge(prepare(resolve(step)), prove=lambda directory: prove(resolve(other), directory))
    assert_nothing_was_written(step)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_merges_without_torch(tmp_path: Path) -> None:
    """DESIGN 2, 6; the path is all that goes to standard output. (Mutation: `import torch` in merge.)"""
    base = make_base(tmp_path / "base", "BF16")
    step = make_step(tmp_path / "run", base, size=0.01)
    code = """
import sys
from litlora.__main__ import main
assert main(["merge_lora", sys.argv[1]]) == 0
heavy = [name for name in ("torch", "lightning_fabric", "transformers", "tokenizers") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code, str(step)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{step / names.MERGED}\n"
    for told in (
        "adapter",
        str(base),
        "6 modules changed by",
        "as large as the base",
        "warning: rounding took",
        "--dtype float32",
        "next: litlora chat",
    ):
        assert told in done.stderr, done.stderr


def test_the_command_proves_more_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """N05."""
    base = make_base(tmp_path / "base")
    run = tmp_path / "run"
    make_step(run, base)
    merge_lora(MergeLoRA(checkpoint_dir=str(run), out_dir=str(tmp_path / "out" / "deep"), verify="full"))
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'out' / 'deep'}\n"
    assert "read again from the disk" in told.err
    assert "newest" in told.err
    assert "proof" in json.loads((tmp_path / "out" / "deep" / names.MERGE_REPORT).read_text())


def test_every_intermediate_step_merges(tmp_path: Path) -> None:
    """A08: by its name, each to its own place."""
    base = make_base(tmp_path / "base")
    run = tmp_path / "run"
    steps = [samples.add_step(run, number, base) for number in (100, 200, 300)]
    hashes = {fingerprint(resolve(merged(step)).shards()) for step in steps}
    assert len(hashes) == 3


def test_an_adapter_of_an_unknown_base_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Promise 5: a PEFT adapter does not say what it was trained on."""
    base = make_base(tmp_path / "base")
    adapter = samples.make_adapter(tmp_path / "adapter", str(base))
    merge_lora(MergeLoRA(checkpoint_dir=str(adapter)))
    assert "does not say which weights" in capsys.readouterr().err
    assert json.loads((adapter / names.MERGED / names.MERGE_REPORT).read_text())["base_was_proven"] is False


def test_no_run_is_no_merge_of_the_demo_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare `litlora merge_lora` where nothing was trained yet."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        merge_lora(MergeLoRA())
