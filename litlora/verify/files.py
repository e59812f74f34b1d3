"""Files and tensors against what was written down about them. Every byte is read; nothing is taken from a cache. No torch."""

from pathlib import Path

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.fingerprint import combine, tensor_digests
from litlora.checkpoint.manifest import unseal
from litlora.checkpoint.reading import read_bytes, read_json, sha256
from litlora.checkpoint.shards import find_shards
from litlora.errors import UserError
from litlora.merge.outputs import base_files
from litlora.merge.plan import blocks, check_values
from litlora.safetensors_file import FLOAT_BYTES, SafetensorsFile


def reread(directory: Path, report_name: str = names.MERGE_REPORT) -> list[str]:
    """What differs from the directory's own report (of a merge, or of an extended vocabulary), one line each."""
    report = read_json(directory, report_name)
    if report.get("format_version") != 1:  # from 2 on it has a hash of its own
        report = unseal(read_bytes(directory / report_name), directory / report_name)
    weights, files = report.get("weights"), report.get("files")
    if not isinstance(weights, dict) or not isinstance(files, dict):
        raise UserError("holds no hashes", where=directory / report_name)
    found = tensor_digests(find_shards(directory), use_cache=False)
    faults = [f"{name} is missing" for name in weights if name not in found]
    faults += [f"{name} was added" for name in found if name not in weights]
    faults += [f"{name} was altered" for name in weights if name in found and found[name] != weights[name]]
    for name, recorded in files.items():
        path = directory / name
        if not path.is_file() or sha256(path) != recorded:
            faults.append(f"{name} was altered" if path.is_file() else f"{name} is missing")
    return faults


def base_faults(adapter: Checkpoint, recorded: str | None = None) -> list[str]:
    """Its base's fingerprint, computed from the files as they are now, against the one in its manifest, or else the `recorded` one."""
    base = adapter.base()
    if adapter.manifest is not None and adapter.manifest.base is not None:
        recorded = adapter.manifest.base.fingerprint
    if recorded is None:
        return []
    found = combine(tensor_digests(base.shards(), use_cache=False))
    return [] if found == recorded else [f"{base.path} holds other weights: {found} instead of {recorded}"]


def model_faults(model: Checkpoint) -> list[str]:
    """Tensors of a whole model that are not finite. UserError where they are not those of its config.json."""
    faults = []
    for path in base_files(model, model.config()):
        with SafetensorsFile(path) as file:
            faults += [f"{path.name}: {name} holds values that are not finite" for name in file.tensors if not is_finite(file, name)]
    return faults


def is_finite(file: SafetensorsFile, name: str) -> bool:
    """Whether every number of a tensor is one; whole numbers always are."""
    return file.tensors[name].dtype not in FLOAT_BYTES or all(bool(np.isfinite(block).all()) for block in blocks(file, name))


def adapter_faults(adapter: Checkpoint) -> list[str]:
    """UserError where its tensors are not those of its method, or not finite."""
    with SafetensorsFile(adapter.adapter_file()) as file:
        check_values(file, adapter.tuning(), adapter.config())
    return []
