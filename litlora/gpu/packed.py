"""Attention within each sample of a packed row, in one launch for all of them instead of one each.

It has not run on a GPU yet. Its layout is tested on CPUs, where a loop over the samples stands in for the kernel.
"""

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from litlora.gpu import from_ampere


class Packed:
    """Where the samples of a row begin and end, as the kernel wants it. Made once for a row, used by every block.

    Queries of sample i are the rows from `queries[i]` to `queries[i + 1]`, its keys those from `keys[i]` on. What the samples share as
    their `prefix` is a sample itself, and stands in front of the keys of each other one; the kernel takes a sample's last query to be
    at its last key.
    """

    def __init__(self, prefix: int, segments: Sequence[int], device: torch.device) -> None:
        own = [prefix, *segments] if prefix else list(segments)
        seen = [prefix, *(prefix + n for n in segments)] if prefix else own
        self.queries, self.keys = (ends(lengths, device) for lengths in (own, seen))  # (n + 1,) int32 twice
        self.longest = (max(own), max(seen))
        self.copies = Copies(prefix, segments, device) if prefix else None
        self.mostly_copies = prefix * len(segments) > sum(own)

    @staticmethod
    def of(prefix: int, segments: Sequence[int] | None, device: torch.device) -> "Packed | None":
        """None without samples, or such a kernel for the device. One sample is served as well: over a window torch's own attention would
        need a mask, and where keys have fewer heads its scores would exist as a whole, and be kept."""
        if segments is None or not has_kernel(device):
            return None
        return Packed(0, [prefix + segments[0]], device) if len(segments) == 1 else Packed(prefix, segments, device)

    def serves(self, q: Tensor, v: Tensor) -> bool:
        """Whether the kernel takes these: half precision, heads of the same size in q and v, which is a multiple of 8 up to 256."""
        D = q.size(-1)
        return q.dtype in (torch.float16, torch.bfloat16) and v.size(-1) == D and D % 8 == 0 and D <= 256

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        """q (1, H, T, D) and k, v (1, K, T, D) of the whole row -> (1, T, H, D). A query sees `window` keys, its own the last."""
        q, k, v = (side[0].transpose(0, 1) for side in (q, k, v))  # (T, n, D)
        if self.mostly_copies and torch.is_grad_enabled():  # else every block would keep them: a prompt of 1,500 tokens before 67 answers
            y: Tensor = checkpoint(self.attention, q, k, v, window, scale, use_reentrant=False, preserve_rng_state=False)
            return y.unsqueeze(0)
        return self.attention(q, k, v, window, scale).unsqueeze(0)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:  # (T, n, D) thrice -> (T, H, D)
        if self.copies is not None:
            k, v = (Repeated.apply(side, self.copies) for side in (k, v))
        left = -1 if window is None else window - 1
        grouped = grouping() if q.size(1) != k.size(1) else {}
        y: Tensor = kernel()(q, k, v, self.queries, self.keys, *self.longest, scale=scale, window_size=(left, 0), **grouped)
        return y


def ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """FlashAttention (Dao 2023, arXiv:2307.08691), which comes with torch for NVIDIA's GPUs from Ampere on."""
    return from_ampere(device) and works(device)


def works(device: torch.device) -> bool:
    """Tried on two samples, over a window, with two heads on one of keys, and back; False, and a warning, where it fails: torch may be
    built without it, or without a part of it, or not for this GPU."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q = torch.ones(1, 2, 5, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
            Packed(0, (3, 2), device)(q, q[:, :1], q[:, 1:], 2, 1.0).sum().backward()
    except (ImportError, RuntimeError, ValueError) as error:
        warnings.warn(f"FlashAttention does not work here ({error}): samples are computed one after another", stacklevel=2)
        return False
    return True


@functools.cache
def kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn  # here: the import takes more than a second

    return varlen_attn


@functools.cache
def grouping() -> dict[str, bool]:
    """How to say that k and v have fewer heads than q. Some versions of torch want to hear it, others do not know the word."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel()).parameters else {}


class Copies:
    """Which rows of a row that holds a prefix of P tokens once stand where, if every sample is written out whole."""

    def __init__(self, prefix: int, segments: Sequence[int], device: torch.device) -> None:
        first = torch.arange(prefix)
        stops = itertools.accumulate(segments, initial=prefix)
        rows = [first, *(torch.cat((first, torch.arange(at, stop))) for at, stop in itertools.pairwise(stops))]
        places = torch.cat(rows)  # for each row written out, which one it is
        self.rows = places.to(device)
        self.shared = (places < prefix).nonzero().squeeze(1).view(-1, prefix).to(device)  # (n + 1, P): where the prefix stands
        self.own = (places >= prefix).nonzero().squeeze(1).to(device)  # (T - P,): where all else does


class Repeated(torch.autograd.Function):
    """x (T, K, D) with the samples written out whole. The gradients of the copies of a prefix are summed and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x.index_select(0, copies.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat((grad[ctx.copies.shared].sum(0), grad.index_select(0, ctx.copies.own))), None
