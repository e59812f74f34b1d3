"""From an adapter to the model it was trained on. Where a manifest recorded that model's fingerprint, no other is accepted."""

import os
from collections.abc import Iterator
from pathlib import Path

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.manifest import BaseRecord
from litlora.checkpoint.resolve import demo_base, kind_of, resolve
from litlora.errors import UserError


def find_base(adapter: Checkpoint) -> Checkpoint:
    """The base of a step or a PEFT adapter: `base_dir` if the user gave one, else where it was, else the same way from here."""
    record = adapter.manifest.base if adapter.manifest else None
    found = likely_bases(adapter)
    if not found:
        raise _missing(adapter, record.path if record else recorded_name(adapter))
    if record is None or adapter.looks_only:
        return found[0]
    for base in found:
        if base.fingerprint() == record.fingerprint:
            return base
    check_fingerprint(found[0], record, adapter.path)
    raise AssertionError("the first base was just seen to differ")


def likely_bases(adapter: Checkpoint) -> list[Checkpoint]:
    """The models that are where its base should be, most likely first; whether their weights are the right ones nobody looked."""
    if adapter.base_dir is not None:
        return [_as_model(resolve(adapter.base_dir))]
    record = adapter.manifest.base if adapter.manifest else None
    name = record.path if record else recorded_name(adapter)
    places = list(_places(adapter.path, name, record))
    likely = [path for path in places if kind_of(path)] or [path for path in places if os.path.isabs(name)]
    return [_as_model(resolve(path)) if path != names.DEMO_BASE else demo_base() for path in likely]


def recorded_name(adapter: Checkpoint) -> str:
    """What a PEFT adapter calls its base."""
    name = adapter.peft_values().get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        where = f"{adapter.path / names.ADAPTER_CONFIG}: base_model_name_or_path"
        raise UserError(f"a path or a name is needed, found {name!r}", where=where)
    return name


def check_fingerprint(base: Checkpoint, record: BaseRecord, adapter: Path) -> None:
    """UserError with both fingerprints where `base` holds other weights than those recorded. Nothing overrides it."""
    found = base.fingerprint()
    if found != record.fingerprint:
        raise UserError(
            f"was not trained on {base.path}: its weights are others",
            where=adapter,
            context=(f"recorded: {record.fingerprint} ({record.path})", f"found:    {found}"),
            hint="give the directory of the base it was trained on as --base_dir",
        )


def _places(adapter: Path, name: str, record: BaseRecord | None) -> Iterator[Path]:
    """Directories that exist, each once, most likely first."""
    seen: set[str] = set()
    candidates = [Path(name), adapter / name] if name else []
    if name == names.DEMO and (record or not Path(name).exists()):  # we record the demo by that word, and folders by their whole path
        candidates = [names.DEMO_BASE]
    elif record and record.relative:
        candidates.append(adapter / record.relative)
    for path in candidates:
        real = os.path.realpath(path)
        if path.is_dir() and real != os.path.realpath(adapter) and real not in seen:
            seen.add(real)
            yield path


def _as_model(found: Checkpoint) -> Checkpoint:
    if not found.is_model:
        raise UserError(
            "is an adapter; the base of an adapter is a whole model", where=found.path, hint="give the base's directory as --base_dir"
        )
    return found


def _missing(adapter: Checkpoint, name: str) -> UserError:
    if not name:
        what = "does not say which base it belongs to, and an adapter holds no base weights"
        return UserError(what, where=adapter.path / names.ADAPTER_CONFIG, hint="give the base's directory as --base_dir")
    what = f"its base is not there: {name}. An adapter holds no base weights"
    looks_remote = not os.path.isabs(name) and name.count("/") == 1
    hint = (
        f"litlora download {name}, then give its directory as --base_dir"
        if looks_remote
        else "if the base moved, give its directory as --base_dir"
    )
    return UserError(what, where=adapter.path, hint=hint)
