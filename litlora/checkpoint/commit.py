"""How anything gets onto the disk: whole, or not at all.

A directory is written as `.tmp-NAME-PID` beside its final place; every file is synced, the manifest last; the directory is
synced, renamed, and its parent synced. Only then does it count, whatever crash or power cut comes before or after. The caller
prints `COMMITTED step=N` when `commit_step` has returned, and not earlier. Hashes are taken of what is handed to the system, while it is
written: they say what a file was meant to be, and nothing is read back.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.manifest import FileRecord, Manifest, TrainingState, encode_state
from litlora.errors import UserError, WorkError
from litlora.safetensors_file import Raw, safetensors_parts

Tensors = Mapping[str, tuple[str, Sequence[int], Raw]]  # name -> (dtype, shape, bytes)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def commit_step(
    run: Path, manifest: Manifest, *, tensors: Mapping[str, Tensors], files: Mapping[str, bytes], state: TrainingState | None = None
) -> Path:
    """Write `run/step-N` (N is `manifest.step`) and return its path; when this returns, it is durable. See `commit_checkpoint`."""
    return commit_checkpoint(run / names.step_name(manifest.step), manifest, tensors=tensors, files=files, state=state)


def commit_checkpoint(
    final: Path, manifest: Manifest, *, tensors: Mapping[str, Tensors], files: Mapping[str, bytes], state: TrainingState | None = None
) -> Path:
    """Write the directory `final`, whatever its name, with its manifest; when this returns, it is durable.

    `tensors`: file name -> its tensors; `files`: file name -> bytes. Sizes and hashes are filled in here.
    WorkError (disk full and the like): nothing is left behind and earlier steps are untouched.
    """
    everything = [*tensors.values(), state.tensors] if state else list(tensors.values())
    needed = sum(map(tensor_bytes, everything)) + sum(map(len, files.values())) + 2**16
    with commit_directory(final, needed_bytes=needed) as temporary:
        written = {name: write_file(temporary / name, [data]) for name, data in files.items()}
        for name, contents in tensors.items():
            written[name] = write_file(temporary / name, safetensors_parts(contents, {"format": "pt"}))
        manifest = manifest.with_files(written)
        if state:
            record = write_file(temporary / names.TRAINING_STATE, safetensors_parts(state.tensors, {"format": "pt"}))
            write_file(temporary / names.TRAINING_STATE_META, [encode_state(record, manifest, state.values)])
        write_file(temporary / names.MANIFEST, [manifest.encode()])
    return final


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """A new file of `parts`, in order, not synced yet; its size and sha256."""
    size, digest = 0, hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += memoryview(part).nbytes
    return FileRecord(size=size, sha256=digest.hexdigest())


@contextmanager
def commit_directory(final: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary directory to fill; it becomes `final` when the block ends, and vanishes if anything in it raises.

    UserError where `final` exists; WorkError where the disk is full or the system refuses. `needed_bytes`, where known, is compared
    with the free space first.
    """
    if os.path.lexists(final):
        raise UserError("exists already; nothing is overwritten", where=final)
    temporary = final.parent / names.temporary_name(final.name, os.getpid())
    try:
        remove_leftovers(final.parent, final.name)
        check_free_space(final.parent, needed_bytes, WorkError)
        os.mkdir(temporary)
        yield temporary
        sync_tree(temporary)
        os.rename(temporary, final)
        sync(final.parent)
    except OSError as error:
        full = write_error(error, final, needed_bytes)  # looks at the free space before the remains are removed
        _discard(temporary)
        raise full from error
    except BaseException:
        _discard(temporary)
        raise


def check_outside(out_dir: Path, base: Path) -> None:
    """UserError where a result would lie in the model that it is made from."""
    real, root = out_dir.resolve(), base.resolve()
    if real == root or root in real.parents:
        raise UserError(f"no command writes into a base, and this is in {base}", where=out_dir, hint="--out_dir another directory")


def check_new(out_dir: Path) -> None:
    """UserError where a result that is no step of a training cannot go there: something is there, or the name is a training step's."""
    if os.path.lexists(out_dir):
        raise UserError("exists already; nothing is overwritten", where=out_dir, hint="--out_dir another directory")
    if names.step_number(out_dir) is not None:
        raise UserError("is the name of a training step, which this is none", where=out_dir, hint="--out_dir another name")
    check_writable(out_dir)


