"""`native.c` as functions of tensors in fp32 on a CPU, and for which tensors each serves. Letters for shapes are those of `model.py`."""

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_long

import torch
from torch import Tensor

from litlora.cpu import EIGHT, FEW, WIDTH
from litlora.cpu.library import load

KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "nf4": 3}  # as in native.c
CODES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "nf4": torch.uint8}
TOGETHER = 8  # queries that read keys together, as in native.c: each with scores of its own
PARALLEL = 2**15  # multiplications from which on more than one thread is worth waking
PARTS = 4  # of a thread's work: who is busy with something else takes fewer
SMALL = 2**19  # numbers up to which one thread does with them what torch would wake several for: of all rows that a product serves

CALLS = {  # in this order there (`library.VERSION`): of each the pointers, of which the last is written to, whole numbers and others
    "product": "5P6qd",
    "rms_norm": "3P2qd",
    "swiglu": "2Pq",
    "turned": "4P6q",
    "summed": "3Pqd",
    "placed": "3P8q",
    "attention_of_few": "7P11q2d",
}
CALL_SIZE = 8 * 21  # bytes, of the largest
FORMS = {name: struct.Struct(f"q{form}{CALL_SIZE - struct.calcsize('q' + form)}x") for name, form in CALLS.items()}
NUMBERS = {name: number for number, name in enumerate(CALLS)}


class Recording(threading.local):
    """Who hears of each call in this thread, before it: a call as bytes, and the tensors it points into, of which it writes to the last."""

    heard: Callable[[bytes, Sequence[Tensor | None]], None] | None = None
    room: Tensor | None = None  # for scores, of which no two calls of a recording have need at once


RECORDING = Recording()


@functools.cache
def library() -> ctypes.CDLL:
    loaded = load()
    assert loaded.call_size() == CALL_SIZE and loaded.together() == TOGETHER
    loaded.run.argtypes, loaded.run.restype = [c_char_p, c_long], None
    return loaded


def run(calls: Sequence[bytes]) -> None:
    library().run(b"".join(calls), len(calls))


