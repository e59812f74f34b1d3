"""What a path means. Every command that reads a model asks `resolve`, so a path means the same everywhere."""

import difflib
import math
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint, Kind
from litlora.checkpoint.downloaded import refuse_unfinished
from litlora.checkpoint.foreign import recognise
from litlora.checkpoint.manifest import Manifest, has_state, read_manifest, verify_files, verify_state
from litlora.checkpoint.shards import has_weights
from litlora.console import say, warn
from litlora.errors import UserError


def resolve(path: str | Path | None = None, *, base_dir: str | Path | None = None) -> Checkpoint:
    """The checkpoint that `path` means.

    A Hugging Face directory, merged ones included; a step; a run (its best step by validation loss, else its newest; torn ones are
    skipped with a warning); RUN/best and RUN/last; a PEFT adapter; `demo`; None: the run in `out`, else the embedded demo base.
    `base_dir` is where an adapter's base is now. UserError for anything else: what is there, what is missing, what was perhaps meant.
    What was chosen for the user, and why, is said here (standard error), so that every command says it.
    """
    with looked_at(path):
        found = _resolve(path, Path(base_dir) if base_dir is not None else None)
    if found.why:
        say(f"{found.path}: {found.why}")
    return found


def resolve_shapes(path: str | Path, *, base_dir: str | Path | None = None) -> Checkpoint:
    """As `resolve`, for a look alone: a directory with a config.json is a model, whether its weights are there or not."""
    place = Path(path)
    with looked_at(path):
        if (place / names.CONFIG).is_file() and not (place / names.ADAPTER_CONFIG).exists() and kind_of(place) in ("base", ""):
            return Checkpoint(place, "base", looks_only=True)
    return replace(resolve(path, base_dir=base_dir), looks_only=True)


@contextmanager
def looked_at(path: object) -> Iterator[None]:
    """A path that the system cannot even look at is a UserError like any other."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(f"cannot be looked at: {why}", where=repr(str(path)), hint="check the path and who may read it") from error


def _resolve(path: str | Path | None, base_dir: Path | None) -> Checkpoint:
    if path is None:
        run = Path(names.RUN)
        return of_run(run, base_dir) if list_step_paths(run) else demo_base(why=f"no path was given and there is no run in {run}")
    if str(path) == names.DEMO and not Path(path).exists():
        return demo_base()
    path = Path(path)
    if names_step_of_run(path):
        return of_run(path.parent, base_dir, only=path.name)
    if not path.is_dir():
        raise _no_directory(path)
    refuse_unfinished(path)
    kind = kind_of(path)
    if kind == "run":
        return of_run(path, base_dir)
    if kind == "step":
        return Checkpoint(path, "step", manifest=whole_manifest(path), base_dir=base_dir)
    if kind:
        return Checkpoint(path, kind, base_dir=base_dir)
    raise _nothing_here(path)


def names_step_of_run(path: Path) -> bool:
    """Whether it is RUN/best or RUN/last; what really has such a name is itself."""
    return path.name in (names.BEST, names.LAST) and not os.path.lexists(path) and kind_of(path.parent) == "run"


def demo_base(why: str = "") -> Checkpoint:
    """The toy model that comes with litlora."""
    if not has_weights(names.DEMO_BASE):
        raise UserError("the embedded demo base is missing from this installation", where=names.DEMO_BASE, hint="install litlora again")
    return Checkpoint(names.DEMO_BASE, "base", why=why)


# ---- steps of a run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One `step-N` of a run, looked at closely."""

    path: Path
    number: int
    manifest: Manifest | None  # None where litlora.json itself is missing or unsound
    faults: tuple[str, ...]  # what is wrong with it, each line naming a file
    state_faults: tuple[str, ...]  # what is wrong with its training state; without one there is nothing to be wrong
    has_state: bool
    hashed: bool = True  # False: sizes were compared and no file was read, so that what is `whole` may still hold other bytes

    @property
    def is_whole(self) -> bool:
        """Every covered file is there, bit for bit."""
        return not self.faults

    @property
    def is_resumable(self) -> bool:
        """Whole, and so is its training state."""
        return self.is_whole and self.has_state and not self.state_faults


