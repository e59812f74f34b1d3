"""`native.c` as functions of tensors in fp32 on a CPU, and for which tensors each serves. Letters for shapes are those of `model.py`."""

import ctypes
import functools
import importlib.machinery
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from litlora.cpu import FEW, WIDTH

KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "nf4": 3}  # as in native.c
CODES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "nf4": torch.uint8}
EIGHT = 8  # numbers in a register
TOGETHER = 8  # as in native.c
PARALLEL = 2**15  # multiplications from which on more than one thread is worth waking
PARTS = 4  # of a thread's work: who is busy with something else takes fewer
SMALL = 2**19  # numbers up to which one thread does with them what torch would wake several for: of all rows that a product serves

VERSION = 1  # to be counted up, here and in native.c, where these change
SIGNATURES = {
    "product": [c_int, *[c_void_p] * 5, *[c_long] * 4, c_int],
    "rms_norm": [*[c_void_p] * 3, c_long, c_long, c_float],
    "swiglu": [c_void_p, c_void_p, c_long],
    "turned": [c_void_p, c_long, c_long, *[c_void_p] * 3, *[c_long] * 3, c_int],
    "attention_of_few": [*[c_void_p] * 6, *[c_long] * 9, c_float, c_long, c_int],
}


@functools.cache
def compiled() -> Path | None:
    """Where the compiler put it when litlora was installed."""
    paths = (Path(__file__).with_name(f"_native{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def library() -> ctypes.CDLL:
    """What `compiled` names. OSError where it cannot be loaded, or is of another version: a source tree that was updated since."""
    path = compiled()
    assert path is not None
    loaded = ctypes.CDLL(str(path))
    found = loaded.version() if hasattr(loaded, "version") else None
    if found != VERSION:
        raise OSError(f"{path} is of version {found}, not {VERSION}: install litlora again")
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def is_usable() -> bool:
    return compiled() is not None and bool(library().usable())


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
    library().product(
        KINDS[kind], codes.data_ptr(), scales if scales is None else scales.data_ptr(), values if values is None else values.data_ptr(),
        x.data_ptr(), y.data_ptr(), x.numel() // width, width, out, *shares(out * width),
    )  # fmt: skip
    return y


def norms(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` serves x (..., C): little, of whole registers, with gains (C,) in fp32."""
    return x.numel() <= SMALL and x.size(-1) == weight.numel() and not x.size(-1) % EIGHT and weight.dtype is torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.rms_norm`."""
    x, weight, C = x.contiguous(), weight.contiguous(), x.size(-1)
    y = torch.empty_like(x)
    library().rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // C, C, eps)
    return y


def gates(gate: Tensor, up: Tensor) -> bool:
    """Whether `swiglu` serves gate and up (..., F): little, of whole registers."""
    return gate.numel() <= SMALL and gate.shape == up.shape and gate.dtype is up.dtype and not gate.numel() % EIGHT


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in place of the gate where that lies whole."""
    gate, up = gate.contiguous(), up.contiguous()
    library().swiglu(gate.data_ptr(), up.data_ptr(), gate.numel())
    return gate


def turns(x: Tensor, cos: Tensor) -> bool:
    """Whether `turned` serves x (B, n, T, R): little, one row, whose heads lie whole."""
    return x.numel() <= SMALL and x.size(0) == 1 and x.stride(3) == 1 and cos.numel() == x.size(2) * x.size(3)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As `kernels.turned`, forwards."""
    (_, n, T, R), cos, sin = x.shape, cos.contiguous(), sin.contiguous()
    y = x.new_empty(x.shape)
    library().turned(x.data_ptr(), x.stride(1), x.stride(2), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), n, T, R, interleaved)
    return y


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention_of_few` serves q (B, H, T, D) with k (B, K, S, D) and v (B, K, S, Dv): few queries, and views of a whole cache."""
    D, Dv = q.size(3), v.size(3)
    whole = all(side.stride(3) == 1 and side.stride(2) == width and side.dtype is q.dtype for side, width in ((k, D), (v, Dv)))
    alike = k.stride(1) // D == v.stride(1) // Dv and (len(q) == 1 or k.stride(0) == k.size(1) * k.stride(1))
    return q.size(2) <= FEW and not D % EIGHT and not Dv % EIGHT and whole and alike


def attention_of_few(positions: Tensor | None, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Plain attention of q (B, H, T, D) over k (B, K, S, D) and v (B, K, S, Dv), which are a cache's; (B, T, H, Dv).

    A row's last query stands at its last `positions` (B, T) int64, or, None, at S - 1. Each sees so many as `window` says, itself the last.
    """
    q = q.contiguous()
    (B, H, T, D), (K, S), Dv, size = q.shape, k.shape[1:3], v.size(3), k.stride(1) // k.size(3)
    parts, threads = shares(B * H * T * S * D)
    y, scores = q.new_empty(B, T, H, Dv), q.new_empty(parts, TOGETHER, size + EIGHT - 1)
    last = None if positions is None else positions[:, -1].contiguous()
    library().attention_of_few(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), scores.data_ptr(), None if last is None else last.data_ptr(), S - 1,
        B, H, K, T, size, D, Dv, window or 0, scale, parts, threads,
    )  # fmt: skip
    return y
