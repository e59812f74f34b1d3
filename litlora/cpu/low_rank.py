"""`put_on` of `native.c` as a function of numpy's arrays: a merge would wait longer for torch's import than it takes."""

import math
from ctypes import c_double, c_long, c_void_p
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from litlora.cpu import library

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

KINDS = {"F32": 0, "BF16": 1}  # as in native.c
WIDTH = {"F32": 4, "BF16": 2}  # bytes
PANEL = 16  # columns of a that lie together, as in native.c


class PutOn(NamedTuple):
    """What became of a weight's numbers. Sums of squares over all of them, in fp64 of sums of some hundred in fp32."""

    weight: float  # of W
    update: float  # of b a
    rounding: float  # of what was stored less W + b a
    changed: bool  # whether any number was stored as another one than it was


def is_served(dtype: str, columns: int) -> bool:
    """Whether `put_on` serves a weight of this dtype, by safetensors' word, with so many columns."""
    return dtype in KINDS and columns % PANEL == 0 and library.working() is not None


def in_panels(a: Floats) -> Floats:
    """a (R, in) as `put_on` reads it, (in / PANEL, R, PANEL): so its columns come one after the other."""
    return np.ascontiguousarray(a.reshape(len(a), -1, PANEL).swapaxes(0, 1))


def put_on(dtype: str, raw: Bytes, b: Floats, panels: Floats, out: Bytes) -> PutOn | None:
    """`raw`, the bytes of rows of a weight W (rows, in), with b (rows, R) @ a on them, rounded once to `dtype`, ties to even, into `out`.

    None, and nothing to be relied on in `out`, where a number is not finite, or too large for its square in fp32.
    """
    rows, R = b.shape
    columns = panels.size // R
    loaded, b = library.load(), np.ascontiguousarray(b)
    assert raw.size == out.size == rows * columns * WIDTH[dtype] and panels.flags.c_contiguous and b.dtype == panels.dtype == np.float32
    totals = (c_double * 3)()
    pointers = (c_void_p(array.ctypes.data) for array in (raw, b, panels, out))
    sizes = (c_long(size) for size in (rows, columns, R))
    changed: Any = loaded.put_on(c_long(KINDS[dtype]), *pointers, *sizes, totals)
    weight, update, rounding = totals
    return PutOn(weight, update, rounding, bool(changed)) if math.isfinite(weight + update + rounding) else None
