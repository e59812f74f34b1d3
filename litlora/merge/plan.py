"""Everything that could stop a merge, looked at before anything is written."""

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import check_free_space, check_outside, check_writable
from litlora.checkpoint.reading import sha256
from litlora.config import Config
from litlora.errors import UserError
from litlora.merge.outputs import LowRank, NewModel, Output, Rows, new_model
from litlora.merge.tensors import BLOCK, Floats, read_float32
from litlora.methods.tuning import Tuning, why_unmergeable
from litlora.peft import check_tensors, copied_base_tensor
from litlora.safetensors_file import DTYPES, FLOAT_BYTES, SafetensorsFile


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that nothing speaks against any more."""

    checkpoint: Checkpoint
    tuning: Tuning
    model: NewModel
    out_dir: Path
    overwrite: bool
    adapter: Path
    adapter_sha256: str


def prepare(checkpoint: Checkpoint, out_dir: Path | None = None, *, dtype: str = "keep", overwrite: bool = False) -> Plan:
    """Look at everything that could stop the merge before anything is written. UserError says what does."""
    if checkpoint.is_model:
        merged = (checkpoint.path / names.MERGE_REPORT).exists()
        what = "it is already merged" if merged else "it is a whole model, without an adapter"
        raise UserError(f"there is nothing to merge: {what}", where=checkpoint.path, hint="name a step: litlora merge_lora out/step-200")
    base, tuning, config = checkpoint.base(), checkpoint.tuning(), checkpoint.config()
    refuse_unmergeable(checkpoint)
    out_dir = out_dir or checkpoint.path / names.MERGED
    check_out_dir(out_dir, base, overwrite)
    adapter = checkpoint.adapter_file()
    record = checkpoint.manifest.files.get(adapter.name) if checkpoint.manifest else None  # compared when the step was resolved
    plan = Plan(
        checkpoint=checkpoint,
        tuning=tuning,
        model=new_model(base, config, tuning, dtype=None if dtype == "keep" else DTYPES[dtype], trained=True),
        out_dir=out_dir,
        overwrite=overwrite,
        adapter=adapter,
        adapter_sha256=record.sha256 if record else sha256(adapter),
    )
    check_adapter(plan)
    check_free_space(out_dir, plan.model.bytes + 2**24)
    return plan


def refuse_unmergeable(checkpoint: Checkpoint) -> None:
    if why := why_unmergeable(checkpoint.tuning(), checkpoint.config()):
        hint = f"use it unmerged: litlora chat {shlex.quote(str(checkpoint.path))}"
        raise UserError(f"cannot be merged: {why}", where=checkpoint.path, hint=hint)


def check_out_dir(out_dir: Path, base: Checkpoint, overwrite: bool) -> None:
    check_outside(out_dir, base.path)
    if os.path.lexists(out_dir):
        earlier = (out_dir / names.MERGE_REPORT).is_file() and not out_dir.is_symlink()
        if not earlier:
            raise UserError("exists and is no earlier merge", where=out_dir, hint="--out_dir another directory")
        if not overwrite:
            raise UserError("holds a merged model already", where=out_dir, hint="--overwrite replaces it, once the new one is complete")
    check_writable(out_dir)


# ---- the adapter's file ----------------------------------------------------------------------------------------------


def check_adapter(plan: Plan) -> None:
    """It holds exactly what the tuning needs; its numbers are finite, and not all without effect."""
    with SafetensorsFile(plan.adapter) as file:
        check_adapter_file(file, plan.tuning, plan.model)
        if not has_effect(plan.model, file):
            told = "; ".join(why_without_effect(plan.model))
            raise UserError(f"the adapter changes nothing: {told}", where=plan.adapter, hint="train it first, or use the base as it is")


def check_adapter_file(file: SafetensorsFile, tuning: Tuning, model: NewModel) -> None:
    """It holds exactly what the tuning needs, of finite numbers, and all of it goes into the model."""
    check_values(file, tuning, model.base_config)
    parameters = tuning.file_names(model.base_config)
    left = set(parameters.values()) - {parameters[name] for output in model for name in used(output)}
    assert not left, f"nothing in the merged model is made of {left}"


def check_values(file: SafetensorsFile, tuning: Tuning, config: Config) -> None:
    """It holds exactly what the tuning needs, of finite numbers; `config` is the base's."""
    expected = tuning.file_shapes(config)
    found = {name: info.shape for name, info in file.tensors.items() if copied_base_tensor(name) is None}
    check_tensors(found, expected, file.path)
    odd = [f"{name} is {file.tensors[name].dtype}" for name in expected if file.tensors[name].dtype not in FLOAT_BYTES]
    infinite = [] if odd else [name for name in expected if not all(np.isfinite(block).all() for block in blocks(file, name))]
    for what, faults in (("are no floating-point numbers", odd), ("hold values that are not finite", infinite)):
        if faults:
            raise UserError("\n  ".join([f"these tensors {what}:", *faults]), where=file.path, hint="use an earlier step")
    check_twins(file, tuning.file_names(config))


