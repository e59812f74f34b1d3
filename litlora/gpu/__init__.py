"""What a GPU computes in another way than a CPU, because it does many small things slowly. Nothing here knows a model.

    packed.py           attention within each sample of a packed row, all of them at once
    triton_kernels.py   RMS norm, SwiGLU, rotary positions and weights in few bits, each in one pass; attention of one query

`kernels.py`, `quantized.py` and `model.py` ask here, each thing at one place, and have what is computed everywhere else beside it.
It has not run on a GPU yet.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

SERVED = (torch.float16, torch.bfloat16, torch.float32)


def triton_for(x: Tensor) -> Any:
    """`triton_kernels`, where they serve x; None elsewhere: on a CPU or an older GPU, in fp64, without Triton or what it needs, and on one
    that is not the current GPU, on which Triton would start them."""
    served = x.is_cuda and x.dtype in SERVED and x.device.index == torch.cuda.current_device()
    return working(x.device) if served else None


def from_ampere(device: torch.device) -> bool:
    """Whether it is a GPU of NVIDIA's of compute capability 8.0 or more, which all kernels here are for."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def working(device: torch.device) -> Any:
    """`triton_kernels` for a device, tried once; None for one that they are not for."""
    return tried(device) if from_ampere(device) else None


def tried(device: torch.device) -> Any:
    """`triton_kernels`; None, and a warning, where one of them fails."""
    try:
        from litlora.gpu import triton_kernels

        triton_kernels.gated(torch.ones(1, 16, device=device), torch.ones(1, 16, device=device))  # compiles, with the machine's C compiler
    except Exception as error:  # a compiler's, a linker's, a driver's; Triton's own have no class of Python's in common
        warnings.warn(f"Triton does not work here ({error}): more and slower kernels are used", stacklevel=2)
        return None
    return triton_kernels
