"""The directory of a training run: made ready before any work, and held so that no second trainer writes into it."""

import fcntl
import itertools
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import check_free_space, make_directory, remove, remove_leftovers, sync
from litlora.checkpoint.manifest import read_manifest
from litlora.checkpoint.resolve import best_step, kind_of, list_step_paths, newest_resumable
from litlora.errors import UserError

MERGED_SUFFIXES = (".safetensors", ".json", ".jinja", ".md", ".txt", ".model")
STEP_FILES = frozenset(
    {
        *names.UNCOVERED,
        *names.TOKENIZER_FILES,
        names.ADAPTER_CONFIG,
        names.ADAPTER_WEIGHTS,
        names.OWN_ADAPTER_WEIGHTS,
        names.CONFIG,
        names.GENERATION_CONFIG,
        names.WEIGHTS,
        names.README,
        *names.LICENCE_FILES,
    }
)
RUN_DIRECTORIES = (names.VOCABULARY, names.MODEL)
RUN_FILES = (names.RUN_YAML, names.METRICS, names.SKIPPED_ROWS)


@dataclass
class Run:
    """A run's directory, ours until `close` (or the end of the process, however it comes)."""

    path: Path
    resume_from: Checkpoint | None = None  # the step to go on from; None: from the beginning
    messages: list[str] = field(default_factory=list)  # what was found and done, for the user
    _lock: int = -1

    def close(self) -> None:
        """Let another trainer in."""
        if self._lock >= 0:
            (self.path / names.LOCK).unlink(missing_ok=True)  # while it is still held: see `_take_lock`
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def prepare_run_directory(
    out_dir: str | Path, *, resume: bool = False, overwrite: bool = False, needed_bytes: int = 0, dry_run: bool = False
) -> Run:
    """Everything that could go wrong with `out_dir`, before a model is loaded. UserError; then nothing was changed.

    Refused: a directory that holds a run (unless `resume` or `overwrite`) or a model, a file in the way, no permission, too little
    space for `needed_bytes`, another trainer at work. Removed: what dead processes left half-written; with `overwrite`, what
    litlora wrote. `resume` finds the newest whole step. `dry_run` checks the same and writes nothing.
    """
    path = Path(out_dir)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other", hint="--resume goes on with the run, --overwrite deletes it")
    _check_place(path)
    if not (resume or overwrite) and _holds_run(path):
        going_on = "" if _is_left_over(path) else "--resume goes on with it, "
        raise UserError("holds a run already", where=path, hint=f"{going_on}--overwrite deletes it; or choose another --out_dir")
    if resume and not _holds_run(path):
        raise _no_run(path)
    if overwrite:
        _ours(path)  # refuses
    check_free_space(path, needed_bytes)
    if dry_run:
        return Run(path, *(_resume_point(path) if resume else (None, [])))
    _make_writable(path)
    run = Run(path)
    try:
        run._lock = _take_lock(path)
        remove_leftovers(path)
        _delete(path, _ours(path) if overwrite else [])  # looked at again: now nobody else writes
        if resume:
            run.resume_from, run.messages = _resume_point(path)
            _set_torn_aside(path, run.resume_from)
    except OSError as error:
        run.close()
        raise _no_access(error, path) from error
    except BaseException:
        run.close()
        raise
    return run


def refuse_lost_options(out_dir: str | Path) -> None:
    """UserError: a directory without a run.yaml is not gone on with, for nothing else says what all the options were."""
    path = Path(out_dir)
    _check_place(path)
    if not list_step_paths(path):
        raise _no_run(path)
    hint = f"put its {names.RUN_YAML} back, or begin a new run from its weights: --checkpoint_dir {path / names.LAST} --out_dir another"
    raise UserError(f"holds checkpoints, and no {names.RUN_YAML} that says how they were trained", where=path, hint=hint)


# ---- what is there ---------------------------------------------------------------------------------------------------


def _no_run(path: Path) -> UserError:
    left_over = "--overwrite in its place deletes what is left of one, and begins anew"
    hint = left_over if _is_left_over(path) else "leave --resume out to begin one"
    return UserError("holds no run to go on with", where=path, hint=hint)


