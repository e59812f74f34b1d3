"""A low-rank update put on a weight in one pass, `put_on` of `cpu/native.c`, against fp64. Mutations seen to fail: after "Caught:"."""

import math

import numpy as np
import pytest

from litlora.cpu import library, low_rank
from litlora.cpu.low_rank import WIDTH, in_panels, put_on
from litlora.safetensors_file import from_float32, to_float32

pytestmark = pytest.mark.skipif(library.working() is None, reason="no kernels for this CPU: no C compiler at installation, or no AVX2")
SHAPES = [(1, 16, 1), (4, 16, 8), (7, 48, 3), (5, 256, 16), (9, 272, 4), (6, 2800, 8), (3, 528, 64)]  # rows, columns, R


def sample(rows: int, columns: int, R: int, dtype: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """W in bytes and in fp64, b, a."""
    random = np.random.default_rng(seed)
    W, b, a = (random.standard_normal(shape, dtype=np.float32) for shape in ((rows, columns), (rows, R), (R, columns)))
    raw = np.frombuffer(from_float32(W, dtype), np.uint8)
    return raw, to_float32(raw, dtype, W.shape).astype(np.float64), 0.1 * b, a


@pytest.mark.parametrize("dtype", low_rank.KINDS)
@pytest.mark.parametrize(("rows", "columns", "R"), SHAPES)
def test_every_number_is_the_sum_rounded_once_and_what_it_cost_is_told(dtype: str, rows: int, columns: int, R: int) -> None:
    """N04, C4. Caught: the last rows left out; the columns after the last whole run of panels left out; halves of a register exchanged; cut
    off instead of rounded; the update's squares in place of the weight's."""
    raw, W, b, a = sample(rows, columns, R, dtype)
    out = np.full(raw.size, 0xA5, np.uint8)
    done = put_on(dtype, raw, b, in_panels(a), out)
    update = b.astype(np.float64) @ a.astype(np.float64)
    stored = to_float32(out, dtype, W.shape).astype(np.float64)
    error = (R + 2) * 2.0**-24 * (np.abs(W) + np.abs(b).astype(np.float64) @ np.abs(a))
    mantissa = {"F32": 23, "BF16": 7}[dtype]
    half = 2.0 ** (np.floor(np.log2(np.abs(W + update))) - mantissa - 1)
    assert (np.abs(stored - W - update) <= half + error).all()
    assert done is not None and done.changed
    assert done.weight == pytest.approx((W**2).sum(), rel=1e-5)
    assert done.update == pytest.approx((update**2).sum(), rel=1e-5)
    if dtype == "BF16":
        assert done.rounding == pytest.approx(((stored - W - update) ** 2).sum(), rel=1e-3)
    else:
        assert done.rounding == 0


def test_ties_go_to_even_and_a_number_that_stays_is_no_change() -> None:
    """N04: every bf16 with half a unit on it, up and down. Caught: ties up; ties down; a last bit that does not count as a change."""
    upper = np.arange(2**16, dtype=np.uint32)
    size = upper & 0x7FFF
    upper = upper[(size >= 0x1000) & (size < 0x5D80)]  # large enough for half a unit to be a number, small enough for a square to be one
    W = (upper << 16).view(np.float32)
    half = (((upper << 16) | 0x8000).view(np.float32) - W).astype(np.float32)
    for side in (1.0, -1.0):
        raw, out = np.frombuffer(from_float32(W, "BF16"), np.uint8), np.empty(2 * len(W), np.uint8)
        done = put_on("BF16", raw, np.full((1, 1), side, np.float32), in_panels(half[None]), out)
        assert done is not None and out.tobytes() == from_float32(W + np.float32(side) * half, "BF16")
    small = np.full((1, len(W)), 2.0**-120, np.float32)
    done = put_on("BF16", raw, np.ones((1, 1), np.float32), in_panels(small), out)
    assert done is not None and not done.changed and out.tobytes() == raw.tobytes()
    small[0, 16 * 40 + 11] = half[16 * 40 + 11] * 2
    done = put_on("BF16", raw, np.ones((1, 1), np.float32), in_panels(small), out)
    assert done is not None and done.changed and out.tobytes() != raw.tobytes()


@pytest.mark.parametrize("dtype", low_rank.KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -3e38])
@pytest.mark.parametrize("place", ["weight", "update"])
def test_what_it_cannot_sum_up_is_left_to_numpy(dtype: str, value: float, place: str) -> None:
    """Promise 12: a number that is not finite is never stored; one whose square is not has fp64. Caught: totals not looked at."""
    raw, W, b, a = sample(7, 48, 3, dtype)
    if place == "weight":
        W = W.astype(np.float32)
        W[6, 47] = value
        raw = np.frombuffer(from_float32(W, dtype) if math.isfinite(value) else stored_bits(W, dtype), np.uint8)
    else:
        a[2, 47] = value
    assert put_on(dtype, raw, b, in_panels(a), np.empty(raw.size, np.uint8)) is None


def stored_bits(values: np.ndarray, dtype: str) -> bytes:
    """What is not finite too."""
    bits = values.view(np.uint32)
    return (bits >> 16).astype(np.uint16).tobytes() if dtype == "BF16" else bits.tobytes()


def test_it_serves_whole_panels_of_what_it_reads() -> None:
    """Everything else is numpy's."""
    served = [
        (dtype, columns) for dtype in ("F32", "BF16", "F16", "F64") for columns in (8, 16, 36, 48) if low_rank.is_served(dtype, columns)
    ]
    assert served == [(dtype, columns) for dtype in ("F32", "BF16") for columns in (16, 48)]
    assert set(WIDTH) == set(low_rank.KINDS)
