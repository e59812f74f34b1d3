"""Weights in eight bits with scales, as published in fp8, made plain: W = scale * fp8(W), in fp32, rounded once to the model's dtype.

Three layouts have one arithmetic: a scale for each block of rows and columns (`weight_scale_inv`, which multiplies in spite of its name:
DeepSeek-V3's and Qwen3's), for each row, or for a whole matrix (`weight_scale`: compressed-tensors, fbgemm). fp8 is E4M3 without
infinities (Micikevicius et al. 2022, arXiv:2209.05433, table 1): 1 sign bit, 4 of exponent (bias 7), 3 of mantissa.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from litlora.convert.parts import Floats, Part
from litlora.errors import UserError
from litlora.safetensors_file import from_float32

CALLED = "fp8"
FP8 = "F8_E4M3"
SCALES = ("weight_scale_inv", "weight_scale")
OF_ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale", "activation_scale", "input_scale_ub")
NOT_WEIGHTS = "a scale of activations, which are computed as they are"


def dequantised(stored: Mapping[str, Part], quantisation: Any, dtype: str, where: Path) -> tuple[dict[str, Part], dict[str, str]]:
    """(the plain tensors, those left out and why). UserError where a matrix has no scale, or one that does not fit it."""
    scales = {name: part for name, part in stored.items() if name.endswith(SCALES)}
    dropped = {name: NOT_WEIGHTS for name in stored if name.endswith(OF_ACTIVATIONS)}
    tensors = {name: part for name, part in stored.items() if name not in scales and name not in dropped}
    for name, part in tensors.items():
        own = next(
            (scales.pop(f"{name}{end.removeprefix('weight')}") for end in SCALES if f"{name}{end.removeprefix('weight')}" in scales), None
        )
        if part.dtype == FP8 and own is None:
            raise UserError(f"{name} is {FP8} and has no scale", where=where, hint="use the directory of the model before it was quantised")
        if own is not None:
            tensors[name] = plain(name, part, own, block_of(quantisation), dtype, where)
    if scales:
        what = f"{next(iter(scales))} is the scale of no matrix"
        raise UserError(what, where=where, hint="use the directory of the model before it was quantised")
    return tensors, dropped


def block_of(quantisation: Any) -> tuple[int, int]:
    """Rows and columns that share a scale, where a matrix of scales says nothing else."""
    size = quantisation.get("weight_block_size") if isinstance(quantisation, Mapping) else None
    ok = isinstance(size, list) and len(size) == 2 and all(type(number) is int and number > 0 for number in size)
    return (size[0], size[1]) if ok and size else (128, 128)


def plain(name: str, part: Part, scale: Part, block: tuple[int, int], dtype: str, where: Path) -> Part:
    """The weight (out, in) as `dtype`, computed when it is written."""
    wide = scale.dtype in ("F32", "BF16", "F16")
    if part.dtype != FP8 or len(part.shape) != 2 or not wide or not fits(scale.shape, part.shape, block):
        what = f"{name} is {part.dtype} {list(part.shape)}, its scale {scale.dtype} {list(scale.shape)}: no layout of fp8 that is known"
        raise UserError(what, where=where, hint="use the directory of the model before it was quantised")

    def load() -> bytes:
        return from_float32(e4m3(part) * spread(scale.float32(), part.shape, block), dtype)

    return Part(dtype=dtype, shape=part.shape, load=load)


def fits(scale: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int]) -> bool:
    rows, columns = shape
    blocks = (-(-rows // block[0]), -(-columns // block[1]))
    return scale in ((), (1,), (1, 1), (rows,), (rows, 1), blocks)


def spread(scale: Floats, shape: tuple[int, ...], block: tuple[int, int]) -> Floats:
    """A scale for every weight, or what numpy makes one of."""
    rows, columns = shape
    if scale.size == 1:
        return scale.reshape(1, 1)
    if scale.shape in ((rows,), (rows, 1)):
        return scale.reshape(rows, 1)
    return scale.repeat(block[0], 0)[:rows].repeat(block[1], 1)[:, :columns]


def e4m3(part: Part) -> Floats:
    """Stored fp8 numbers as fp32, exactly."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))  # the least exponent: no leading 1
    size[codes & 127 == 127] = np.nan
    table = np.where(codes & 128, -size, size).astype(np.float32)
    return table[part.bytes()].reshape(part.shape)