def read_step(path: Path, *, with_state: bool = True, hashed: bool = True) -> Step:
    """Look at a step, reading every byte of it (`with_state=False`: without its training state; `hashed=False`: the sizes alone)."""
    number = names.step_number(path)
    try:
        manifest = read_manifest(path)
    except UserError as error:
        fault = f"{names.MANIFEST} {error.what}" if Path(error.where) == path / names.MANIFEST else str(error)
        return Step(path, number or 0, None, (fault,), (), has_state(path), hashed)
    faults = verify_files(path, manifest, hashed=hashed)
    if number is not None and number != manifest.step:
        faults.append(f"{names.MANIFEST} is of step {manifest.step}; the directory was renamed")
    state_faults = verify_state(path, manifest, hashed=hashed) if with_state else []
    return Step(path, manifest.step, manifest, tuple(faults), tuple(state_faults), has_state(path), hashed)


def list_step_paths(run: Path) -> list[Path]:
    """The `step-N` directories of a run in the order of their numbers (step-9 before step-10), looked at no further."""
    found = [path for path in run.iterdir() if names.step_number(path) is not None and path.is_dir()] if run.is_dir() else []
    return sorted(found, key=lambda path: names.step_number(path) or 0)


def list_steps(run: Path, *, hashed: bool = True) -> list[Step]:
    """All steps of a run, whole and torn, in the order of their numbers. Reads every byte of them, or (`hashed=False`) their sizes."""
    return [read_step(path, hashed=hashed) for path in list_step_paths(run)]


def whole_steps(run: Path) -> list[Step]:
    """Those that can be used."""
    return [step for step in list_steps(run) if step.is_whole]


def newest_resumable(run: Path) -> tuple[Step | None, list[Step]]:
    """The newest step that training can go on from, and the newer ones that were passed over."""
    passed: list[Step] = []
    for path in reversed(list_step_paths(run)):
        step = read_step(path)
        if step.is_resumable:
            return step, passed
        passed.append(step)
    return None, passed


def whole_manifest(path: Path) -> Manifest:
    """The manifest of a step that is whole; UserError naming each bad file otherwise."""
    step = read_step(path, with_state=False)
    if step.manifest is None or step.faults:
        raise UserError("this checkpoint is torn or was altered", where=path, context=step.faults, hint=_other_step_hint(path))
    return step.manifest


def of_run(run: Path, base_dir: Path | None = None, *, only: str = "") -> Checkpoint:
    """The best step of a run by validation loss, else the newest; a torn one is named in a warning and the next best taken.

    `only`: `best` (UserError where none was validated) or `last`.
    """
    paths = list_step_paths(run)
    ranks = {path: _rank(path) for path in paths}
    ranked = list(reversed(paths)) if only == names.LAST else sorted(paths, key=lambda path: ranks[path])
    losses = {path: loss for path, (loss, _) in ranks.items()}
    if only == names.BEST and math.inf in losses.values() and not any(map(math.isfinite, losses.values())):
        hint = f"{run / names.LAST} is the newest"
        raise UserError("no step of it has a validation loss, so none is known to be the best", where=run, hint=hint)
    for path in ranked:
        step = read_step(path, with_state=False)
        if step.manifest is None or step.faults:
            warn(f"{path} is torn or was altered and is passed over: {step.faults[0]}")
            del losses[path]
            continue
        why = why_taken(step, run, losses.values(), newest=only == names.LAST)
        return Checkpoint(path, "step", why=why, manifest=step.manifest, base_dir=base_dir)
    what = "its only checkpoint is not whole" if len(paths) == 1 else f"none of its {len(paths)} checkpoints is whole"
    what = what if paths else "is a run without a checkpoint yet"
    raise UserError(what, where=run, hint="train again, or name another directory")


def why_best(best: Step, run: Path, steps: Iterable[Step]) -> str:
    """Why `best_of` takes that one of a run's steps."""
    return why_taken(best, run, [_ranked(step.number, step.manifest)[0] for step in steps if step.is_whole])


