"""litlora.json: what a checkpoint is, where it comes from, and the hash of every file in it.

The manifest is sealed: its last field is the sha256 of the rest, and its bytes must be exactly those that `seal` writes, so that
one flipped bit anywhere in it is found. It is written last; a directory without a sound one is no checkpoint.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.reading import is_plain_name, parse_json, read_bytes, sha256
from litlora.console import counted
from litlora.errors import UserError
from litlora.safetensors_file import Raw

FORMAT_VERSION = 3  # 2: `lineage`; 3: `base.quantize`. What earlier ones wrote is read as it is
LARGEST = 2**63  # no count of a step or a token comes near it
SEAL = "sha256"  # the last field of a sealed file


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What one file was when it was committed."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """The model that an adapter was trained on."""

    path: str  # absolute, or "demo"
    model_type: str
    fingerprint: str  # of all its weights: fingerprint.py
    relative: str = ""  # the same directory as seen from the step: a run and its base may move together
    quantize: str = "none"  # in which few bits training held its weights (quantized.py); the base itself is what it was


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The fields of litlora.json. Losses are means per graded token, in nats; None where none was measured."""

    method: str  # lora, full
    options: dict[str, Any]  # of the method: r, alpha, target_modules ...
    step: int  # optimizer steps done; 0 where nobody knows, as of a converted adapter
    epoch: float  # passes over the training rows done
    tokens: int  # tokens computed so far
    train_loss: float | None = None
    val_loss: float | None = None
    base: BaseRecord | None = None  # None: the directory is a whole model itself
    tokenizer: str = ""  # hash of the tokenizer
    chat_template: str = ""  # hash of the template that was trained with
    data: str = ""  # fingerprint of the training rows and how they were read
    parent: str | None = None  # the step that this training started from
    lineage: tuple[dict[str, Any], ...] = ()  # what else made it what it is, oldest first: {"event": "resumed", "changed": ...}
    versions: dict[str, str] = field(default_factory=dict)  # litlora, torch ...
    files: dict[str, FileRecord] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def with_files(self, written: Mapping[str, FileRecord]) -> "Manifest":
        """The same with the size and sha256 of every file that was written and is to be covered."""
        return replace(self, files={name: written[name] for name in sorted(written) if name not in names.UNCOVERED})

    def encode(self) -> bytes:
        """The bytes of litlora.json."""
        assert all(loss is None or math.isfinite(loss) for loss in (self.train_loss, self.val_loss)), (
            "a loss that is no number is never committed"
        )
        return seal(asdict(self))


