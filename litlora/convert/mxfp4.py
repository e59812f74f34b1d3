"""Weights in MXFP4, as gpt-oss is released, made plain: 32 numbers of 4 bits share a power of two (OCP Microscaling Formats v1.0).

A number is E2M1 (section 5.3.3: 1 sign bit, 2 of exponent with bias 1, 1 of mantissa; two lie in a byte, the first in its low half), its
scale E8M0 (section 5.4.1: 2^(code - 127), 255 is no number). For each matrix of a layer's experts there are `..._blocks`, of the shape
(E, out, in / 32, 16), and `..._scales`, (E, out, in / 32), both uint8; the plain one is transposed, (E, in, out). bf16 and fp32 hold
every product.
"""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from litlora.convert.parts import Part, stacked
from litlora.errors import UserError, WorkError
from litlora.safetensors_file import FLOAT_BYTES, from_float32, to_float32

CALLED = "MXFP4"
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32  # numbers that share a scale
NO_NUMBER, BIAS = 255, 127
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # code & 7; the bit above is the sign
PAIRS = np.stack([np.where(code & 8, -E2M1[code & 7], E2M1[code & 7]) for code in (np.arange(256) & 15, np.arange(256) >> 4)], 1)


def dequantised(stored: Mapping[str, Part], quantisation: Any, dtype: str, where: Path) -> tuple[dict[str, Part], dict[str, str]]:
    """(the plain tensors, those left out and why). UserError where blocks and scales do not make a tensor."""
    found: dict[str, Part] = {}
    for name, part in stored.items():
        if part.dtype != "U8" or not name.endswith((BLOCKS, SCALES)):
            found[name] = part
            continue
        whole = name.removesuffix(BLOCKS).removesuffix(SCALES)
        lost = next((end for end in (BLOCKS, SCALES) if whole + end not in stored), None)
        if lost or whole in stored:
            what = f"{whole + lost} is missing" if lost else f"{whole} is there a second time, as {name}"
            raise UserError(what, where=where, hint="fetch the model again")
        if name.endswith(BLOCKS):
            found[whole] = plain(whole, part, stored[whole + SCALES], dtype, where)
    return found, {}


def plain(name: str, blocks: Part, scales: Part, dtype: str, where: Path) -> Part:
    """The experts' matrix (E, in, out) as `dtype`; each expert is computed when it is written."""
    fits = len(blocks.shape) == 4 and blocks.shape[:-1] == scales.shape and 2 * blocks.shape[-1] == BLOCK
    fits = fits and 0 not in blocks.shape and scales.dtype == "U8"
    if not fits:
        its = f"its blocks {blocks.dtype} {list(blocks.shape)}, its scales {scales.dtype} {list(scales.shape)}"
        raise UserError(f"{name}: {its}: no layout of MXFP4 that is known", where=where, hint="fetch the model again")
    experts, out, groups, _ = blocks.shape
    ranges = [(expert, expert + 1) for expert in range(experts)]
    parts = [(blocks.rows(*one), scales.rows(*one)) for one in ranges]
    shape = (1, groups * BLOCK, out)
    return stacked([Part(dtype=dtype, shape=shape, load=partial(of_one, name, *part, dtype)) for part in parts])


def of_one(name: str, blocks: Part, scales: Part, dtype: str) -> npt.NDArray[np.uint8]:
    """One expert: its numbers (in, out). WorkError where one of them is none."""
    pairs, finite = products(dtype)
    high = scales.bytes().astype(np.intp).reshape(-1, 1) << 8
    codes = high | blocks.bytes().reshape(-1, BLOCK // 2)
    if not finite[high.max() | 255] and not finite[codes].all():  # 255 is twice the largest number
        raise WorkError(f"{name} holds values that are not finite", hint="fetch the model again")
    numbers = pairs[codes].view(f"u{FLOAT_BYTES[dtype]}").reshape(blocks.shape[1], -1)  # (out, in)
    return np.ascontiguousarray(numbers.T).reshape(-1).view(np.uint8)


@cache
def products(dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """For a scale (high byte) and two numbers (low byte): both as `dtype` in one whole number, whether they are finite; (65536,) each."""
    with np.errstate(over="ignore"):
        values = np.ldexp(PAIRS, np.arange(256)[:, None, None] - BIAS)  # (256, 256, 2)
    values[NO_NUMBER] = np.nan
    stored = np.frombuffer(from_float32(values, dtype), np.uint8)
    finite = np.isfinite(to_float32(stored, dtype, values.shape)).all(-1).reshape(-1)
    return stored.view(f"u{2 * FLOAT_BYTES[dtype]}"), finite
