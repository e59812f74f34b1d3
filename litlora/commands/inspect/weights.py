"""What a checkpoint's weights say: counts and dtypes from the headers of its files, its base, and how far training moved it."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.base import likely_bases, recorded_name
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.fingerprint import is_remembered
from litlora.checkpoint.manifest import LARGEST
from litlora.checkpoint.reading import READ_UNASKED, read_json
from litlora.checkpoint.resolve import resolve
from litlora.console import amount
from litlora.errors import UserError
from litlora.families import expected_tensors
from litlora.methods.tuning import Tuning
from litlora.peft import check_tensors, copied_base_tensor
from litlora.safetensors_file import SafetensorsFile


def counted(files: Iterable[Path]) -> dict[str, Any]:
    """What lies in safetensors files, from their headers. UserError where one is not sound."""
    tensors, parameters, dtypes = 0, 0, dict[str, int]()
    for path in sorted(set(files)):
        with SafetensorsFile(path) as file:
            tensors += len(file.tensors)
            for info in file.tensors.values():
                parameters += math.prod(info.shape)
                dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
    return {"tensors": tensors, "parameters": parameters, "dtypes": dtypes}


def model_of(checkpoint: Checkpoint, *, check: bool) -> dict[str, Any]:
    """The shape of a whole model, and what its files hold. UserError where it is no model that litlora knows."""
    config, shards = checkpoint.config(), checkpoint.shards()
    known = check or is_cheap(checkpoint)
    return {
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "new_layers": list(config.llama_pro_layers),
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "tied": config.tie_word_embeddings,
        **counted(shards.values()),
        "fingerprint": checkpoint.fingerprint() if known else None,
    }


def weight_bytes(model: Checkpoint) -> int:
    return sum(path.stat().st_size for path in set(model.shards().values()))


def is_cheap(model: Checkpoint) -> bool:
    """Whether its fingerprint can be had in a moment: it is small, or was read before."""
    return weight_bytes(model) <= READ_UNASKED or is_remembered(model.shards())


# ---- the base of an adapter ------------------------------------------------------------------------------------------


def base_of(adapter: Checkpoint, *, check: bool) -> tuple[Checkpoint, dict[str, Any]]:
    """The adapter with its base found, and what is to be said of that base.

    `state`: same, other, missing, unusable; unrecorded: a PEFT adapter does not say which weights it was trained on; unchecked: large,
    never read before, and nobody asked for it to be read.
    """
    record = adapter.manifest.base if adapter.manifest else None
    said = {"recorded": record.path if record else None, "fingerprint": record.fingerprint if record else None, "path": None, "why": None}
    said["quantize"] = adapter.quantize
    state = "unusable"
    try:
        said["recorded"] = record.path if record else recorded_name(adapter) or None
        found = likely_bases(adapter)
        state = "missing"
        if found:
            state, said["path"] = "unusable", str(found[0].path)
            cheap = check or record is None or all(map(is_cheap, found))
            state, adapter = "other", adapter if cheap else replace(adapter, looks_only=True)
        said["path"] = str(adapter.base().path)  # where it has one, its fingerprint is compared here
        state = "unrecorded" if record is None else "same" if cheap else "unchecked"
    except UserError as error:
        said["why"] = told(error, adapter.path)
    return adapter, said | {"state": state}


def told(error: UserError, known: Path | None = None) -> str:
    """All of it in one line, but for the hint, and for the path that is `known`."""
    return "; ".join([error.what if error.where == str(known) else str(error), *error.context])


def check_shapes(adapter: Checkpoint, tuning: Tuning) -> None:
    """UserError listing what its file lacks, or has too much of, for what it says that it does to its base."""
    with SafetensorsFile(adapter.adapter_file()) as file:
        found = {name: info.shape for name, info in file.tensors.items() if copied_base_tensor(name) is None}
    check_tensors(found, tuning.file_shapes(adapter.config()), adapter.adapter_file())


# ---- what changed ----------------------------------------------------------------------------------------------------


def what_moved(checkpoint: Checkpoint, base_state: str | None, *, check: bool) -> tuple[dict[str, float] | None, float | None, str | None]:
    """(by module, as a share of what was there: movement.py; lost to rounding; why neither is known)."""
    if (checkpoint.path / names.MERGE_REPORT).exists():
        return of_merge(checkpoint)
    if checkpoint.kind == "base":
        return None, None, None
    if base_state in ("other", "missing", "unusable"):
        return None, None, "its base is not there to be compared with"
    before = origin(checkpoint)
    if before is None:
        return None, None, "the model that it changed is not there any more"
    size = weight_bytes(before) + (weight_bytes(checkpoint) if checkpoint.is_model else 0)
    if size > READ_UNASKED and not check:
        return None, None, f"{amount(size)} would have to be read: --check does"
    from litlora.checkpoint.movement import lost_to_rounding, movement

    try:
        moved = movement(checkpoint, before)
        return {name: far for name, far in moved.items() if math.isfinite(far)}, lost_to_rounding(checkpoint, before), None
    except UserError as error:
        return None, None, str(error)


def of_merge(merged: Checkpoint) -> tuple[dict[str, float] | None, float | None, str | None]:
    """What the merge itself measured and reported."""
    try:
        report = read_json(merged.path, names.MERGE_REPORT)
    except UserError as error:
        return None, None, str(error)
    modules = report.get("modules")
    figures = (
        {name: one.get("relative_norm") for name, one in modules.items() if isinstance(one, dict)} if isinstance(modules, dict) else {}
    )
    moved = {name: far for name, value in figures.items() if (far := share(value)) is not None}
    unknown = "what was trained is in the new layers" if report.get("new_layers") else "its report does not say"
    return moved or None, share(report.get("update_lost_to_rounding")), None if moved else unknown


def share(value: Any) -> float | None:
    """A number that a report may hold; None for anything else."""
    return float(value) if type(value) in (int, float) and abs(value) < LARGEST else None


def origin(checkpoint: Checkpoint) -> Checkpoint | None:
    """The model that it changed, where that is still there and of the same shape."""
    try:
        if not checkpoint.is_model:
            return checkpoint.base()
        start, seen = checkpoint, {checkpoint.path.resolve()}
        while start.manifest is not None and start.path.resolve().parent == checkpoint.path.resolve().parent:
            if start.manifest.parent is None or not Path(start.manifest.parent).is_dir():
                return None
            start = resolve(start.manifest.parent)  # a resumed run's steps lead back, one by one, to what it began with
            if start.path.resolve() in seen:
                return None
            seen.add(start.path.resolve())
        shapes, theirs = (expected_tensors(one.config()) for one in (checkpoint, start))
    except UserError:
        return None
    same = all(theirs.get(name, shape) == shape for name, shape in shapes.items()) and start.is_model
    return start if same and start is not checkpoint else None
