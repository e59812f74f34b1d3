"""Whether two models send tokens through the same experts, and what the second computes where it is told to.

Which experts a token goes through is no continuous function of the weights: where two score as good as alike, the rounding of a merge
decides, and what that token becomes is another thing altogether. So the choice is compared by itself, as what it is made of: the scores,
which are continuous, and the rule. The second model then takes the first one's experts, and what it computes is comparable again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from litlora.console import counted
from litlora.errors import WorkError
from litlora.model import GPT, Router

LEAST = 1e-30  # of a score, so that its logarithm is a number


class Routing:
    """What the routers of one model said, in the order in which tokens met them, beside those of another."""

    def __init__(self) -> None:
        self.said: list[tuple[Tensor, Tensor]] = []  # scores (n, E), experts (n, k)
        self.layers = 0  # with a router
        self.choices = self.ties = 0  # tokens at a router; of these, where the other would have chosen otherwise
        self.largest = self.difference = 0.0  # of the scores' logarithms

    @contextmanager
    def recorded(self, model: GPT) -> Iterator[None]:
        """Whatever `model` computes meanwhile is the first model's."""
        self.layers = len(routers_of(model))
        with asked(model, self.record):
            yield

    @contextmanager
    def followed(self, model: GPT) -> Iterator[None]:
        """`model` computes the same once more, with the experts that were recorded. WorkError where its rule chooses others by the
        very same scores, or it has another number of routers."""
        if (found := len(routers_of(model))) != self.layers:
            raise WorkError(f"{counted(found, 'layer')} with experts, where base and adapter make {self.layers}")
        said = iter(self.said)
        with asked(model, lambda router, rule, scores: self.follow(*next(said), router, rule, scores)):
            yield

    def record(self, router: Router, rule: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
        standing = rule(scores)
        self.said.append((scores, standing.topk(router.k).indices))
        return standing

    def follow(self, theirs: Tensor, experts: Tensor, router: Router, rule: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
        if theirs.shape != scores.shape or experts.size(1) != router.k:
            due = f"{experts.size(1)} of {theirs.size(1)}"
            raise WorkError(f"{router.k} of {scores.size(1)} experts for a token, where base and adapter make {due}")
        if not torch.equal(as_set(rule(theirs).topk(router.k).indices), as_set(experts)):
            raise WorkError("by the same scores it chooses other experts: its correction of the routing, or its groups, are others")
        logs = theirs.clamp(min=LEAST).log(), scores.clamp(min=LEAST).log()
        self.largest = max(self.largest, float(logs[0].abs().max()))
        self.difference = max(self.difference, float((logs[0] - logs[1]).abs().max()))
        own = rule(scores).topk(router.k).indices
        self.choices += len(own)
        self.ties += int((as_set(own) != as_set(experts)).any(-1).sum())
        places = torch.arange(router.k, 0, -1, dtype=scores.dtype, device=scores.device).expand(experts.shape)
        return torch.zeros_like(scores).scatter_(-1, experts, places)


def routers_of(model: GPT) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def as_set(experts: Tensor) -> Tensor:
    return experts.sort(-1).values


@contextmanager
def asked(model: GPT, answer: Callable[[Router, Callable[[Tensor], Tensor], Tensor], Tensor]) -> Iterator[None]:
    """`answer(router, its rule, scores)` in place of the rule by which each router lets experts stand."""
    for router in routers_of(model):
        router.standing = partial(answer, router, router.standing)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for router in routers_of(model):
            del router.standing
