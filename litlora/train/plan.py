"""Which samples each optimizer step sees: a pure function of the seed, so that a run can be taken up anywhere. No torch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from litlora.data.order import epoch_order


class Window(NamedTuple):
    """The samples of one optimizer step."""

    epoch: int
    number: int  # within the epoch
    indices: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far training is. With the plan it says everything about what comes next."""

    step: int = 0  # updates taken
    epoch: int = 0
    window: int = 0  # the next window of the epoch
    tokens: int = 0  # computed so far
    graded: int = 0  # of these, in the loss
    best_val_loss: float | None = None  # None: none measured yet
    waited: int = 0  # validations since then

    def after(self, window: Window, *, tokens: int, graded: int) -> "Position":
        return replace(
            self, step=self.step + 1, epoch=window.epoch, window=window.number + 1, tokens=self.tokens + tokens, graded=self.graded + graded
        )

    def validated(self, val_loss: float) -> "Position":
        if self.best_val_loss is None or val_loss < self.best_val_loss:
            return replace(self, best_val_loss=val_loss, waited=0)
        return replace(self, waited=self.waited + 1)

    def is_enough(self, patience: int) -> bool:
        """Whether so many validations brought no lower loss (0: never) that training is over."""
        return 0 < patience <= self.waited


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The run's steps: epochs of windows of `global_batch_size` samples, the last of an epoch smaller."""

    weights: Sequence[float]  # passes per epoch, one per sample
    global_batch_size: int
    epochs: float
    max_steps: int | None
    seed: int

    @property
    def steps(self) -> int:
        """Updates in all. A part of an epoch counts its share of windows, rounded up."""
        if self.max_steps is not None:
            return self.max_steps
        whole, part = divmod(self.epochs, 1)
        steps = sum(self.windows_in(epoch) for epoch in range(int(whole)))
        return steps + math.ceil(round(part * self.windows_in(int(whole)), 9))

    def windows_in(self, epoch: int) -> int:
        return math.ceil(len(epoch_order(self.weights, self.seed, epoch)) / self.global_batch_size)

    def windows(self, start: Position) -> Iterator[Window]:
        """Windows from `start` on, without end: `fit` stops at `steps`."""
        epoch, number = start.epoch, start.window
        while True:
            order = epoch_order(self.weights, self.seed, epoch)
            for first in range(number * self.global_batch_size, len(order), self.global_batch_size):
                yield Window(epoch, first // self.global_batch_size, order[first : first + self.global_batch_size])
            epoch, number = epoch + 1, 0
