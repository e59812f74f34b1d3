"""Batches computed side by side on the cores of a CPU, each lane by a thread with its own share of the cores.

Two products at once, each on one core, are done sooner than one after the other on both; and what does not use several cores, as
Python and small operations, is then done twice at once too.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from litlora.data.batches import Batch

MOST = 4  # lanes: what Python itself does is done for one of them at a time
FEW = 0.1  # of a model's parameters: so many may learn, for each lane has a gradient of its own
Found = TypeVar("Found")


def lanes_of(device: torch.device) -> int:
    """How many lanes there may be."""
    return min(MOST, torch.get_num_threads()) if device.type == "cpu" else 1


def learns_in_lanes(model: nn.Module) -> bool:
    """Whether lanes can learn: not with random numbers, which are drawn in turn, nor where gradients of their own would be large."""
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    few = learning <= FEW * sum(parameter.numel() for parameter in model.parameters())
    return few and not (model.training and any(getattr(module, "dropout", 0) for module in model.modules()))


def side_by_side(lanes: Sequence[Sequence[Batch]], compute: Callable[[Sequence[Batch]], Found]) -> list[Found]:
    """What `compute` finds of each lane's batches, in their order."""
    if len(lanes) == 1:
        return [compute(lanes[0])]
    threads = torch.get_num_threads()

    def alone(batches: Sequence[Batch]) -> Found:
        torch.set_num_threads(max(1, threads // len(lanes)))  # of this thread
        return compute(batches)

    try:
        with ThreadPoolExecutor(len(lanes)) as pool:
            return list(pool.map(alone, lanes))
    finally:
        torch.set_num_threads(threads)


def backward(model: nn.Module, lanes: Sequence[Sequence[Batch]], device: torch.device, scale: float) -> Tensor:
    """The loss summed over all batches (scalar, fp64); its gradient times `scale` is left in `.grad`.

    Gradients are summed in the order of the lanes: the same bits, whichever was done first.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def compute(batches: Sequence[Batch]) -> tuple[Tensor, list[Tensor | None]]:
        total = torch.zeros((), dtype=torch.float64, device=device)
        sums: list[Tensor | None] = [None] * len(learning)
        for batch in batches:
            loss = batch.loss(model, device)
            found = torch.autograd.grad(loss * scale, learning, allow_unused=True)
            sums = [added(before, more) for before, more in zip(sums, found, strict=True)]
            total += loss.detach()
        return total, sums

    found = side_by_side(lanes, compute)
    for _, gradients in found:
        for parameter, gradient in zip(learning, gradients, strict=True):
            parameter.grad = added(parameter.grad, gradient)
    return torch.stack([total for total, _ in found]).sum()


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Their sum, in the place of the first; of nothing and something that."""
    return other if one is None else one if other is None else one.add_(other)