def check_writable(out_dir: Path) -> None:
    """UserError where a directory cannot be made there."""
    parent = next(step for step in out_dir.absolute().parents if step.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        why = "cannot be written to" if parent.is_dir() else "is no directory"
        raise UserError(why, where=parent, hint="--out_dir a directory that you may write to")


def write_atomically(path: Path, data: bytes) -> None:
    """One small file (run.yaml, note.md): afterwards it holds all of `data`, durably; before that, what it held. WorkError."""
    temporary = path.parent / names.temporary_name(path.name, os.getpid())
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        full = write_error(error, path, len(data))
        temporary.unlink(missing_ok=True)
        raise full from error


# ---- durability ------------------------------------------------------------------------------------------------------


def sync_tree(directory: Path) -> None:
    """Every file below, the manifest last, and every directory after what it holds."""
    for here, _, found in os.walk(directory, topdown=False):
        for name in sorted(found, key=lambda name: (name == names.MANIFEST, name)):
            sync(Path(here) / name)
        sync(Path(here))


def sync(path: Path) -> None:
    """Do not return before a file's contents, or a directory's entries, are on the disk itself."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync stops at the drive's own cache
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems have no such call
            raise
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """`mkdir -p`, durable: each new directory's entry is synced too. OSError as the system gives it."""
    missing = [step for step in (path, *path.parents) if not step.exists()]
    for step in reversed(missing):
        os.mkdir(step)
        sync(step.parent)


# ---- leftovers -------------------------------------------------------------------------------------------------------


def remove_leftovers(directory: Path, name: str | None = None) -> list[Path]:
    """Delete what dead processes left half-written in `directory` (with `name`: of that name only); returns what was deleted."""
    removed = []
    for path in sorted(directory.iterdir()):
        owner = names.temporary_owner(path)
        if owner is None or is_alive(owner) or (name is not None and path.name != names.temporary_name(name, owner)):
            continue
        remove(path)
        removed.append(path)
    return removed


def is_alive(pid: int) -> bool:
    """Whether another process of that number runs. This one does not count: what bears its number here is from before it began."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> None:
    """A file, a link, or a directory with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(temporary: Path) -> None:
    """As far as it goes: the error that brought us here is the one to report, and the next start removes the rest."""
    if temporary.exists():
        shutil.rmtree(temporary, ignore_errors=True)


# ---- space -----------------------------------------------------------------------------------------------------------


def check_free_space(path: Path, needed_bytes: int, error: type[UserError] | type[WorkError] = UserError) -> None:
    """Raise `error` where fewer than `needed_bytes` are free for `path`, which need not exist yet."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise error(
            f"the disk is full: {needed_bytes:,} bytes needed, {free:,} free", where=path, hint="free some space, or write to another disk"
        )


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write on the disk of `path`, or of its nearest existing parent."""
    place = next(step for step in (path.absolute(), *path.absolute().parents) if step.exists())
    return shutil.disk_usage(place).free


def tensor_bytes(tensors: Tensors) -> int:
    """What they take in a file, roughly: the header is guessed at 200 bytes a tensor."""
    sizes = (raw.nbytes if isinstance(raw, np.ndarray | memoryview) else len(raw) for _, _, raw in tensors.values())
    return sum(sizes) + 200 * len(tensors)


def write_error(error: OSError, path: Path, needed_bytes: int) -> WorkError:
    """What a failed write means for the user."""
    if error.errno not in DISK_FULL:
        return WorkError(f"could not be written: {error.strerror or error}", where=path, hint="what was committed before is untouched")
    why = "a file may not become that large here (see ulimit -f)" if error.errno == errno.EFBIG else "the disk is full"
    needed = f"{needed_bytes:,} bytes needed, " if needed_bytes else ""
    free = f"{free_bytes(path):,} free"
    return WorkError(
        f"{why}: {needed}{free}", where=path, hint="free some space, then go on with --resume; earlier checkpoints are untouched"
    )
