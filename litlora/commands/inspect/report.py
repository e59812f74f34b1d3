"""What is known of a path, as one object whose fields are always the same: `--json` prints it, page.py makes lines of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.foreign import Foreign, recognise
from litlora.checkpoint.history import command_of, how_it_ended, leftovers, options_of
from litlora.checkpoint.manifest import Manifest, has_state, read_manifest, read_state
from litlora.checkpoint.note import read_note, tags_of
from litlora.checkpoint.reading import READ_UNASKED, read_json, size_of
from litlora.checkpoint.resolve import (
    best_of,
    demo_base,
    kind_of,
    list_step_paths,
    list_steps,
    names_step_of_run,
    read_step,
    resolve,
    why_best,
)
from litlora.commands.inspect.uses import uses_of, uses_of_run, whole_hint
from litlora.commands.inspect.weights import base_of, check_shapes, counted, model_of, told, what_moved
from litlora.errors import UserError
from litlora.methods.tuning import why_unmergeable

WORDS = {
    "base": "a whole model",
    "merged": "a merged model",
    "expanded": "a model with new layers (LLaMA-Pro)",
    "extended": "a model with more tokens",
    "converted": "a whole model, converted",
    "adapter": "a PEFT adapter",
    "step": "a step of a run",
    "run": "a run",
    "torn": "a step that is torn or was altered",
}
MADE = {"combined": "a combination of checkpoints", "converted": "a converted adapter"}  # by the last event of a manifest
REPORTS = {  # what a directory was made from, and how: the name in the report
    names.MERGE_REPORT: ("adapter", "merged from"),
    names.EXTEND_REPORT: ("base", "extended from"),
    names.EXPAND_REPORT: ("base", "expanded from"),
    names.CONVERT_REPORT: ("from", "converted from"),
}
LONGEST_LINE = 10_000  # ancestors that are followed


@dataclass(kw_only=True)
class Report:
    """None, and nothing in a list, is what is not known or does not apply."""

    path: str
    kind: str  # base, merged, expanded, extended, converted, adapter, step, torn, run; foreign.py's; unknown
    what: str  # the same in words
    chosen: str | None = None  # why this path, where another one was given
    faults: list[str] = field(default_factory=list)
    hashed: bool | None = None  # whether every byte was compared with its hash; None: there are no hashes
    method: str | None = None
    options: dict[str, Any] | None = None  # of the method
    training: dict[str, Any] | None = None
    base: dict[str, Any] | None = None  # of an adapter
    model: dict[str, Any] | None = None  # its own weights, or its base's
    adapter: dict[str, Any] | None = None
    tensors: dict[str, Any] | None = None  # of a single file
    tokenizer: dict[str, Any] | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)  # what it was made from, nearest first
    events: list[dict[str, Any]] = field(default_factory=list)  # what else made it what it is: the manifest's `lineage`
    moved: dict[str, float] | None = None  # by module, as a share of what was there
    lost_to_rounding: float | None = None  # the share of that which its dtype did not keep
    moved_unknown: str | None = None  # why `moved` is not known
    run: dict[str, Any] | None = None
    files: dict[str, int] = field(default_factory=dict)  # name -> bytes
    sizes: dict[str, int] = field(default_factory=dict)  # weights, training state, merged, other, all; bytes
    note: str = ""
    tags: list[str] = field(default_factory=list)
    can: list[dict[str, str]] = field(default_factory=list)  # what it is good for, with the command
    cannot: list[dict[str, str]] = field(default_factory=list)  # and what for not, with the reason


def look(path: str | Path | None, base_dir: Path | None = None, *, check: bool = False) -> Report:
    """What `path` is. UserError where there is nothing at it; OSError where it cannot be looked at."""
    if path is None:
        run = Path(names.RUN)
        path = run if list_step_paths(run) else None
    if path is None or (str(path) == names.DEMO and not Path(path).exists()):
        demo = demo_base() if path else demo_base(why=f"no path was given and there is no run in {names.RUN}")
        return of_model(demo, check=check)
    path = Path(path)
    if not path.exists() and not names_step_of_run(path):
        resolve(path)  # raises: there is nothing, and what was perhaps meant
    if names_step_of_run(path):
        chosen = resolve(path)
        return of_step(chosen.path, base_dir, check=check, chosen=chosen.why)
    named = recognise(path) if path.is_file() or names.temporary_owner(path) is not None or names.is_aside(path) else None
    kind = "" if named or not path.is_dir() else kind_of(path)
    if kind == "run":
        return of_run(path, check=check)
    if kind == "step":
        return of_step(path, base_dir, check=check)
    if kind == "base":
        return of_model(Checkpoint(path, "base"), check=check)
    if kind == "adapter":
        return of_adapter(Checkpoint(path, "adapter", base_dir=base_dir), check=check)
    return of_something(path, named or recognise(path))


def of_something(path: Path, known: Foreign | None) -> Report:
    """What no command loads."""
    found = Report(path=str(path), kind=known.kind if known else "unknown", what=known.what if known else "nothing that litlora knows")
    found.files, found.sizes = files_of(path) if path.is_dir() else ({path.name: path.stat().st_size}, {"all": path.stat().st_size})
    if known is None:
        try:
            resolve(path)
        except UserError as error:
            found.cannot = [{"to": "load", "why": told(error, path)}]
        return found
    if path.suffix == names.SAFETENSORS:
        try:
            found.tensors = counted([path])
        except UserError as error:
            found.faults = [told(error)]
    elif known.kind == "file" and not known.is_weights:
        found.kind = "unknown"
    found.cannot = [{"to": "load", "why": f"{known.why}; {known.advice}" if known.advice else known.why}]
    found.can = [{"to": "go on", "command": known.command}] if known.command else []
    return found


# ---- models and adapters -----------------------------------------------------------------------------------------------


def of_model(checkpoint: Checkpoint, *, check: bool) -> Report:
    path = checkpoint.path
    found = Report(path=str(path), kind="base", what="", chosen=checkpoint.why or None)
    found.files, found.sizes = files_of(path)
    try:
        found.model = model_of(checkpoint, check=check)
    except UserError as error:
        found.faults = [told(error)]
    reports = {names.MERGE_REPORT: "merged", names.EXTEND_REPORT: "extended", names.CONVERT_REPORT: "converted"}
    found.kind = next((kind for name, kind in reports.items() if (path / name).exists()), "base")
    if found.kind in ("base", "converted") and found.model and found.model["new_layers"]:
        found.kind = "expanded"
    found.what = WORDS[found.kind] + (" (the toy that comes with litlora)" if checkpoint.is_demo else "")
    found.lineage = lineage(checkpoint)
    found.moved, found.lost_to_rounding, found.moved_unknown = what_moved(checkpoint, None, check=check)
    found.tokenizer = tokenizer_of(path, path)
    found.can, found.cannot = uses_of(checkpoint, found)
    return found


def of_adapter(checkpoint: Checkpoint, *, check: bool, manifest: Manifest | None = None) -> Report:
    """A PEFT adapter, or (with its manifest) a step that is none of the whole models."""
    path = checkpoint.path
    found = Report(path=str(path), kind=checkpoint.kind, what=WORDS[checkpoint.kind])
    found.files, found.sizes = files_of(path)
    checkpoint, found.base = base_of(checkpoint, check=check)
    has_base = found.base["state"] in ("same", "unrecorded", "unchecked")
    found.tokenizer = tokenizer_of(path, Path(found.base["path"]) if found.base["path"] else None)
    try:
        found.method = checkpoint.method
        found.adapter = {
            "file": checkpoint.adapter_file().name,
            **counted([checkpoint.adapter_file()]),
            "merges": None,
            "why_not": None,
            "new_after": [],
        }
        found.adapter["in_peft"] = found.adapter["file"] == names.ADAPTER_WEIGHTS
        found.options = dict(manifest.options) if manifest else checkpoint.peft_values()
        if has_base:
            found.model = model_of(checkpoint.base(), check=check)
            tuning = checkpoint.tuning()
            check_shapes(checkpoint, tuning)
            why_not = why_unmergeable(tuning, checkpoint.config())
            found.adapter |= {"merges": not why_not, "why_not": why_not or None, "new_after": list(tuning.inserted)}
    except UserError as error:
        found.faults = [told(error)]
    found.moved, found.lost_to_rounding, found.moved_unknown = (
        (None, None, "its files do not fit together") if found.faults else what_moved(checkpoint, found.base["state"], check=check)
    )
    found.lineage = lineage(checkpoint)
    found.can, found.cannot = uses_of(checkpoint, found)
    return found


def of_step(path: Path, base_dir: Path | None, *, check: bool, chosen: str | None = None) -> Report:
    hashed = check or sum(files_of(path)[0].values()) <= READ_UNASKED
    step = read_step(path, hashed=hashed)
    if step.manifest is None or step.faults:
        found = Report(path=str(path), kind="torn", what=WORDS["torn"], faults=list(step.faults), hashed=hashed)
        found.files, found.sizes = files_of(path)
        found.cannot = [{"to": "use it", "why": step.faults[0]}]
        found.can = whole_hint(path)
    else:
        checkpoint = Checkpoint(path, "step", manifest=step.manifest, base_dir=base_dir)
        found = of_model(checkpoint, check=check) if checkpoint.is_model else of_adapter(checkpoint, check=check, manifest=step.manifest)
        found.kind, found.what = "step", WORDS["step"] + (", a whole model" if checkpoint.is_model else "")
        found.method, found.options, found.hashed = step.manifest.method, dict(step.manifest.options), hashed
    if step.manifest:
        found.training = training_of(step.manifest, path, resumable=step.is_resumable, hashed=hashed)
        found.events = [dict(event) for event in step.manifest.lineage]
        if found.events and found.kind == "step":
            found.what = MADE.get(found.events[-1]["event"], found.what)
    found.chosen, found.note = chosen, read_note(path)
    found.tags = tags_of(found.note)
    found.faults += step.state_faults
    return found


def training_of(manifest: Manifest, path: Path, *, resumable: bool, hashed: bool) -> dict[str, Any]:
    """What the manifest says of the training, and what it could have been told otherwise (learning rate, length ...)."""
    settings = None
    if has_state(path):
        try:
            values = read_state(path, manifest, hashed=hashed).get("values")
            settings = values.get("changeable") if isinstance(values, dict) else None
        except UserError:  # is among the faults already
            settings = None
    return {
        "step": manifest.step or None,  # of a converted adapter nobody knows it
        "epoch": manifest.epoch if manifest.step else None,
        "tokens": manifest.tokens if manifest.step else None,
        "train_loss": manifest.train_loss,
        "val_loss": manifest.val_loss,
        "settings": settings if isinstance(settings, dict) else None,
        "resumable": resumable,
        "data": manifest.data,
        "tokenizer": manifest.tokenizer,
        "chat_template": manifest.chat_template,
        "versions": manifest.versions,
    }


# ---- where it comes from -----------------------------------------------------------------------------------------------


def lineage(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What it was made from, nearest first, as far back as the directories are still there."""
    line: list[dict[str, Any]] = []
    here, seen = checkpoint.path, set[Path]()
    while len(line) < LONGEST_LINE and here.resolve() not in seen:
        seen.add(here.resolve())
        relation, place = parent_of(here)
        if not relation:
            break
        ancestor: dict[str, Any] = {"how": relation, "path": place, "exists": place == names.DEMO or Path(place).is_dir()}
        line.append(ancestor)
        try:
            record = read_manifest(Path(place))
            ancestor |= {"method": record.method, "step": record.step or None, "train_loss": record.train_loss, "val_loss": record.val_loss}
        except (UserError, OSError, ValueError):  # a base, or not there any more, or no path
            pass
        here = Path(place)
    return line


