"""Of a merged model every number against its base and its adapter, computed once more in fp64. No torch; memory stays flat.

The merge is not believed: its report says nothing here that is not measured again. What a number may be away from the exact result is
half a unit in its last place, for the one rounding, and what fp32 may add up to before it (Higham, Accuracy and Stability, 3.5: a
product of R terms errs by at most R u |B||A|).
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.reading import read_json
from litlora.console import counted
from litlora.families import tensor_name
from litlora.merge.directory import size_explained, summed
from litlora.merge.effective import Effective, computed
from litlora.merge.outputs import Output, new_model
from litlora.merge.plan import blocks
from litlora.merge.tensors import WIDTH, Added, Floats, Making, Moved, Scaled, cuts, load, squares
from litlora.methods.tuning import EMBEDDING, Tuning
from litlora.safetensors_file import DTYPES, SafetensorsFile

UNIT = 2.0**-24  # half a unit in the last place of 1, in fp32
SUMS = 16 * UNIT  # what a row's length of fp32 squares, its root and the division by it may err by, relatively
MANTISSA, LOWEST = {"F32": 23, "F16": 10, "BF16": 7}, {"F32": -126, "F16": -14, "BF16": -126}  # bits; exponent of the smallest normal
PART = 2**20  # bytes compared at a time


@dataclass
class Proof:
    """What was found; `faults` one line each, empty where every number is what it should be."""

    faults: list[str] = field(default_factory=list)
    tensors: int = 0
    changed: int = 0  # tensors that training changed, or that are new
    converted: int = 0  # the rest, where the merge changed their dtype
    identical: int = 0  # untouched, and the base's byte for byte
    adapter_tensors: int = 0  # all of them used
    numbers: int = 0  # compared in fp64
    farthest: float = 0.0  # of what a number may be away from the exact result, the largest share that one is
    where: str = ""  # the tensor of that number
    relative: float = 0.0  # ||W' - W|| / ||W|| of what was changed
    lost: float = 0.0  # share of the update that rounding took away
    size: str = ""  # why it is as large as it is


def compare_weights(adapter: Checkpoint, merged: Checkpoint) -> Proof:
    """Every tensor of `merged` against what `adapter` and its base make of it. UserError where one of them cannot be read."""
    proof = Proof()
    with ExitStack() as stack:
        files = {path: stack.enter_context(SafetensorsFile(path)) for path in sorted(set(merged.shards().values()))}
        stored = {tensor_name(name, merged.config()): (files[path], name) for name, path in merged.shards().items()}
        model = stack.enter_context(Effective(adapter, dtype=converted_to(merged, stored)))
        proof.tensors, proof.size = len(stored), size_explained(model.model)
        with SafetensorsFile(adapter.adapter_file()) as file:
            proof.adapter_tensors = len(file.tensors)
        proof.faults += audit(model, merged, stored)
        outputs = [output for output in model.model if output.parameter in stored and fits(output, *stored[output.parameter])]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            looks = list(pool.map(lambda output: look(output, model, *stored[output.parameter], stored), outputs))
    for output, found in zip(outputs, looks, strict=True):
        proof.faults += found.faults
        kind = "identical" if output.is_copied else "changed" if output.is_changed or not output.own else "converted"
        setattr(proof, kind, getattr(proof, kind) + 1)
        proof.numbers += found.numbers
        if found.farthest > proof.farthest:
            proof.farthest, proof.where = found.farthest, output.parameter
    total = summed(found.moved for output, found in zip(outputs, looks, strict=True) if output.is_changed)
    proof.relative, proof.lost = total.relative, total.lost
    proof.faults += other_figures(proof, merged)
    return proof


def converted_to(merged: Checkpoint, stored: dict[str, tuple[SafetensorsFile, str]]) -> str | None:
    """The dtype that the merge was asked for, where its report says that tensors were converted."""
    tensors = read_json(merged.path, names.MERGE_REPORT).get("tensors")
    if not isinstance(tensors, dict) or not tensors.get("converted"):
        return None
    counted = Counter(file.tensors[name].dtype for file, name in stored.values())
    return counted.most_common(1)[0][0]


def audit(model: Effective, merged: Checkpoint, stored: dict[str, tuple[SafetensorsFile, str]]) -> Iterator[str]:
    """Tensors that are missing, left over, of another shape or dtype; a config.json of another model; another size."""
    expected = {output.parameter: output for output in model.model}
    yield from (f"{name} is missing" for name in expected if name not in stored)
    yield from (f"{name} is left over: neither the base nor the adapter has it" for name in stored if name not in expected)
    for name, (file, own) in stored.items():
        if name in expected and not fits(expected[name], file, own):
            info, wanted = file.tensors[own], expected[name]
            yield f"{name} in {file.path.name} is {info.dtype} {list(info.shape)}, and should be {wanted.dtype} {list(wanted.shape)}"
    word = next(word for word, code in DTYPES.items() if code == model.model.dtype) if model.model.dtype else model.config.torch_dtype
    says, means = merged.config(), replace(model.config, torch_dtype=word)
    for key in (one.name for one in fields(means)):
        if getattr(says, key) != getattr(means, key):
            yield f"{names.CONFIG} says {key} {getattr(says, key)}, and base and adapter make {getattr(means, key)}"


def fits(output: Output, file: SafetensorsFile, name: str) -> bool:
    info = file.tensors[name]
    return (info.dtype, info.shape) == (output.dtype, output.shape)


def other_figures(proof: Proof, merged: Checkpoint) -> Iterator[str]:
    """Where the report of the merge claims another size of the update, or another loss of it, than is there."""
    if not proof.relative:
        return
    report = read_json(merged.path, names.MERGE_REPORT)
    fp32 = 4 * UNIT / proof.relative  # of the update, what the sums of fp32 may cost: the report measures only what comes after
    for key, found, blur in (("update_relative_norm", proof.relative, 0.0), ("update_lost_to_rounding", proof.lost, fp32)):
        said = report.get(key)
        if not isinstance(said, int | float) or not abs(said - found) <= 0.01 * max(abs(said), found) + blur:
            yield f"{names.MERGE_REPORT} says {key} {said}, and {found:.4g} is what is there"


# ---- one tensor ------------------------------------------------------------------------------------------------------


@dataclass
class Look:
    """What was found of one tensor."""

    faults: list[str] = field(default_factory=list)
    numbers: int = 0
    farthest: float = 0.0
    moved: Moved = field(default_factory=Moved)


def look(output: Output, model: Effective, file: SafetensorsFile, name: str, stored: dict[str, tuple[SafetensorsFile, str]]) -> Look:
    """A tensor byte for byte where nothing was to change it, else number for number."""
    if output.is_copied:
        base, source = model.base_file(output), output.source
        assert source is not None
        same = same_bytes(base, source, file, name)
        return Look([] if same else [f"{output.parameter} in {file.path.name} was not trained, and is not the base's byte for byte"])
    if output.parameter not in model.outputs:  # a second copy of a shared matrix
        same = same_bytes(*stored[EMBEDDING], file, name)
        return Look([] if same else [f"{output.parameter} in {file.path.name} differs from {EMBEDDING}, which it is a copy of"])
    return compare_numbers(output, model.making(output.parameter, np.float64), file, name)


def same_bytes(one: SafetensorsFile, name: str, other: SafetensorsFile, its: str) -> bool:
    if one.tensors[name].size != other.tensors[its].size:
        return False
    pairs = zip(one.parts(name, memoryview(bytearray(PART))), other.parts(its, memoryview(bytearray(PART))), strict=True)
    return all(mine == theirs for mine, theirs in pairs)


def compare_numbers(output: Output, way: Making, file: SafetensorsFile, name: str) -> Look:
    found, info = Look(), file.tensors[name]
    wrong, worst, where, told = 0, 0.0, 0, ""
    before = computed(replace(way, value=None, update=None), np.float64)
    for cut, due, old in zip(cuts(way.shape, in_rows=True), computed(way, np.float64, found.moved), before, strict=True):
        raw = np.empty(cut.size * WIDTH[info.dtype], np.uint8)
        file.read_into(info.start + cut.start * WIDTH[info.dtype], raw.data)
        values = np.empty(due.shape, np.float64)
        load(raw, info.dtype, values.reshape(-1))
        away = np.abs(values - due)
        with np.errstate(all="ignore"):
            share = away / (half_unit(values, info.dtype) + before_rounding(way, cut.row, due, old))
        share[~np.isfinite(share)] = np.inf  # a number that is none is as far away as can be
        found.moved.rounding += squares(away.reshape(-1))
        wrong += int((share > 1).sum())
        if share.max() > worst:
            at = int(share.argmax())
            worst, where = float(share.max()), cut.start + at
            told = f"{values.flat[at]:.6g} where {due.flat[at]:.6g} is due"
    found.numbers, found.farthest = math.prod(way.shape), worst
    if wrong:
        place = [int(index) for index in np.unravel_index(where, way.shape)]
        many = f"{wrong:,} of {counted(found.numbers, 'number')} {'is' if wrong == 1 else 'are'}"
        found.faults.append(
            f"{output.parameter} in {file.path.name}: {many} not base + adapter; the farthest, at {place}, is {told}: "
            f"{worst:.3g} times as far as one rounding explains"
        )
    return found


def half_unit(values: Floats, dtype: str) -> Floats:
    """Half the distance between neighbours of `dtype` at each value: what one rounding may change."""
    _, exponent = np.frexp(values)  # values = m 2^exponent, m from 1/2 to below 1
    return np.ldexp(1.0, np.maximum(exponent - 1, LOWEST[dtype]) - MANTISSA[dtype] - 1)


def before_rounding(way: Making, row: int, due: Floats, old: Floats) -> Floats | float:
    """How far fp32 may be from the exact result `due` of a cut that begins at `row`; `old` is what the base has there."""
    update, rows = way.update, slice(row, row + len(due))
    if way.value is not None or update is None:
        return 0.0
    if isinstance(update, Scaled):
        if update.shift is None:
            return UNIT * np.abs(due)
        return 2 * UNIT * np.abs(update.scale[rows]) * (np.abs(old) + np.abs(update.shift[rows]))
    assert isinstance(update, Added)
    a, b = update.a, update.b[rows]
    error: Floats = (len(a) + 2) * UNIT * (np.abs(old) + np.abs(b) @ np.abs(a))
    if update.magnitude is None:
        return error
    length = np.linalg.norm(old + b @ a, axis=1, keepdims=True)
    gain = np.abs(update.magnitude[rows, None]) / length
    return gain * error + (np.linalg.norm(error, axis=1, keepdims=True) / length + SUMS) * np.abs(due)


# ---- a base with more tokens -----------------------------------------------------------------------------------------


def compare_extended(base: Checkpoint, extended: Checkpoint, *, tokens: int, grown: list[str]) -> list[str]:
    """Of a base with a larger vocabulary: the first `tokens` rows of the tensors that have `grown`, and all of every other one, must be
    the base's byte for byte. One line for each tensor that is not."""
    faults = []
    mine, theirs = base.shards(), extended.shards()
    faults += [f"{name} is missing" for name in mine if name not in theirs] + [
        f"{name} is left over" for name in theirs if name not in mine
    ]
    for name in (name for name in mine if name in theirs):
        with SafetensorsFile(mine[name]) as one, SafetensorsFile(theirs[name]) as other:
            info, its = one.tensors[name], other.tensors[name]
            size = info.size // info.shape[0] * tokens if name in grown else info.size
            same = info.dtype == its.dtype and info.shape[1:] == its.shape[1:] and its.size >= size and (name in grown or its.size == size)
            if not same or not all(
                one_part == other_part for one_part, other_part in zip(first(one, name, size), first(other, name, size), strict=True)
            ):
                faults.append(f"{name} is not the base's" + (f" in its first {tokens:,} rows" if name in grown else ""))
    return faults