def _is_left_over(path: Path) -> bool:
    """Whether metrics or a list of rows are all that a run left behind: nothing to go on with, and in the way of a new one."""
    return _holds_run(path) and not ((path / names.RUN_YAML).exists() or list_step_paths(path))


def _check_place(path: Path) -> None:
    """Nothing in the way, and no model's directory: a run in there would make two things of one path."""
    for place in reversed((path, *path.parents)):
        try:
            if place.is_dir():
                continue
            if os.path.lexists(place):
                raise UserError("a directory is needed here, and this is none", where=place, hint="choose another --out_dir")
        except PermissionError as error:
            raise _no_access(error, path) from error
    kind = kind_of(path)
    if kind in ("base", "adapter", "step"):
        raise UserError(
            f"holds a {'model' if kind == 'base' else 'checkpoint'}; a run does not go in there",
            where=path,
            hint="choose another --out_dir",
        )


def _holds_run(path: Path) -> bool:
    return any((path / name).exists() for name in RUN_FILES) or bool(list_step_paths(path))


def _make_writable(path: Path) -> None:
    """The directory exists, durably, and a file can be written into it: tried, because modes do not tell of read-only disks or quotas."""
    probe = path / names.temporary_name("probe", os.getpid())
    try:
        make_directory(path)
        probe.write_bytes(b"litlora")
        sync(probe)
        probe.unlink()
    except OSError as error:
        with suppress(OSError):  # it may have been made, and not filled
            probe.unlink()
        raise _no_access(error, path) from error


def _no_access(error: OSError, path: Path) -> UserError:
    return UserError(f"cannot be written to: {error.strerror or error}", where=error.filename or path, hint="choose another --out_dir")


# ---- going on --------------------------------------------------------------------------------------------------------