def parent_of(path: Path) -> tuple[str, str]:
    """(how, from what) a directory was made, by its own records; nothing where it does not say."""
    try:
        if (path / names.MANIFEST).exists():
            record = read_manifest(path)
            if record.parent is not None:
                beside = Path(record.parent).parent == path.resolve().parent
                return ("resumed from" if beside else "trained on from"), record.parent
            return ("trained on", record.base.path) if record.base else ("", "")
        for name, (key, how) in REPORTS.items():
            if (path / name).exists():
                made_from = read_json(path, name).get(key)
                place = made_from.get("path") if isinstance(made_from, dict) else None
                return (how, place) if isinstance(place, str) else ("", "")
    except (UserError, OSError, ValueError):
        return "", ""
    return "", ""


def tokenizer_of(path: Path, base: Path | None) -> dict[str, Any]:
    """Whose tokenizer and template go with it: `own`, `base` or nothing."""
    places = {"own": path, **({"base": base} if base and base != path else {})}
    return {
        "tokenizer": next((whose for whose, place in places.items() if names.has_vocabulary(place)), None),
        "template": next((whose for whose, place in places.items() if has_template(place)), None),
    }


def has_template(directory: Path) -> bool:
    if (directory / names.CHAT_TEMPLATE).exists() or (directory / names.ADDITIONAL_TEMPLATES).is_dir():
        return True
    try:
        return bool(read_json(directory, names.TOKENIZER_CONFIG).get("chat_template"))
    except UserError:
        return False


