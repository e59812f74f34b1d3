"""One tensor on its way into the new model, in blocks of rows."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from litlora.checkpoint.fingerprint import TensorHash
from litlora.cpu import low_rank
from litlora.errors import WorkError
from litlora.safetensors_file import DTYPES, FLOAT_BYTES, SafetensorsFile, TensorInfo, to_float32

Floats = npt.NDArray[np.floating[Any]]  # fp32 where a model is written; whoever checks one may compute in fp64
Bytes = npt.NDArray[np.uint8]

WIDTH = {"F32": 4, "BF16": 2, "F16": 2}  # bytes of the dtypes that are computed with
LARGEST = {"F32": 3.4028235e38, "BF16": 3.3895314e38, "F16": 65504.0}

# Numbers computed with at once. Smaller blocks would stay nearer to the core, but the threads would then spend their time handing
# Python's lock to each other: 64K numbers took 3.3 s where these take 1.7 s (2.2 GB, two cores).
BLOCK = 384 * 1024
GROUP = 8  # rows whose update is multiplied at once, because OpenBLAS has a faster way for small matrices ...
SMALL = 1_000_000  # ... of up to so many multiplications


class MergeOverflow(WorkError):
    """A merged weight is larger than its dtype can hold. Nothing was written."""


@dataclass
class Moved:
    """What happened to one tensor on its way. Sums of squares over all its numbers, measured where they were computed with."""

    before: str = ""  # digest in the base, of what was there
    after: str = ""  # digest in the new model
    differs: bool = False  # whether any byte is another one than in the base; of what is new there, than what it starts from
    weight: float = 0.0  # of W
    update: float = 0.0  # of W' - W, before rounding
    rounding: float = 0.0  # of cast(W') - W'

    @property
    def relative(self) -> float:
        """How far the weights moved, as a share of their own norm."""
        return math.sqrt(self.update / self.weight) if self.weight else math.inf if self.update else 0.0

    @property
    def lost(self) -> float:
        """The share of the update that rounding took away."""
        return min(1.0, math.sqrt(self.rounding / self.update)) if self.update else 0.0


@dataclass(frozen=True)
class Added:
    """W' = W + b @ a, and with a magnitude (DoRA) each row of that brought to the length it learnt."""

    a: Floats  # (R, in)
    b: Floats  # (out, R), times the scale
    magnitude: Floats | None  # (out,)


@dataclass(frozen=True)
class Scaled:
    """Each row times its scale; of a bias, the sum with the shift times the scale (LLaMA-Adapter v2, arXiv:2304.15010, eq. 3)."""

    scale: Floats  # (out,)
    shift: Floats | None  # (out,)


Update = Added | Scaled


@dataclass(frozen=True, kw_only=True)
class Making:
    """What one tensor is made of: the base's or nothing, and what is put on it, or the adapter's in its place."""

    name: str  # in the new model
    shape: tuple[int, ...]
    base: SafetensorsFile
    source: str | None  # the base's tensor it starts from; None: `fill` everywhere
    adapter: SafetensorsFile | None
    value: str | None  # the adapter's tensor that stands in place of the base's
    update: Update | None
    fill: float = 0.0

    @property
    def info(self) -> TensorInfo | None:
        return self.base.tensors[self.source] if self.source is not None else None


@dataclass(frozen=True, kw_only=True)
class Journey(Making):
    """The same on its way to its place in a new file."""

    place: TensorInfo
    sink: int  # descriptor of the new file
    own: bool  # `source` became this tensor


class Workspace:
    """The memory that one thread works in: block after block goes through it."""

    def __init__(self, size: int, dtype: npt.DTypeLike = np.float32) -> None:
        self.raw, self.stored = np.empty(4 * size, np.uint8), np.empty(4 * size, np.uint8)  # as in the files
        self.weight, self.update, self.rounded, self.old = (np.empty(size, dtype) for _ in range(4))


class Cut(NamedTuple):
    """Some rows of a tensor, of so many columns: `size` numbers from number `start` on."""

    row: int
    columns: int
    start: int
    size: int


