"""Where it is computed, and in which dtype: of the frozen weights and of the arithmetic. Adapters are always kept in fp32 (or wider)."""

import torch

from litlora.errors import UserError

BY_NAME = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """What `--precision` means on this machine: fp32, bf16, or (auto) bf16 on a GPU that has it and fp32 elsewhere: torch emulates bf16 on
    older ones, more slowly than it computes fp32.

    On a CPU without units for bf16 a product in it takes about 7 times as long. One with them computes bf16 faster than fp32, and is left
    at fp32 too: what is trained and served there is the same as on any other.
    """
    if precision != "auto":
        return BY_NAME[precision]
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if on_gpu else torch.float32


def device_of(accelerator: str) -> torch.device:
    """What `--accelerator` means on this machine. UserError where this machine, or this torch, has no such device."""
    if accelerator == "auto":  # an Apple GPU is taken where it is asked for: nothing has run on one yet
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[accelerator]:
        hint = "--accelerator auto takes what is there"
        raise UserError(f"--accelerator {accelerator}: torch {torch.__version__} finds no such device here", hint=hint)
    return torch.device(accelerator)