def files_of(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """(name -> bytes, what they are for -> bytes) of the files directly in it, and of a merge inside."""
    files = {entry.name: entry.stat().st_size for entry in sorted(path.iterdir()) if entry.is_file()}
    states = (names.TRAINING_STATE, names.TRAINING_STATE_META)
    sizes = {
        "weights": sum(size for name, size in files.items() if name.endswith((names.SAFETENSORS, *names.PICKLES)) and name not in states),
        "training_state": sum(size for name, size in files.items() if name in states),
        "merged": size_of(path / names.MERGED) if (path / names.MERGED).is_dir() else 0,
    }
    sizes["other"] = sum(files.values()) - sizes["weights"] - sizes["training_state"]
    return files, sizes | {"all": sum(sizes.values())}


# ---- runs --------------------------------------------------------------------------------------------------------------


def of_run(path: Path, *, check: bool) -> Report:
    size = size_of(path)
    steps = list_steps(path, hashed=check or size <= READ_UNASKED)
    whole = [step for step in steps if step.is_whole]
    best, last = best_of(steps), max(whole, key=lambda step: step.number, default=None)
    options, reached = options_of(path), last.manifest if last else None
    state, words = how_it_ended(path, reached.step if reached else 0, reached.epoch if reached else 0.0)
    found = Report(path=str(path), kind="run", what=WORDS["run"], hashed=check or size <= READ_UNASKED)
    found.method = reached.method if reached else None
    found.options = dict(reached.options) if reached else None
    found.faults = [f"{step.path.name}: {fault}" for step in steps for fault in (*step.faults, *step.state_faults)]
    found.run = {
        "command": command_of(path) or None,
        "begins_with": options.get("checkpoint_dir"),
        "data": options.get("data"),
        "steps": len(steps),
        "whole": len(whole),
        "torn": len(steps) - len(whole),
        "resumable": sum(step.is_resumable for step in steps),
        "best": str(best.path) if best else None,
        "why": why_best(best, path, steps) if best else None,
        "last": str(last.path) if last else None,
        "model": str(path / names.MODEL) if (path / names.MODEL).is_dir() else None,  # pretrain: the finished one
        "ended": state,
        "how": words,
        "leftovers": [{"path": str(place), "kind": one.kind, "what": one.what} for place, one in leftovers(path)],
    }
    found.files, found.sizes = files_of(path)[0], {"all": size}
    found.can, found.cannot = uses_of_run(path, found.run)
    return found
