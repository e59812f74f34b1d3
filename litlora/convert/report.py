"""convert_report.json: what a result was made from, what became of every tensor, and that it was read again. No time: equal input
gives equal bytes."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litlora import __version__
from litlora.checkpoint import names
from litlora.checkpoint.files import as_json
from litlora.checkpoint.reading import sha256
from litlora.convert.parts import Part, differing
from litlora.convert.sources import Adapter, Model
from litlora.errors import WorkError


def made_from(source: Model | Adapter) -> dict[str, Any]:
    """Where it comes from: the path, what that is, and every file of weights that was read."""
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in source.read}
    return {"path": str(source.path.resolve()), "kind": source.kind, "files": files}


def make_report(source: Model | Adapter, to: str, proof: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What convert_report.json says. `proof` is what reading the result again gave."""
    return {
        "format_version": 1,
        "litlora": __version__,
        "from": made_from(source),
        "to": to,
        **more,
        "renamed": dict(sorted(source.origins.items())),
        "dropped": dict(sorted(source.dropped.items())),
        "proof": dict(proof),
    }


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    (directory / names.CONVERT_REPORT).write_bytes(as_json(dict(report)))


def compared(expected: Mapping[str, Part], found: Mapping[str, Part], where: Path) -> dict[str, Any]:
    """The proof: what lies on the disk against the source, tensor by tensor. WorkError with the names of those that differ."""
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} was not asked for" for name in found if name not in expected]
    told = {name: differing(part, found[name]) for name, part in expected.items() if name in found}
    faults += [f"{name} {why}" for name, why in told.items() if why]
    if faults:
        raise WorkError("\n  ".join(["the result is not what it was made from:", *faults]), where=where, hint="report this")
    rounded = sum(part.dtype != found[name].dtype for name, part in expected.items())
    return {
        "tensors": len(found),
        "equal": len(found) - rounded,
        "rounded_once": rounded,
        "dtypes": dict(sorted(Counter(part.dtype for part in found.values()).items())),
    }