# ---- a deeper base ---------------------------------------------------------------------------------------------------


def audible_layers(model: Checkpoint) -> list[int]:
    """Of the layers that LLaMA-Pro inserted into a whole model, those that add something to what passes through: they have learnt."""
    config, heard = model.config(), set()
    stored = {tensor_name(name, config): name for name in model.shards()}
    for layer in config.llama_pro_layers:
        for parameter in (parameter for parameter in stored if parameter.startswith(f"model.layers.{layer}.")):
            fill = config.silence(parameter)
            if fill is not None and not holds_only(fill, model.shards()[stored[parameter]], stored[parameter]):
                heard.add(layer)
    return sorted(heard)


def holds_only(number: float, path: Path, name: str) -> bool:
    with SafetensorsFile(path) as file:
        return all(bool((block == number).all()) for block in blocks(file, name))


def compare_expanded(base: Checkpoint, expanded: Checkpoint, positions: Sequence[int]) -> list[str]:
    """Of a base with new blocks behind the layers `positions`: each must be a copy of the layer before it, but silent, and every other
    tensor the base's, byte for byte. One line for each tensor that is not. UserError where the two do not go together."""
    model = new_model(base, base.config(), Tuning(inserted=tuple(positions)), dtype=None, trained=False)
    theirs = expanded.shards()
    outputs = {output.name: (path, output) for path, found in model.outputs.items() for output in found}
    faults = [f"{name} is missing" for name in outputs if name not in theirs]
    faults += [f"{name} is left over" for name in theirs if name not in outputs]
    for name, (path, output) in outputs.items():
        if name not in theirs:
            continue
        with SafetensorsFile(path) as one, SafetensorsFile(theirs[name]) as other:
            if not fits(output, other, name):
                faults.append(f"{name} has another dtype or shape")
            elif output.source is not None and not same_bytes(one, output.source, other, name):
                faults.append(f"{name} is not the base's {output.source}")
        if output.fill is not None and not holds_only(output.fill, theirs[name], name):
            faults.append(f"{name} is not silent: it holds other numbers than {output.fill:g}")
    return faults


def first(file: SafetensorsFile, name: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a tensor."""
    start = file.tensors[name].start
    for done in range(0, size, PART):
        part = bytearray(min(PART, size - done))
        file.read_into(start + done, memoryview(part))
        yield bytes(part)
