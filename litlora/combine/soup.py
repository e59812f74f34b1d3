"""The greedy soup (Wortsman et al. 2022, arXiv:2203.05482, recipe 1): an average of those that make it no worse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Attempt:
    """One candidate tried: which members the average then had, its loss, and whether the candidate stayed."""

    candidate: int
    members: tuple[int, ...]
    loss: float
    kept: bool


def greedy(losses: Sequence[float], measure: Callable[[tuple[int, ...]], float]) -> list[Attempt]:
    """From the best candidate on, in the order of their `losses`: each stays where the average with it has no higher loss.

    `measure` gives the loss of the average of some candidates, by their numbers, on the rows of `losses`. Of the attempts, the first is
    the best candidate alone; the last one kept is the soup, and its loss is the lowest of all candidates' or lower.
    """
    order = sorted(range(len(losses)), key=lambda number: (losses[number], number))
    attempts = [Attempt(order[0], (order[0],), losses[order[0]], True)]
    members, best = attempts[0].members, attempts[0].loss
    for candidate in order[1:]:
        tried = tuple(sorted((*members, candidate)))
        loss = measure(tried)
        kept = loss <= best
        attempts.append(Attempt(candidate, tried, loss, kept))
        if kept:
            members, best = tried, loss
    return attempts