def why_taken(step: Step, run: Path, losses: Collection[float], *, newest: bool = False) -> str:
    """`lowest validation loss (1.2345) of 4 in out`: why a run's `step` is the one that is meant.

    `losses`: of those that it was chosen from; one that is not finite was never measured, and is not counted where losses are compared.
    """
    loss = step.manifest.val_loss if step.manifest and not newest else None
    count = len(losses) if loss is None else sum(map(math.isfinite, losses))
    others = f" of {count}" if count > 1 else ""
    return f"newest{others} in {run}" if loss is None else f"lowest validation loss ({loss:.4f}){others} in {run}"


def best_of(steps: Iterable[Step]) -> Step | None:
    """Of the whole ones, that which the run's path means: the lowest validation loss, else the newest."""
    return min((step for step in steps if step.is_whole), key=lambda step: _ranked(step.number, step.manifest), default=None)


def best_step(paths: Iterable[Path]) -> Path | None:
    """Of a run's steps the one with the lowest validation loss by its manifest, bytes unseen; None where none was validated."""
    ranks = {path: rank for path in paths if math.isfinite((rank := _rank(path))[0])}
    return min(ranks, key=lambda path: ranks[path], default=None)


def _rank(path: Path) -> tuple[float, int]:
    """Smaller is better: validation loss where there is one, then the newest. Only the manifest is read."""
    number = names.step_number(path) or 0
    try:
        return _ranked(number, read_manifest(path))
    except UserError:
        return float("-inf"), -number  # looked at first, so that the user is told of it


def _ranked(number: int, manifest: Manifest | None) -> tuple[float, int]:
    loss = manifest.val_loss if manifest else None
    return float("inf") if loss is None else loss, -number


# ---- what a directory is ---------------------------------------------------------------------------------------------


def kind_of(path: Path) -> Kind | Literal["run", ""]:
    """`step`, `base`, `adapter`, `run`, or nothing, from the names of what is in it. UserError where it is two of them at once."""
    if not path.is_dir():
        return ""
    has = {
        name: (path / name).exists()
        for name in (
            names.MANIFEST,
            names.CONFIG,
            names.ADAPTER_CONFIG,
            names.ADAPTER_WEIGHTS,
            names.OWN_ADAPTER_WEIGHTS,
            names.TRAINING_STATE_META,
        )
    }
    model = has[names.CONFIG] and has_weights(path)
    adapter = has[names.ADAPTER_CONFIG] and has[names.ADAPTER_WEIGHTS]
    trained = model or adapter or has[names.OWN_ADAPTER_WEIGHTS]
    if has[names.MANIFEST] or (trained and (has[names.TRAINING_STATE_META] or names.step_number(path) is not None)):
        return "step"  # also one whose manifest was lost: it is torn, not a PEFT adapter or a model that may sit on any base
    if model and (adapter or has[names.ADAPTER_WEIGHTS]):
        raise UserError("holds a model and an adapter at once", where=path, hint="move the adapter's two files to a directory of their own")
    if model:
        return "base"
    if adapter:
        return "adapter"
    return "run" if (path / names.RUN_YAML).exists() or list_step_paths(path) else ""


def _no_directory(path: Path) -> UserError:
    if path.exists():
        parent, known = path.parent, recognise(path)
        there = kind_of(parent) if path.is_file() else ""
        if known and path.name.endswith(names.PICKLES):
            return UserError(f"is {known.what}: {known.why}", where=path, hint=known.hint)
        hint = f"give its directory: {parent}" if there else "give a directory"
        return UserError("is a file, and a checkpoint is a directory", where=path, hint=hint)
    nearest, parts = _nearest(path), path.parts
    remote = len(parts) == 2 and not path.is_absolute() and not nearest.startswith(MEANT) and not Path(parts[0]).exists()
    remote = remote and names.step_number(path) is None
    author = "ORG" if parts[0] == names.MODELS else parts[0]  # models/NAME is where `litlora download ORG/NAME` puts it
    download = f"if this is a model on a hub, download it first: litlora download {author}/{path.name}" if remote else ""
    hint = download or nearest or _needed(path)
    return UserError("there is no such directory", where=path, hint=hint)


