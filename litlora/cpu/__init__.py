"""What a CPU computes in another way than torch or numpy. Where few tokens come at a time, as in an answer, reading the weights is all the
work, and what torch does around a product takes as long as the product; where a model is merged, going over it once instead of once for
each operation is. Nothing here knows a model.

    native.c      products with weights in 32, 16, 8 and 4 bits, each number read once; norm, SwiGLU, rotary positions, attention of a
                  query; a low-rank update put on a weight
    library.py    where the compiler put that
    native.py     the same as functions of tensors
    low_rank.py   the last as a function of arrays, without torch
    tape.py       what was computed once, to be computed again without Python

It is compiled where litlora is installed, if there is a C compiler, for x86-64, and serves where the CPU has AVX2 and FMA. Elsewhere, and
wherever a gradient is recorded, torch computes, and numpy where a model is merged: `kernels.py`, `quantized.py`, `model.py` and
`merge/tensors.py` ask here, each thing at one place.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from litlora.cpu import library

if TYPE_CHECKING:
    from torch import Tensor

EIGHT = 8  # numbers in a register
FEW = 16  # rows of x: an answer's token, or the guesses for some
WIDTH = {
    "fp32": 8,
    "bf16": 8,
    "int8": 8,
    "nf4": 64,
}  # of which the `in` of a weight (out, in) is a multiple where ours serves; of 8 in every real model, of 64 in most


def native_for(x: "Tensor") -> Any:
    """`native`, where x is in fp32 on a CPU that it is for and no gradient is recorded; None elsewhere."""
    import torch  # not above: who merges has no need of it

    return working() if x.dtype is torch.float32 and x.is_cpu and not torch.is_grad_enabled() else None


@functools.cache
def working() -> Any:
    """`native`; None where `library` has nothing that works."""
    if library.working() is None:
        return None
    from litlora.cpu import native

    return native


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes inside on the thread that calls it, where no other thread of Python's is alive: one that began to compute meanwhile
    would have one for good, for torch gives a new thread what was set last, whoever set it.

    For what is small, between an answer's steps: torch's other threads, once they were called, look for more to do for a while before they
    sleep, on the cores where our helpers read the weights of the next step.
    """
    import torch

    if threading.active_count() > 1:
        yield
        return
    threads = torch.get_num_threads()
    try:  # also around the first of them: Ctrl-C, which a chat outlives, comes at any moment
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
