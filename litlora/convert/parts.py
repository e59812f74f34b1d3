"""Tensors on their way from one format to another: known by dtype and shape, and not read before they are written.

A `Part` of a file is a view of its map: cutting rows off it costs nothing. One that changes on the way (another dtype, other rows)
is computed when it is written, so that one tensor at a time is in memory.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from litlora.errors import UserError, WorkError
from litlora.safetensors_file import DTYPE_BITS, DTYPES, FLOAT_BYTES, Raw, SafetensorsFile, from_float32, header_bytes, to_float32

# How far a stored number may lie from x, as (relative, absolute): half the distance to the next one.
ROUNDING = {"F32": (0.0, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 2.0**-134)}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor, not yet read."""

    dtype: str  # of a safetensors file: F32, BF16 ...
    shape: tuple[int, ...]
    load: Callable[[], Raw]  # its bytes, little-endian, row-major
    of: "tuple[Part, ...]" = ()  # what it is stacked of, where each of these is made by itself

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def pieces(self) -> "tuple[Part, ...]":
        """Its rows, in as many parts as should be in memory one after the other."""
        return self.of or (self,)

    def bytes(self) -> npt.NDArray[np.uint8]:
        """All of it, as a row of bytes."""
        raw = self.load()
        if isinstance(raw, np.ndarray):
            return np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
        return np.frombuffer(raw, np.uint8)

    def float32(self) -> Floats:
        return to_float32(self.load(), self.dtype, self.shape)

    def rows(self, start: int, end: int) -> "Part":
        """Rows `start` to `end`, whatever the rank."""
        width = self.size // self.shape[0]
        shape = (end - start, *self.shape[1:])
        return Part(dtype=self.dtype, shape=shape, load=lambda: self.bytes()[start * width : end * width])

    def in_order(self, order: npt.NDArray[np.intp]) -> "Part":
        """Row `order[i]` as row i."""
        return Part(
            dtype=self.dtype,
            shape=(len(order), *self.shape[1:]),
            load=lambda: self.bytes().reshape(self.shape[0], -1)[order],
        )


def stacked(parts: Sequence[Part]) -> Part:
    """The rows of these, in order, of one dtype; never in memory together unless they are asked for as one."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Part(dtype=parts[0].dtype, shape=shape, load=lambda: np.concatenate([part.bytes() for part in parts]), of=tuple(parts))


def cast(part: Part, dtype: str, name: str) -> Part:
    """The same numbers as `dtype`, rounded once; `load` raises WorkError where one of them is too large for it."""
    if part.dtype == dtype or part.dtype not in FLOAT_BYTES:
        return part
    if part.of:
        return stacked([cast(one, dtype, name) for one in part.of])

    def load() -> Raw:
        wide = part.float32()
        stored = from_float32(wide, dtype)
        if not np.isfinite(to_float32(stored, dtype, part.shape)).all():
            if not np.isfinite(wide).all():
                raise WorkError(f"{name} holds values that are not finite", hint="convert another copy, or an earlier step")
            largest = float(np.abs(wide).max())
            word = next(word for word, code in DTYPES.items() if code == dtype)
            raise WorkError(f"{name} reaches {largest:.4g}, more than {word} holds", hint="--dtype float32 or bfloat16")
        return stored

    return Part(dtype=dtype, shape=part.shape, load=load)


def parts_of(shards: Mapping[str, Path]) -> dict[str, Part]:
    """The tensors of safetensors files (name -> file), as views of their maps. UserError where a file is unsound."""
    found: dict[str, Part] = {}
    for path in sorted(set(shards.values())):
        with SafetensorsFile(path) as file:  # a view keeps the map alive after the file is closed
            for name, info in file.tensors.items():
                if shards.get(name) == path:
                    found[name] = Part(dtype=info.dtype, shape=info.shape, load=view(file, name))
    return {name: found[name] for name in shards}


def view(file: SafetensorsFile, name: str) -> Callable[[], Raw]:
    raw = file.bytes(name)
    return lambda: raw


def write_parts(path: Path, parts: Mapping[str, Part], progress: Callable[[int], None] = lambda done: None) -> None:
    """One safetensors file. `progress` is told the bytes of each tensor that is done."""
    header, infos = header_bytes({name: (part.dtype, part.shape) for name, part in parts.items()}, {"format": "pt"})
    with open(path, "xb") as file:
        file.write(header)
        for name, info in infos.items():
            start = file.tell()
            for piece in parts[name].pieces:
                raw = piece.bytes()
                file.write(raw.data)
                progress(raw.nbytes)
            assert file.tell() - start == info.size, f"{name}: {file.tell() - start} bytes for {info.dtype} {info.shape}"


def differing(source: Part, stored: Part) -> str:
    """Why `stored` is no faithful copy of `source`, in words; empty where it is: equal, or rounded once to its dtype."""
    if source.shape != stored.shape:
        return f"has the shape {stored.shape} instead of {source.shape}"
    if source.of:
        ends = accumulate(piece.shape[0] for piece in source.of)
        pairs = ((piece, stored.rows(end - piece.shape[0], end)) for piece, end in zip(source.of, ends, strict=True))
        return next(filter(None, (differing(*pair) for pair in pairs)), "")
    if source.dtype == stored.dtype:
        return "" if np.array_equal(source.bytes(), stored.bytes()) else "has other bytes"
    before, after = source.float32(), stored.float32()
    return beyond(before, after, *ROUNDING[stored.dtype])


def beyond(before: Floats, after: Floats, relative: float, absolute: float) -> str:
    """Where `after` is further from `before` than rounding takes it, in words."""
    with np.errstate(invalid="ignore"):
        far = ~(np.abs(before - after) <= np.abs(before) * np.float32(relative) + np.float32(absolute))
    far &= ~(before == after)
    return f"is further from its source than rounding goes, at {int(far.sum()):,} of {far.size:,} numbers" if far.any() else ""


def refuse_not_finite(parts: Mapping[str, Part], where: Path) -> None:
    """UserError with the names of the tensors that hold an infinity or no number at all."""
    faults = [name for name, part in parts.items() if part.dtype in FLOAT_BYTES and not np.isfinite(part.float32()).all()]
    if faults:
        raise UserError("\n  ".join(["these tensors hold values that are not finite:", *faults]), where=where, hint="use an earlier step")