def _nothing_here(path: Path) -> UserError:
    """What to say of a directory that is no model, checkpoint or run: what is there, what is missing, what was perhaps meant."""
    found = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "") if found else "nothing"
    known = recognise(path)
    if known:
        return UserError(f"is {known.what}: {known.why}", where=path, context=(f"found: {shown}",), hint=known.hint)
    context = (f"found: {shown}", f"missing: {_missing_part(set(found))}")
    return UserError("is neither a model, nor a checkpoint, nor a run", where=path, context=context, hint=_snapshot(path) or _nearest(path))


def _snapshot(path: Path) -> str:
    """Of a model's directory in Hugging Face's cache, which holds the model further down."""
    inside = sorted(path.glob("snapshots/*/"), key=lambda one: one.stat().st_mtime)
    return f"this is Hugging Face's cache, and the model is in {inside[-1]}" if inside else ""


def _missing_part(found: set[str]) -> str:
    """What would have to be there for it to be what it looks most like."""
    if names.OWN_ADAPTER_WEIGHTS in found:
        return f"{names.MANIFEST}, for a step"
    if names.ADAPTER_CONFIG in found:
        return f"{names.ADAPTER_WEIGHTS}, for an adapter"
    if names.ADAPTER_WEIGHTS in found:
        return f"{names.ADAPTER_CONFIG}, for an adapter"
    if found & {names.WEIGHTS, names.WEIGHTS_INDEX}:
        return f"{names.CONFIG}, for a model"
    if names.CONFIG in found:
        return f"{names.WEIGHTS} or {names.WEIGHTS_INDEX}, for a model"
    return f"{names.CONFIG} and {names.WEIGHTS} (a model), {names.ADAPTER_CONFIG} (an adapter) or step-N directories (a run)"


# ---- what was perhaps meant ------------------------------------------------------------------------------------------


MEANT = "did you mean"


def _needed(path: Path) -> str:
    """What could stand in place of a path that is nothing, where nothing is near it."""
    if str(path) == names.RUN:
        return "litlora finetune lora begins a run there"
    if names.step_number(path) is not None:
        return "litlora list RUN names the steps of a run"
    return f"give the directory of a model, a run or a step, or {names.DEMO}; litlora download ORG/NAME fetches a model"


def _nearest(path: Path) -> str:
    """`did you mean out/step-200?`: a valid checkpoint below, beside or above `path`, or nothing."""
    if path.is_dir():
        inside = next(valid_below(path), None)
        if inside:
            return f"{MEANT} {inside}?"
    parent, word = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, word = parent.parent, parent.name
    beside = [entry for entry in valid_below(parent) if entry != path]
    number = names.step_number(path)
    steps = [entry for entry in beside if names.step_number(entry) is not None]
    if number is not None and steps:
        best = min(steps, key=lambda entry: abs((names.step_number(entry) or 0) - number))
        return f"{MEANT} {best}?"
    of_runs = [entry / path.name for entry in beside if number is not None and (entry / path.name).is_dir()]
    if of_runs:
        return f"{MEANT} {of_runs[0]}?"
    choices = {entry.name: entry for entry in (*valid_below(parent / names.MODELS), *beside)}
    choices |= {names.DEMO: Path(names.DEMO)} if path == Path(path.name) and not path.exists() else {}
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"{MEANT} {choices[close[0]]}?"
    return f"the nearest checkpoint is {beside[0]}" if beside and parent != Path("/") else ""


def valid_below(directory: Path) -> Iterator[Path]:
    """Directories directly in `directory` that hold something, by their names alone; at most the first thousand entries are seen."""
    try:
        entries = sorted(directory.iterdir())[:1000]
    except OSError:
        return
    for entry in entries:
        try:
            if names.temporary_owner(entry) is None and kind_of(entry):
                yield entry
        except (UserError, OSError):
            continue


def _other_step_hint(path: Path) -> str:
    others = [step for step in list_step_paths(path.parent) if step != path] if names.step_number(path) is not None else []
    for other in reversed(others):
        if read_step(other, with_state=False).is_whole:
            return f"the newest whole checkpoint is {other}"
    return "restore the file from a copy, or train again"
