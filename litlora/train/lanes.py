"""Batches computed side by side on the cores of a CPU, each lane by a thread with its own share of the cores.

Two products at once, each on one core, are done sooner than one after the other on both; and what does not use several cores, as
Python and small operations, is then done twice at once too.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from litlora.data.batches import Batch
from litlora.data.lanes import TOGETHER
from litlora.methods.attach import numbers_in
from litlora.model import GPT

MOST = 4  # lanes: what Python itself does is done for one of them at a time
FEW = 0.1  # of a model's parameters: so many may learn, for each lane has a gradient of its own ...
LITTLE = 2**22  # ... or so many at all, for then that is no memory to speak of
Found = TypeVar("Found")


def lanes_of(device: torch.device, threads: int | None = None) -> int:
    """How many lanes there may be with so many threads (None: torch's): those with which most cores work, each lane having as many."""
    if device.type != "cpu":
        return 1
    threads = threads or torch.get_num_threads()

    def working(lanes: int) -> tuple[float, int]:
        each = threads // lanes
        return lanes * each * (TOGETHER if each > 1 else 1), lanes

    return max(range(1, min(MOST, threads) + 1), key=working)


def learns_in_lanes(model: GPT) -> bool:
    """Whether lanes can learn: not with random numbers, which are drawn in turn, nor where gradients of their own would be large."""
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return learning <= max(LITTLE, FEW * numbers_in(model)) and not model.drops


def side_by_side(lanes: Sequence[Sequence[Batch]], compute: Callable[[Iterable[Batch]], Found]) -> list[Found]:
    """What `compute` finds of each lane's batches, in their order. Where it fails in one, or is interrupted, all end after their batch."""
    if len(lanes) == 1:
        return [compute(lanes[0])]
    threads, stop = torch.get_num_threads(), threading.Event()

    def alone(batches: Sequence[Batch]) -> Found:
        torch.set_num_threads(max(1, threads // len(lanes)))  # of this thread
        try:
            return compute(batch for batch in batches if not stop.is_set())
        except BaseException:
            stop.set()
            raise

    try:
        with ThreadPoolExecutor(len(lanes)) as pool:
            try:
                return list(pool.map(alone, lanes))
            except BaseException:  # Ctrl-C among them: the pool waits for its threads
                stop.set()
                raise
    finally:
        torch.set_num_threads(threads)


def backward(model: GPT, lanes: Sequence[Sequence[Batch]], device: torch.device, scale: float) -> Tensor:
    """The loss summed over all batches (scalar, fp64); its gradient times `scale` is left in `.grad`.

    Gradients are summed in the order of the lanes: the same bits, whichever was done first.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def compute(batches: Iterable[Batch]) -> tuple[Tensor, list[Tensor | None]]:
        total = torch.zeros((), dtype=torch.float64, device=device)
        sums: list[Tensor | None] = [None] * len(learning)
        for batch in batches:
            loss = batch.loss(model, device)
            found = torch.autograd.grad(loss * scale, learning, allow_unused=True)
            sums = [added(before, more) for before, more in zip(sums, found, strict=True)]
            total += loss.detach()
        return total, sums

    totals, gradients = zip(*side_by_side(lanes, compute), strict=True)
    for parameter, of_lanes in zip(learning, zip(*gradients, strict=True), strict=True):
        gradient = functools.reduce(added, of_lanes)
        if gradient is not None:  # in the parameter's own layout, which optimizers count on, and nobody else's memory
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
    return torch.stack(totals).sum()


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Their sum; of nothing and something that. Not in place: autograd may give two parameters one gradient."""
    return other if one is None else one if other is None else one + other
