"""One tensor on its way from the base to the merged model, in blocks of rows."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from litlora.checkpoint.fingerprint import TensorHash
from litlora.errors import WorkError
from litlora.safetensors_file import SafetensorsFile, TensorInfo, to_float32

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

    before: str = ""  # digest in the base
    after: str = ""  # digest in the merged model
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
class Update:
    """W' = W + b @ a, and with a magnitude (DoRA) each row of that brought to the length it learnt."""

    a: Floats  # (R, in)
    b: Floats  # (out, R), times the scale
    magnitude: Floats | None  # (out,)


class Workspace:
    """The memory that one thread works in: block after block goes through it."""

    def __init__(self, size: int) -> None:
        self.raw, self.stored = np.empty(4 * size, np.uint8), np.empty(4 * size, np.uint8)  # as in the files
        self.weight, self.update, self.rounded = (np.empty(size, np.float32) for _ in range(3))


def move(name: str, source: SafetensorsFile, sink: int, place: TensorInfo, update: Update | None, space: Workspace) -> Moved:
    """One tensor from the base's file to its place in the new one, with its update if it has one."""
    info, moved = source.tensors[name], Moved()
    before, after = (TensorHash(name, dtype, info.shape) for dtype in (info.dtype, place.dtype))
    if update is None and info.dtype == place.dtype:
        copy(source.fileno(), sink, info, place)
        for part in source.parts(name, space.raw.data):
            before.update(part)
        moved.before = moved.after = before.digest()
        return moved
    rows, columns = info.shape if update is not None else (math.prod(info.shape), 1)
    step = max(1, BLOCK // columns // GROUP) * GROUP
    with np.errstate(all="ignore"):  # what is not finite is looked for, and refused by name
        for row in range(0, rows, step):
            size = min(step, rows - row) * columns
            raw = space.raw[: size * WIDTH[info.dtype]]
            source.read_into(info.start + row * columns * WIDTH[info.dtype], raw.data)
            before.update(raw.data)
            stored = fold(raw, info.dtype, place.dtype, update, row, columns, space, moved)
            if not math.isfinite(moved.weight + moved.update + moved.rounding):
                refuse_not_finite(name, source.path, place.dtype, space.weight[:size], moved)
            after.update(stored.data)
            write_at(sink, stored.data, place.start + row * columns * WIDTH[place.dtype])
    moved.before, moved.after = before.digest(), after.digest()
    return moved


def fold(raw: Bytes, dtype: str, stored_dtype: str, update: Update | None, row: int, columns: int, space: Workspace, moved: Moved) -> Bytes:
    """A block of rows from the base's bytes to the merged model's (in `space.stored`); what happened is added to `moved`."""
    size = len(raw) // WIDTH[dtype]
    weight, rounded = space.weight[:size], space.rounded[:size]
    load(raw, dtype, weight)
    moved.weight += squares(weight)
    if update is not None:
        change = space.update[:size]
        last = row + size // columns
        multiply(update.b[row:last], update.a, change.reshape(-1, columns))
        if update.magnitude is None:
            moved.update += squares(change)
            weight += change
        else:
            lengthen(weight, change, rounded, update.magnitude[row:last])
            moved.update += squares(rounded)
    stored = space.stored[: size * WIDTH[stored_dtype]]
    store(weight, stored_dtype, stored, rounded)
    rounded -= weight
    moved.rounding += squares(rounded)
    return stored


def multiply(b: Floats, a: Floats, out: Floats) -> None:
    """out (rows, in) = b (rows, R) @ a (R, in)."""
    if len(b) % GROUP == 0 and GROUP * a.size <= SMALL:
        np.matmul(b.reshape(-1, GROUP, b.shape[1]), a, out=out.reshape(-1, GROUP, a.shape[1]))
    else:
        np.matmul(b, a, out=out)


def lengthen(weight: Floats, change: Floats, difference: Floats, magnitude: Floats) -> None:
    """DoRA (arXiv:2402.09353, eq. 5): `weight` becomes magnitude * (W + BA) / ||W + BA|| by rows; `difference`, what that adds to it."""
    change += weight
    rows = change.reshape(len(magnitude), -1)
    lengths = np.sqrt(np.square(rows, out=difference.reshape(rows.shape)).sum(axis=1))
    rows *= (magnitude / lengths)[:, None]
    np.subtract(change, weight, out=difference)
    weight[:] = change


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


def refuse_not_finite(name: str, path: Path, dtype: str, merged: Floats, moved: Moved) -> None:
    if not math.isfinite(moved.weight):
        raise WorkError(f"{name} of the base holds values that are not finite", where=path, hint="copy or download the base again")
    word = next(word for word, code in DTYPES.items() if code == dtype)
    largest = float(np.abs(merged).max())
    hint = "--dtype float32" if dtype != "F32" else "this adapter does not fit this base; use an earlier step"
    raise MergeOverflow(f"merged, {name} reaches {largest:.4g}; {word} holds at most {LARGEST[dtype]:.4g}", where=path, hint=hint)


def read_float32(file: SafetensorsFile, name: str) -> Floats:
    info = file.tensors[name]
    buffer = bytearray(info.size)
    file.read_into(info.start, memoryview(buffer))
    return to_float32(buffer, info.dtype, info.shape)


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