def check_twins(file: SafetensorsFile, parameters: Mapping[str, str]) -> None:
    """PEFT stores a matrix that embedding and head share under both names: it must be the same under both."""
    first: dict[str, str] = {}
    for stored, parameter in parameters.items():
        twin = first.setdefault(parameter, stored)
        pairs = zip(blocks(file, twin), blocks(file, stored), strict=True) if twin != stored else ()
        if not all(np.array_equal(one, other) for one, other in pairs):
            raise UserError(f"{stored} differs from {twin}, with which it is to share a matrix", where=file.path)


def has_effect(model: NewModel, adapter: SafetensorsFile) -> bool:
    """Whether the model computes anything else than its base. Looks no further than the first difference."""
    for path, outputs in model.outputs.items():
        with SafetensorsFile(path) as base:
            if any(tells(output, base, adapter) for output in outputs if output.can_tell):
                return True
    return False


def tells(output: Output, base: SafetensorsFile, adapter: SafetensorsFile) -> bool:
    """Whether one tensor becomes another by what was trained."""
    update, value = output.update, output.value
    if isinstance(update, LowRank) and (update.magnitude is not None or (update.factor != 0 and read_float32(adapter, update.b).any())):
        return True
    if isinstance(update, Rows):
        shifted = update.shift is not None and bool(read_float32(adapter, update.shift).any())
        return shifted or bool((read_float32(adapter, update.scale) != 1).any())
    if value is None:
        return False
    if output.source is None:
        return any((block != (output.fill or 0.0)).any() for block in blocks(adapter, value))
    pairs = zip(blocks(adapter, value), blocks(base, output.source), strict=True)
    return not all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def why_without_effect(model: NewModel) -> Iterator[str]:
    told = [output for output in model if output.can_tell]
    if any(isinstance(output.update, LowRank) for output in told):
        yield "every lora_B is zero"
    if any(isinstance(output.update, Rows) for output in told):
        yield "every scale is 1 and every shift 0"
    if any(output.is_changed and output.value for output in told):
        yield "what was trained whole equals the base"
    if any(output.in_new_layer for output in told):
        yield "the new blocks add zero to what passes through them"


def used(output: Output) -> list[str]:
    """The adapter's tensors that an output is made of."""
    update = output.update
    parts = (update.a, update.b, update.magnitude) if isinstance(update, LowRank) else (update.scale, update.shift) if update else ()
    return [name for name in (output.value, *parts) if name is not None]


def blocks(file: SafetensorsFile, name: str) -> Iterator[Floats]:
    """A tensor in fp32, some megabytes at a time."""
    size = file.tensors[name].size // FLOAT_BYTES[file.tensors[name].dtype]
    for start in range(0, size, BLOCK):
        yield read_float32(file, name, start, min(BLOCK, size - start))
