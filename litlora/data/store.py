"""Samples one behind another in a few arrays: in memory, or, of large files, on disk and mapped, so that they may be larger than memory.

What is on disk is kept for the next run: an entry's name is a hash of the rows' bytes and of everything that makes
samples of them, so a changed file, tokenizer or template finds nothing. It only saves time: what is missing, torn or altered is made again.
"""

import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import xxhash

from litlora.console import warn

IGNORE = -100  # a target that is not graded
ENTRIES = 8  # that are kept
ABOUT = "about.json"
INDEX = np.dtype([("end", "<i8"), ("graded", "<i4"), ("line", "<i8"), ("column", "<i4"), ("group", "V32")])  # of one sample
ARRAYS = {"tokens": np.dtype("<i4"), "targets": np.dtype("<i4"), "index": INDEX}


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from. The shift is done: targets[i] is what follows tokens[i], IGNORE where not graded."""

    tokens: np.ndarray  # (T,) int32
    targets: np.ndarray  # (T,) int32
    where: str  # the row it is from

    @property
    def graded(self) -> int:
        return int((self.targets != IGNORE).sum())


Made = tuple[Sample, str]  # a sample, and a hash of the row that it is from: 64 hexadecimal digits


@dataclass(frozen=True)
class Stored:
    """The samples of one file."""

    name: str
    tokens: np.ndarray  # (all T,) int32
    targets: np.ndarray  # (all T,) int32
    index: np.ndarray  # one INDEX for each sample
    holder: Any = None  # what keeps a temporary directory alive

    def __getitem__(self, number: int) -> Sample:
        start = int(self.index["end"][number - 1]) if number else 0
        end, line, column = (int(self.index[name][number]) for name in ("end", "line", "column"))
        where = f"{self.name}:{line}:{column}" if column else f"{self.name}:{line}"
        return Sample(self.tokens[start:end], self.targets[start:end], where)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.index["end"], prepend=0)

    def groups(self) -> list[str]:
        return [group.tobytes().hex() for group in self.index["group"]]


class Samples(Sequence[Sample]):
    """Samples of several files, or some of them; each is made when it is asked for."""

    def __init__(self, parts: Sequence[Stored], chosen: np.ndarray | None = None) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part.index) for part in parts)])
        self.chosen = np.arange(self.starts[-1]) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> "Samples": ...
    def __getitem__(self, at: int | slice) -> "Sample | Samples":
        if isinstance(at, slice):
            return Samples(self.parts, self.chosen[at])
        number = int(self.chosen[at])
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.parts[part][number - int(self.starts[part])]

    def take(self, numbers: Sequence[int]) -> "Samples":
        return Samples(self.parts, self.chosen[np.asarray(numbers, dtype=np.int64)])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in self.parts)])[self.chosen]

    @property
    def graded(self) -> np.ndarray:
        """Graded tokens of each."""
        return np.concatenate([np.zeros(0, np.int64), *(part.index["graded"] for part in self.parts)])[self.chosen]


def store(made: Iterable[Made], name: str) -> Stored:
    """The samples in memory. `name`: the file that they are from."""
    streams = {array: io.BytesIO() for array in ARRAYS}
    _write(made, name, streams)
    return Stored(name, **{array: np.frombuffer(streams[array].getbuffer(), kind) for array, kind in ARRAYS.items()})


def store_on_disk(
    key: str, name: str, make: Callable[[], Iterator[Made]], about: Callable[[], dict[str, Any] | None], keep: bool
) -> tuple[Stored, dict[str, Any] | None]:
    """The entry `key` with what was said about it, or, where there is no whole one, what `make` makes, written as it comes.

    `about` is asked at the end; where it gives None, or without `keep`, the files are gone when the samples are.
    """
    folder = cache_dir()
    if keep and (found := _open(folder / key, name)) is not None:
        return found
    try:
        return _on_disk(folder, key, name, make, about, keep)
    except OSError as error:  # a full disk, a quota
        _warn_once(f"tokenized rows are held in memory: {folder} could not be written to ({error.strerror or error})")
        return store(make(), name), about()


def _on_disk(
    folder: Path, key: str, name: str, make: Callable[[], Iterator[Made]], about: Callable[[], dict[str, Any] | None], keep: bool
) -> tuple[Stored, dict[str, Any] | None]:
    """What `make` makes, in files. OSError where these cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(prefix=f".tmp-{key[:8]}-", dir=folder if keep else None)
    except OSError:  # a home that cannot be written to
        keep, holder = False, tempfile.TemporaryDirectory(prefix="litlora-")
    place = Path(holder.name)
    try:
        with ExitStack() as stack:
            _write(make(), name, {array: stack.enter_context(open(place / array, "wb")) for array in ARRAYS})
        said = about()
        keep = keep and said is not None
        if keep:
            digests = {array: _digest(place / array) for array in ARRAYS}
            (place / ABOUT).write_text(json.dumps({"digests": digests, "about": said}), encoding="utf-8")
        stored = Stored(name, **_mapped(place), holder=holder)  # before it has a name that another process may take away
    except BaseException:
        holder.cleanup()
        raise
    if keep:
        try:
            os.replace(place, folder / key)
            holder._finalizer.detach()  # type: ignore[attr-defined]  # nothing is left to delete
            _prune(folder)
        except OSError:  # another process was first; ours goes when the samples go
            pass
    return stored, said


@cache
def _warn_once(text: str) -> None:
    warn(text)


def cache_dir() -> Path:
    """Where tokenized rows are kept."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "litlora" / "rows"


def _write(made: Iterable[Made], name: str, streams: Mapping[str, BinaryIO | io.BytesIO]) -> None:
    end = 0
    for sample, group in made:
        end += len(sample.tokens)
        line, _, column = sample.where[len(name) + 1 :].partition(":")
        entry = np.array([(end, sample.graded, int(line), int(column or 0), bytes.fromhex(group))], dtype=INDEX)
        for array, values in (("tokens", sample.tokens), ("targets", sample.targets), ("index", entry)):
            streams[array].write(np.ascontiguousarray(values, dtype=ARRAYS[array]).tobytes())


def _mapped(place: Path) -> dict[str, np.ndarray]:
    """The arrays of a directory; an empty file cannot be mapped."""
    return {
        array: np.memmap(place / array, dtype=kind, mode="r") if (place / array).stat().st_size else np.zeros(0, kind)
        for array, kind in ARRAYS.items()
    }


def _open(place: Path, name: str) -> tuple[Stored, dict[str, Any]] | None:
    """A whole entry; None where it is missing, and where a byte of it was altered: then it is taken away."""
    try:
        description = (place / ABOUT).read_bytes()
    except OSError:  # nothing to take away; what comes there from now on is another process's
        return None
    try:
        read = json.loads(description)
        stored = Stored(name, **_mapped(place))
        if read["digests"] == {array: _digest(place / array) for array in ARRAYS}:
            with suppress(OSError):  # of somebody else
                os.utime(place)
            return stored, read["about"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(place, ignore_errors=True)
    return None


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return str(state.hexdigest())


def _prune(folder: Path) -> None:
    entries = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.stat().st_mtime)
    left = [path for path in folder.iterdir() if path.name.startswith(".tmp-") and time.time() - path.stat().st_mtime > 86_400]
    for path in [*entries[:-ENTRIES], *left]:  # what a killed process left goes after a day
        shutil.rmtree(path, ignore_errors=True)
