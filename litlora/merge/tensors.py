"""One tensor on its way into the new model, in blocks of rows."""

import math
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from litlora.checkpoint.fingerprint import TensorHash
from litlora.errors import WorkError
from litlora.safetensors_file import FLOAT_BYTES, SafetensorsFile, TensorInfo, to_float32

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # config.json's word: the file's
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
    differs: bool = False  # whether any byte is another one than in the base; of what is new there, than zero
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


@dataclass(frozen=True)
class Journey:
    """One tensor's way: out of the base, the adapter, or nothing; what is put on it; its place in the new file."""

    name: str  # in the new model
    place: TensorInfo
    sink: int  # descriptor of the new file
    base: SafetensorsFile
    source: str | None  # the base's tensor it starts from; None: zero
    own: bool  # that tensor became this one
    adapter: SafetensorsFile | None
    value: str | None  # the adapter's tensor that stands in place of the base's
    update: Update | None


class Workspace:
    """The memory that one thread works in: block after block goes through it."""

    def __init__(self, size: int) -> None:
        self.raw, self.stored = np.empty(4 * size, np.uint8), np.empty(4 * size, np.uint8)  # as in the files
        self.weight, self.update, self.rounded, self.old = (np.empty(size, np.float32) for _ in range(4))


def move(way: Journey, space: Workspace) -> Moved:
    """One tensor to its place in the new file."""
    info = way.base.tensors[way.source] if way.source is not None else None
    if info is not None and way.value is None and way.update is None and info.dtype == way.place.dtype:
        return move_unchanged(way, info, space)
    moved, place = Moved(), way.place
    before, after = TensorHash(way.source or "", info.dtype if info else "", place.shape), TensorHash(way.name, place.dtype, place.shape)
    in_rows = way.update is not None and len(place.shape) == 2
    rows, columns = place.shape if in_rows else (math.prod(place.shape), 1)
    step = max(1, BLOCK // columns // GROUP) * GROUP
    with np.errstate(all="ignore"):  # what is not finite is looked for, and refused by name
        for row in range(0, rows, step):
            start, size = row * columns, min(step, rows - row) * columns
            raw = read_base(way, info, start, size, space)
            if way.own:
                before.update(raw.data)
            stored = fold(way, raw, info.dtype if info else "F32", start, row, columns, space, moved)
            if not math.isfinite(moved.weight + moved.update + moved.rounding):
                refuse_not_finite(way, space.weight[:size], moved)
            after.update(stored.data)
            write_at(way.sink, stored.data, place.start + start * WIDTH[place.dtype])
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


def read_base(way: Journey, info: TensorInfo | None, start: int, size: int, space: Workspace) -> Bytes:
    """The base's bytes of `size` numbers from number `start` on; zeros of fp32 for a tensor that it does not have."""
    if info is None:
        raw = space.raw[: 4 * size]
        raw[:] = 0
        return raw
    raw = space.raw[: size * WIDTH[info.dtype]]
    way.base.read_into(info.start + start * WIDTH[info.dtype], raw.data)
    return raw


def fold(way: Journey, raw: Bytes, dtype: str, start: int, row: int, columns: int, space: Workspace, moved: Moved) -> Bytes:
    """A block of rows from the base's bytes to the new model's (in `space.stored`); what happened is added to `moved`."""
    size = len(raw) // WIDTH[dtype]
    weight, rounded = space.weight[:size], space.rounded[:size]
    load(raw, dtype, weight)
    moved.weight += squares(weight)
    if way.value is None and isinstance(way.update, Added) and way.update.magnitude is None:
        change = space.update[:size]  # added up here: as the difference of two sums its digits would be lost
        multiply(way.update.b[row : row + size // columns], way.update.a, change.reshape(-1, columns))
        weight += change
        moved.update += squares(change)
    elif way.value is not None or way.update is not None:
        old = space.old[:size]
        old[:] = weight
        if way.value is not None:
            assert way.adapter is not None
            weight[:] = read_float32(way.adapter, way.value, start, size)
        elif way.update is not None:
            put_on(way.update, weight.reshape(-1, columns), row, space)
        moved.update += squares(np.subtract(weight, old, out=old))
    stored = space.stored[: size * WIDTH[way.place.dtype]]
    store(weight, way.place.dtype, stored, rounded)
    rounded -= weight
    moved.rounding += squares(rounded)
    if not moved.differs:  # one look at most where it does
        moved.differs = bool(stored.any()) if way.source is None else dtype != way.place.dtype or not np.array_equal(raw, stored)
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
    """Stored numbers in fp32, exactly: `to_float32` without new memory."""
    if dtype == "BF16":
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
