"""What a CPU computes in another way where few tokens come at a time, as in an answer: then reading the weights is all the work, and what
torch does around a product takes as long as the product. Nothing here knows a model.

    native.c      products with weights in 32, 16, 8 and 4 bits, each number read once; norm, SwiGLU, rotary positions, attention of a query
    native.py     the same as functions of tensors
    tape.py       what was computed once, to be computed again without Python

It is compiled where litlora is installed, if there is a C compiler, for x86-64, and serves where the CPU has AVX2 and FMA. Elsewhere, and
wherever a gradient is recorded, torch computes: `kernels.py`, `quantized.py` and `model.py` ask here, each thing at one place.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

EIGHT = 8  # numbers in a register
FEW = 16  # rows of x: an answer's token, or the guesses for some
WIDTH = {
    "fp32": 8,
    "bf16": 8,
    "int8": 8,
    "nf4": 64,
}  # of which the `in` of a weight (out, in) is a multiple where ours serves; of 8 in every real model, of 64 in most


def native_for(x: Tensor) -> Any:
    """`native`, where x is in fp32 on a CPU that it is for and no gradient is recorded; None elsewhere."""
    return working() if x.dtype is torch.float32 and x.is_cpu and not torch.is_grad_enabled() else None


@functools.cache
def working() -> Any:
    """`native`; None, and a warning, where what was compiled cannot be loaded; None where nothing was, or not for this CPU."""
    from litlora.cpu import native

    try:
        return native if native.is_usable() else None
    except OSError as error:
        warnings.warn(f"the kernels for this CPU cannot be loaded ({error}): answers come more slowly", stacklevel=2)
        return None