def call(name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """One function of native.c, now; tensors and numbers in the order of its struct there."""
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    record = FORMS[name].pack(NUMBERS[name], *pointers, *numbers)
    if RECORDING.heard is not None:
        RECORDING.heard(record, tensors)
    library().run(record, 1)


def shares(size: int) -> tuple[int, int]:
    """Into how many parts work of so many multiplications goes, for how many threads."""
    threads = torch.get_num_threads() if size > PARALLEL else 1
    return (PARTS * threads, threads) if threads > 1 else (1, 1)


def multiplies(x: Tensor, kind: str, codes: Tensor, out: int, scales: Tensor | None = None) -> bool:
    """Whether `product` serves x (..., in): few rows, of whole registers, and a weight whose numbers lie as they were made."""
    width = x.size(-1)
    count = out * width if kind != "nf4" else out * width // 2
    return (
        0 < x.numel() <= FEW * width
        and not width % WIDTH[kind]
        and codes.dtype is CODES[kind]
        and codes.numel() == count
        and codes.is_contiguous()
        and (scales is None or scales.dtype is torch.float32)
    )


def product(x: Tensor, kind: str, codes: Tensor, out: int, scales: Tensor | None = None, values: Tensor | None = None) -> Tensor:
    """x (..., in) times a weight (out, in) transposed, (..., out). `codes`, `scales` (fp32) and `values` as in quantized.py."""
    x, width = x.contiguous(), x.size(-1)
    y = x.new_empty((*x.shape[:-1], out))
    call("product", (codes, scales, values, x, y), KINDS[kind], x.numel() // width, width, out, *shares(out * width), 0)
    return y


def add_product(y: Tensor, x: Tensor, weight: Tensor, scale: float) -> None:
    """y (..., out), which lies whole, += scale x W^T, of x (..., in) and W (out, in) in fp32 that `multiplies` has seen; scale is not 0."""
    out, width = weight.shape
    x = x.contiguous()
    call("product", (weight, None, None, x, y), KINDS["fp32"], x.numel() // width, width, out, *shares(out * width), scale)


def norms(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` serves x (..., C): little, of whole registers, with gains (C,) in fp32."""
    return x.numel() <= SMALL and x.size(-1) == weight.numel() and not x.size(-1) % EIGHT and weight.dtype is torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.rms_norm`."""
    x, weight, C = x.contiguous(), weight.contiguous(), x.size(-1)
    y = torch.empty_like(x)
    call("rms_norm", (x, weight, y), x.numel() // C, C, eps)
    return y


def gates(gate: Tensor, up: Tensor) -> bool:
    """Whether `swiglu` serves gate and up (..., F): little, of whole registers."""
    return gate.numel() <= SMALL and gate.shape == up.shape and gate.dtype is up.dtype and not gate.numel() % EIGHT


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in place of the gate where that lies whole."""
    gate, up = gate.contiguous(), up.contiguous()
    call("swiglu", (up, gate), gate.numel())
    return gate


def turns(x: Tensor, cos: Tensor) -> bool:
    """Whether `turned` serves x (B, n, T, R): little, one row, whose heads lie whole."""
    return x.numel() <= SMALL and x.size(0) == 1 and x.stride(3) == 1 and cos.numel() == x.size(2) * x.size(3)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As `kernels.turned`, forwards."""
    (_, n, T, R), cos, sin = x.shape, cos.contiguous(), sin.contiguous()
    y = x.new_empty(x.shape)
    call("turned", (x, cos, sin, y), x.stride(1), x.stride(2), n, T, R, interleaved)
    return y


def sums(a: Tensor, b: Tensor) -> bool:
    """Whether `summed` serves a and b: little, and alike."""
    alike = a.shape == b.shape and a.dtype is b.dtype is torch.float32 and a.is_contiguous() and b.is_contiguous()
    return alike and a.is_cpu and a.numel() <= SMALL


def summed(a: Tensor, b: Tensor, scale: float, y: Tensor) -> Tensor:
    """a + scale b, in y."""
    call("summed", (a, b, y), a.numel(), scale)
    return y


def places(side: Tensor, more: Tensor) -> bool:
    """Whether `place` serves a side (B, K, size, D) of a cache and what comes to it, (B, K, T, D): whole heads."""
    return side.is_contiguous() and more.stride(3) == 1 and more.dtype is side.dtype


def place(side: Tensor, more: Tensor, positions: Tensor) -> None:
    """As `kernels.place`."""
    (B, K, size, D), positions = side.shape, positions.contiguous()
    call("placed", (more, positions, side), *more.stride()[:3], B, K, more.size(2), size, D)


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention_of_few` serves q (B, H, T, D) with k (B, K, S, D) and v (B, K, S, Dv): few queries, and views of a whole cache."""
    D, Dv = q.size(3), v.size(3)
    whole = all(side.stride(3) == 1 and side.stride(2) == width and side.dtype is q.dtype for side, width in ((k, D), (v, Dv)))
    alike = k.stride(1) // D == v.stride(1) // Dv and (len(q) == 1 or k.stride(0) == k.size(1) * k.stride(1))
    return q.size(2) <= FEW and not D % EIGHT and not Dv % EIGHT and whole and alike


def attention_of_few(
    positions: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of q (B, H, T, D) over k (B, K, S, D) and v (B, K, S, Dv), which are a cache's; (B, T, H, Dv).

    A row's last query stands at its last `positions` (B, T) int64, or, None, at S - 1. Each sees so many as `window` says, itself the last.
    `cap` and `sinks` (H,) as in `model.scored_attention`.
    """
    q = q.contiguous()
    (B, H, T, D), (K, S), Dv, size = q.shape, k.shape[1:3], v.size(3), k.stride(1) // k.size(3)
    parts, threads = shares(B * H * T * S * D)
    y, scores = q.new_empty(B, T, H, Dv), room(parts * TOGETHER * (size + EIGHT - 1))
    last = None if positions is None else positions[:, -1].contiguous()
    sinks = None if sinks is None else sinks.to(q.dtype).contiguous()
    numbers = (S - 1, B, H, K, T, size, D, Dv, window or 0, parts, threads, scale, cap or 0)
    call("attention_of_few", (q, k, v, last, sinks, scores, y), *numbers)
    return y


def room(count: int) -> Tensor:
    """Memory for so many numbers, of which nothing is left after a call: the same for all calls that are recorded together."""
    if RECORDING.heard is None:
        return torch.empty(count)
    if RECORDING.room is None or RECORDING.room.numel() < count:
        RECORDING.room = torch.empty(count)
    return RECORDING.room