def records_of(directory: Path) -> dict[str, FileRecord]:
    """The size and sha256 of every file in a directory that is about to get its manifest."""
    return {path.name: FileRecord(size=path.stat().st_size, sha256=sha256(path)) for path in directory.iterdir()}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a step. UserError where it is missing, altered, or written by a newer litlora."""
    path = directory / names.MANIFEST
    values = unseal(read_bytes(path), path)
    try:
        return _from_fields(values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"is no manifest: {error}", where=path) from error


def verify_files(directory: Path, manifest: Manifest, *, hashed: bool = True) -> list[str]:
    """What is wrong with the files that the manifest covers, one line each with the file's name; empty: all are whole.

    `hashed=False` compares their sizes and reads none of them.
    """
    return check_files(directory, manifest.files, hashed=hashed)


def check_files(directory: Path, records: Mapping[str, FileRecord], *, hashed: bool = True) -> list[str]:
    """What differs from `records`, one line per file."""
    return [fault for name, record in records.items() if (fault := _file_fault(directory / name, record, hashed=hashed))]


# ---- sealed files ----------------------------------------------------------------------------------------------------


def seal(values: Mapping[str, Any]) -> bytes:
    """JSON of `values` with the hash of exactly that JSON as one more field at its end."""
    assert SEAL not in values
    body = _json(values)
    return _json({**values, SEAL: hashlib.sha256(body).hexdigest()})


def unseal(raw: bytes, where: Path) -> dict[str, Any]:
    """What `seal` was given. UserError where a single bit differs, or the format is newer than this litlora."""
    values = parse_json(raw, where)
    version = values.get("format_version")
    newer = type(version) is int and version > FORMAT_VERSION
    values.pop(SEAL, None)
    try:
        intact = seal(values) == raw
    except ValueError:  # half a surrogate pair: nothing that seal ever wrote
        intact = False
    if newer:
        raise UserError(
            f"has format {version}, newer than this litlora's {FORMAT_VERSION}" + ("" if intact else ", or is damaged"),
            where=where,
            hint="update litlora",
        )
    if not intact:
        raise UserError("was altered: its contents do not match its own sha256", where=where)
    if type(version) is not int or version < 1:
        raise UserError("has no format_version", where=where)
    return values


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


# ---- details ---------------------------------------------------------------------------------------------------------


def _from_fields(values: dict[str, Any]) -> Manifest:
    """Checked by kind: a sealed file is intact, but whoever sealed it may have been somebody else."""
    known = {item.name for item in fields(Manifest)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    base = values.get("base")
    files = {name: FileRecord(**record) for name, record in values.get("files", {}).items()}
    lineage = values.get("lineage", [])
    _check_lineage(lineage, "lineage")
    records = {"base": BaseRecord(**base) if base is not None else None, "files": files, "lineage": tuple(lineage)}
    manifest = Manifest(**{**values, **records})
    for name, record in files.items():
        if not is_plain_name(name) or type(record.size) is not int or not isinstance(record.sha256, str):
            raise ValueError(f"files: {name!r} is no file's record")
    if (
        type(manifest.step) is not int
        or not 0 <= manifest.step < LARGEST
        or not isinstance(manifest.method, str)
        or not isinstance(manifest.options, dict)
    ):
        raise ValueError("step, method or options have the wrong kind")
    numbers = {"epoch": manifest.epoch, "train_loss": manifest.train_loss, "val_loss": manifest.val_loss}
    for name, number in numbers.items():
        if number is None and name != "epoch":
            continue
        if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) < LARGEST:  # no NaN either
            raise ValueError(f"{name} is no number that could be meant")
    if type(manifest.tokens) is not int or not 0 <= manifest.tokens < LARGEST:
        raise ValueError("tokens is no count")
    texts = (manifest.tokenizer, manifest.chat_template, manifest.data, *([] if manifest.parent is None else [manifest.parent]))
    if not all(isinstance(text, str) for text in texts) or not is_texts(manifest.versions):
        raise ValueError("tokenizer, chat_template, data, parent or versions are no text")
    if manifest.base and not all(isinstance(value, str) for value in asdict(manifest.base).values()):
        raise ValueError("base: its fields are no text")
    return manifest


def _check_lineage(lineage: Any, where: str) -> None:
    """Events of any name; of those that are read again, `combined`, what is needed of each parent. ValueError naming the field."""
    if not isinstance(lineage, list) or not all(isinstance(entry, dict) and isinstance(entry.get("event"), str) for entry in lineage):
        raise ValueError(f"{where}: an entry is no event")
    for number, event in enumerate(lineage):
        if event["event"] != "combined":
            continue
        parents, place = event.get("parents"), f"{where}[{number}].parents"
        if not isinstance(parents, list) or not all(isinstance(parent, dict) for parent in parents):
            raise ValueError(f"{place} is no list of parents")
        for which, parent in enumerate(parents):
            digest = "fingerprint" if "fingerprint" in parent else "sha256"
            for name in ("path", digest):
                if not isinstance(parent.get(name), str):
                    raise ValueError(f"{place}[{which}].{name} is no text")
            weight = parent.get("weight")
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not abs(weight) < math.inf:  # no NaN either
                raise ValueError(f"{place}[{which}].weight is no finite number")
            _check_lineage(parent.get("lineage", []), f"{place}[{which}].lineage")


def is_texts(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(text, str) for text in values.values())


def _file_fault(path: Path, record: FileRecord, *, hashed: bool = True) -> str:
    """One line about one file, or nothing."""
    if not path.is_file() or path.is_symlink():
        return f"{path.name} is missing" if not path.exists() else f"{path.name} is no regular file"
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{path.name} has {counted(size, 'byte')} instead of {record.size:,}"
        return "" if not hashed or sha256(path) == record.sha256 else f"{path.name} was altered (its sha256 differs)"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


# ---- training state --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What training needs to go on, beside the weights: raw tensors (name -> dtype, shape, bytes) and values that JSON can hold."""

    tensors: Mapping[str, tuple[str, Sequence[int], Raw]]
    values: Mapping[str, Any]


def encode_state(tensors: FileRecord, manifest: Manifest, values: Mapping[str, Any]) -> bytes:
    """The bytes of training_state.json: hash of the tensors beside it, and of the checkpoint that both belong to."""
    files = {names.TRAINING_STATE: asdict(tensors)}
    own = {"format_version": FORMAT_VERSION, "step": manifest.step, "checkpoint": _identity(manifest), "files": files}
    return seal({**own, "values": dict(values)})


def has_state(directory: Path) -> bool:
    """Whether a step kept its training state, or a part of it. Deleting both files is no damage."""
    return any((directory / name).exists() for name in (names.TRAINING_STATE, names.TRAINING_STATE_META))


def verify_state(directory: Path, manifest: Manifest, *, hashed: bool = True) -> list[str]:
    """What is wrong with a step's training state, one line per file; empty where it is whole, and where there is none."""
    if not has_state(directory):
        return []
    try:
        read_state(directory, manifest, hashed=hashed)
    except UserError as error:
        return [f"{Path(error.where).name} {error.what}"]
    return []


def read_state(directory: Path, manifest: Manifest, *, hashed: bool = True) -> dict[str, Any]:
    """The values of training_state.json, after checking both files' hashes. UserError names the one that was altered.

    `hashed=False`: of the tensors the size alone.
    """
    path = directory / names.TRAINING_STATE_META
    stored = unseal(read_bytes(path), path)
    if stored.get("checkpoint") != _identity(manifest):
        raise UserError("belongs to another checkpoint", where=path)
    try:
        records = {name: FileRecord(**record) for name, record in stored["files"].items()}
        values = stored["values"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"is no training state: {error}", where=path) from error
    if records.keys() != {names.TRAINING_STATE} or not isinstance(values, dict):
        raise UserError("is no training state", where=path)
    for name, record in records.items():
        if fault := _file_fault(directory / name, record, hashed=hashed):
            raise UserError(fault.removeprefix(f"{name} "), where=directory / name)
    return values


def _identity(manifest: Manifest) -> str:
    """One hash for the step's number and all its covered files."""
    return hashlib.sha256(
        _json({"step": manifest.step, "files": {name: asdict(record) for name, record in manifest.files.items()}})
    ).hexdigest()