def cuts(shape: tuple[int, ...], *, in_rows: bool) -> Iterator[Cut]:
    """A tensor in blocks of at most `BLOCK` numbers, or `GROUP` rows. What needs no rows is taken as one column."""
    rows, columns = shape if in_rows and len(shape) == 2 else (math.prod(shape), 1)
    step = max(1, BLOCK // columns // GROUP) * GROUP
    for row in range(0, rows, step):
        yield Cut(row, columns, row * columns, min(step, rows - row) * columns)


def move(way: Journey, space: Workspace) -> Moved:
    """One tensor to its place in the new file."""
    info, place = way.info, way.place
    if info is not None and way.value is None and way.update is None and info.dtype == place.dtype:
        return move_unchanged(way, info, space)
    moved, panels = Moved(), panels_for(way)
    before, after = TensorHash(way.source or "", info.dtype if info else "", place.shape), TensorHash(way.name, place.dtype, place.shape)
    with np.errstate(all="ignore"):  # what is not finite is looked for, and refused by name
        for cut in cuts(place.shape, in_rows=way.update is not None):
            raw = read_base(way, cut, space)
            if way.own:
                before.update(raw.data)
            stored = put_on_at_once(way, raw, panels, cut, space, moved) if panels is not None else None
            if stored is None:
                weight = fold(way, raw, cut, space, moved)
                stored = settle(way, raw, weight, space, moved)
                if not math.isfinite(moved.weight + moved.update + moved.rounding):
                    refuse_not_finite(way, weight, moved)
            after.update(stored.data)
            write_at(way.sink, stored.data, place.start + cut.start * WIDTH[place.dtype])
    moved.before, moved.after = before.digest() if way.own else "", after.digest()
    return moved


def move_unchanged(way: Journey, info: TensorInfo, space: Workspace) -> Moved:
    """The base's bytes, perhaps under another name."""
    copy(way.base.fileno(), way.sink, info, way.place)
    assert way.source is not None
    before, after = (TensorHash(name, info.dtype, info.shape) for name in (way.source, way.name))
    kept = way.own and way.source == way.name
    for part in way.base.parts(way.source, space.raw.data):
        after.update(part)
        if way.own and not kept:
            before.update(part)
    digest = after.digest()
    return Moved(before=digest if kept else before.digest() if way.own else "", after=digest)


def read_base(way: Making, cut: Cut, space: Workspace) -> Bytes:
    """The base's bytes of a cut; in fp32 what fills a tensor that it does not have."""
    info = way.info
    if info is None:
        raw = space.raw[: 4 * cut.size]
        raw.view(np.float32)[:] = way.fill
        return raw
    raw = space.raw[: cut.size * WIDTH[info.dtype]]
    way.base.read_into(info.start + cut.start * WIDTH[info.dtype], raw.data)
    return raw


def panels_for(way: Journey) -> Floats | None:
    """The update's `a` as `low_rank.put_on` reads it; None where numpy has to do."""
    info, update = way.info, way.update
    if info is None or info.dtype != way.place.dtype or way.value is not None:
        return None
    if not isinstance(update, Added) or update.magnitude is not None or not low_rank.is_served(info.dtype, info.shape[-1]):
        return None
    return low_rank.in_panels(update.a)


def put_on_at_once(way: Journey, raw: Bytes, panels: Floats, cut: Cut, space: Workspace, moved: Moved) -> Bytes | None:
    """`fold` and `settle` of a low-rank update in one pass over its numbers, which takes a third of the time. None, and nothing added to
    `moved`, where a number is not finite or very large: then those two look at it."""
    assert isinstance(way.update, Added)
    stored = space.stored[: raw.size]
    done = low_rank.put_on(way.place.dtype, raw, way.update.b[cut.row : cut.row + cut.size // cut.columns], panels, stored)
    if done is None:
        return None
    moved.weight += done.weight
    moved.update += done.update
    moved.rounding += done.rounding
    moved.differs |= done.changed
    return stored


def fold(way: Making, raw: Bytes, cut: Cut, space: Workspace, moved: Moved) -> Floats:
    """From the base's bytes of a cut to the new model's numbers (in `space.weight`), before they are rounded; adds to `moved`."""
    weight = space.weight[: cut.size]
    load(raw, way.info.dtype if way.info else "F32", weight)
    moved.weight += squares(weight)
    if way.value is None and isinstance(way.update, Added) and way.update.magnitude is None:
        change = space.update[: cut.size]  # added up here: as the difference of two sums its digits would be lost
        multiply(way.update.b[cut.row : cut.row + cut.size // cut.columns], way.update.a, change.reshape(-1, cut.columns))
        weight += change
        moved.update += squares(change)
    elif way.value is not None or way.update is not None:
        old = space.old[: cut.size]
        old[:] = weight
        if way.value is not None:
            assert way.adapter is not None
            weight[:] = read_float32(way.adapter, way.value, cut.start, cut.size)
        elif way.update is not None:
            put_on(way.update, weight.reshape(-1, cut.columns), cut.row, space)
        moved.update += squares(np.subtract(weight, old, out=old))
    return weight


def settle(way: Journey, raw: Bytes, weight: Floats, space: Workspace, moved: Moved) -> Bytes:
    """The new numbers of a block, rounded once, as the file will have them (in `space.stored`); what that cost is added to `moved`."""
    dtype = way.info.dtype if way.info else "F32"
    stored, rounded = space.stored[: len(weight) * WIDTH[way.place.dtype]], space.rounded[: len(weight)]
    store(weight, way.place.dtype, stored, rounded)
    if not moved.differs:  # one look at most where it does
        other = dtype != way.place.dtype
        moved.differs = bool((rounded != way.fill).any()) if way.source is None else other or not np.array_equal(raw, stored)
    rounded -= weight
    moved.rounding += squares(rounded)
    return stored


def put_on(update: Update, weight: Floats, row: int, space: Workspace) -> None:
    """`weight` (rows, columns), which begins at row number `row` of its tensor, with its update; in place."""
    last = row + len(weight)
    if isinstance(update, Scaled):
        if update.shift is not None:
            weight += update.shift[row:last, None]
        weight *= update.scale[row:last, None]
        return
    change = space.update[: weight.size].reshape(weight.shape)
    multiply(update.b[row:last], update.a, change)
    weight += change
    if update.magnitude is not None:  # DoRA (arXiv:2402.09353, eq. 5): magnitude * (W + BA) / ||W + BA|| by rows
        lengths = np.sqrt(np.square(weight, out=change).sum(axis=1))
        weight *= (update.magnitude[row:last] / lengths)[:, None]


def multiply(b: Floats, a: Floats, out: Floats) -> None:
    """out (rows, in) = b (rows, R) @ a (R, in)."""
    if len(b) % GROUP == 0 and GROUP * a.size <= SMALL:
        np.matmul(b.reshape(-1, GROUP, b.shape[1]), a, out=out.reshape(-1, GROUP, a.shape[1]))
    else:
        np.matmul(b, a, out=out)


def load(raw: Bytes, dtype: str, out: Floats) -> None:
    """Stored numbers as they are, in fp32 (`to_float32` without new memory) or fp64."""
    if out.dtype != np.float32:
        out[:] = to_float32(raw, dtype, out.shape)
    elif dtype == "BF16":
        bits = out.view(np.uint32)
        bits[:] = raw.view(np.uint16)
        bits <<= 16
    else:
        out[:] = raw.view(np.float16 if dtype == "F16" else np.float32)


def store(values: Floats, dtype: str, out: Bytes, rounded: Floats) -> None:
    """fp32 numbers as `dtype`, to the nearest, ties to even: `from_float32` without new memory, for what is finite.

    `rounded` receives what was stored, in fp32 again.
    """
    if dtype == "BF16":
        bits, sums = values.view(np.uint32), rounded.view(np.uint32)
        np.right_shift(bits, 16, out=sums)
        sums &= 1  # 1 where the half that is kept is odd: then a tie goes up
        sums += 0x7FFF
        sums += bits
        sums >>= 16
        np.copyto(out.view(np.uint16), sums, casting="unsafe")
        sums <<= 16
    else:
        kept = out.view(np.float16 if dtype == "F16" else np.float32)
        kept[:] = values
        rounded[:] = kept


def squares(values: Floats) -> float:
    """The sum of their squares; not finite exactly if one of the values is not."""
    total = float(np.dot(values, values))
    return total if math.isfinite(total) else float(np.square(values, dtype=np.float64).sum())


def refuse_not_finite(way: Journey, merged: Floats, moved: Moved) -> None:
    path, dtype = way.base.path, way.place.dtype
    if not math.isfinite(moved.weight):
        raise WorkError(f"{way.source} of the base holds values that are not finite", where=path, hint="copy or download the base again")
    word = next(word for word, code in DTYPES.items() if code == dtype)
    largest = float(np.abs(merged).max())
    hint = "--dtype float32" if dtype != "F32" else "this adapter does not fit this base; use an earlier step"
    raise MergeOverflow(f"merged, {way.name} reaches {largest:.4g}; {word} holds at most {LARGEST[dtype]:.4g}", where=path, hint=hint)


def read_float32(file: SafetensorsFile, name: str, start: int = 0, size: int | None = None) -> Floats:
    """A tensor in fp32; with a `size`, that many of its numbers from number `start` on, as a row."""
    info = file.tensors[name]
    width = FLOAT_BYTES[info.dtype]
    shape = info.shape if size is None else (size,)
    buffer = bytearray(math.prod(shape) * width)
    file.read_into(info.start + start * width, memoryview(buffer))
    return to_float32(buffer, info.dtype, shape)


def copy(source: int, sink: int, info: TensorInfo, place: TensorInfo) -> None:
    """Bytes from file to file inside the kernel, which on some file systems shares the blocks instead of copying."""
    done = 0
    while done < info.size:
        left = info.size - done
        try:
            count = os.copy_file_range(source, sink, left, info.start + done, place.start + done)
        except (OSError, AttributeError):  # another file system, or not Linux
            data = os.pread(source, min(left, 2**20), info.start + done)
            count = len(data)
            write_at(sink, data, place.start + done)
        if count == 0:
            raise WorkError("a file of the base became shorter while it was read")
        done += count


def write_at(sink: int, data: bytes | bytearray | memoryview, start: int) -> None:
    view = memoryview(data).cast("B")
    while view.nbytes:
        count = os.pwrite(sink, view, start)
        view, start = view[count:], start + count