def _resume_point(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest step to go on from, and what to tell the user. UserError where going on would undo whole work."""
    step, passed = newest_resumable(path)
    for other in passed:
        if other.is_whole and not other.state_faults:
            earlier = f", and going on from {step.path.name} would write it again" if step else ""
            raise UserError(
                f"is whole, but its training state was deleted{earlier}",
                where=other.path,
                hint=f"move it out of {path}, or begin a new run from it with --checkpoint_dir {other.path}",
            )
    if step is None and passed:
        faults = tuple(f"{other.path.name}: {(*other.faults, *other.state_faults)[0]}" for other in passed)
        raise UserError("no checkpoint in it is whole", where=path, context=faults, hint="--overwrite begins anew")
    messages = [f"{other.path} is torn or was altered and is passed over: {(*other.faults, *other.state_faults)[0]}" for other in passed]
    if step is None:
        return None, [f"{path} has no checkpoint yet: training begins at step 0"]
    return Checkpoint(step.path, "step", why=f"newest whole checkpoint in {path}", manifest=step.manifest), messages


def _set_torn_aside(path: Path, step: Checkpoint | None) -> None:
    """A torn step newer than the one we go on from keeps its bytes under another name: its number will be written again."""
    paths = list_step_paths(path)
    newer = paths[paths.index(step.path) + 1 :] if step else paths
    for other in newer:
        places = (other.with_name(names.aside_name(other.name, count)) for count in itertools.count(1))
        os.rename(other, next(place for place in places if not os.path.lexists(place)))
    if newer:
        sync(path)


# ---- beginning anew --------------------------------------------------------------------------------------------------


def _ours(path: Path) -> list[Path]:
    """What `overwrite` deletes. UserError where a step holds something that litlora did not write; nothing was deleted then."""
    aside = [entry for entry in path.iterdir() if names.is_aside(entry) and entry.is_dir()] if path.is_dir() else []
    steps = [*list_step_paths(path), *aside]
    for step in steps:
        foreign = [entry for entry in step.iterdir() if not _is_ours(entry)]
        if step.is_symlink() or foreign:
            what = f"holds {foreign[0].name}, which litlora did not write" if foreign else "is a link"
            raise UserError(f"{what}; it is not deleted", where=step, hint="move it away, or choose another --out_dir")
    made = [path / name for name in RUN_DIRECTORIES if (path / name).is_dir()]
    for directory in made:
        if directory.is_symlink() or not all(_is_ours(entry) for entry in directory.iterdir()):
            raise UserError(
                "holds what litlora did not write; it is not deleted", where=directory, hint="move it away, or choose another --out_dir"
            )
    return [*reversed(steps), *made, *(path / name for name in RUN_FILES if (path / name).exists())]


def _is_ours(entry: Path) -> bool:
    """Whether litlora writes such a file into a step. A merge is ours if it has its report and no subdirectories."""
    if entry.is_symlink():
        return False
    if entry.name == names.MERGED and entry.is_dir():
        inside = list(entry.iterdir())
        ours = all(item.is_file() and (item.suffix in MERGED_SUFFIXES or item.name in names.LICENCE_FILES) for item in inside)
        return ours and names.MERGE_REPORT in {item.name for item in inside}
    if names.temporary_owner(entry) is not None:
        return True
    return entry.is_file() and (entry.name in STEP_FILES or entry.name in _listed(entry.parent))


def _listed(step: Path) -> frozenset[str]:
    """What the step's own manifest says was written; nothing where it is unsound."""
    try:
        return frozenset(read_manifest(step).files)
    except UserError:
        return frozenset()


def _delete(path: Path, doomed: Sequence[Path]) -> None:
    """All are renamed first, durably, so that a crash in between leaves whole steps and leftovers, and no torn step."""
    leftovers = [old.with_name(names.temporary_name(old.name, os.getpid())) for old in doomed]
    for old, leftover in zip(doomed, leftovers, strict=True):
        os.rename(old, leftover)
    if doomed:
        sync(path)
    for leftover in leftovers:
        remove(leftover)


# ---- one trainer at a time -------------------------------------------------------------------------------------------


def _take_lock(path: Path) -> int:
    """An open lock file. The system lets go of it when its process dies, so a lock file that a crash left behind locks nothing."""
    lock = path / names.LOCK
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            hint = "wait for it to end, or choose another --out_dir"
            raise UserError(f"another trainer (process {holder}) is writing into it", where=path, hint=hint) from error
        if lock.exists() and lock.stat().st_ino == os.fstat(fd).st_ino:  # else its owner removed it between our open and our lock
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            return fd
        os.close(fd)


# ---- what stays --------------------------------------------------------------------------------------------------------


def kept_number(text: str, where: str, words: Sequence[str] = ()) -> int | None:
    """How many of the newest stay, by what was typed: `all` (None), or one of `words` (one) or a number. UserError for anything else."""
    if text.strip() == "all":
        return None
    typed = [word.strip() for word in text.split(",")]
    numbers = [1 if word in words else int(word) if word.isdecimal() else 0 for word in typed]
    if 0 in numbers:
        choices = ", ".join(["all", *words, "a number"])
        several = "; or several, as best,last,3" if words else ""
        raise UserError(f"{text!r} does not say what stays", where=where, hint=f"it is one of: {choices}{several}")
    return max(numbers)


def drop_old_steps(run: Path, keep: int, protected: Sequence[Path]) -> list[Path]:
    """Delete all steps but the newest `keep` and those that are worth more; returns what was deleted.

    What stays: the best by validation loss, `protected`, links, and whatever has no sound manifest or holds what training did not write:
    a note, a merge, a file of the user's. Numbers decide what is new, not clocks. A crash on the way leaves whole steps and leftovers.
    """
    paths = list_step_paths(run)
    spared = {os.path.realpath(path) for path in protected}
    best = best_step(paths)
    old = [path for path in paths[:-keep] if path != best and os.path.realpath(path) not in spared]
    doomed = [path for path in old if not path.is_symlink() and is_as_committed(path)]
    _delete(run, doomed)
    return doomed


def is_as_committed(step: Path) -> bool:
    """Whether nothing lies in a step but what its manifest says and the training state. Its bytes are not looked at."""
    listed = _listed(step)
    own = {*listed, *names.UNCOVERED} - {names.NOTE}
    return bool(listed) and all(entry.name in own and entry.is_file() and not entry.is_symlink() for entry in step.iterdir())


def drop_old_states(run: Path, keep: int) -> None:
    """Delete the training state of all steps but the newest `keep`; the steps stay whole, and serve as before."""
    for step in list_step_paths(run)[:-keep]:
        for name in (names.TRAINING_STATE_META, names.TRAINING_STATE):
            (step / name).unlink(missing_ok=True)
