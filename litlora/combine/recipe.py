"""How checkpoints are combined: the weights that each way gives them, and what it does to their updates.

average        w_i / sum w: uniform soups (Wortsman et al. 2022, arXiv:2203.05482, table 2) and stochastic weight averaging
interpolate    1 - t and t, of two
ema            of n steps in their order: theta <- d theta + (1 - d) theta_k, which is d^(n-1), (1 - d) d^(n-2), ..., (1 - d)
weighted_sum   w_i as they are: task arithmetic (Ilharco et al. 2022, arXiv:2212.04089)
greedy_soup    an average of some, chosen by their loss (soup.py)
ties           trim, elect, mean, times `scale` (Yadav et al. 2023, arXiv:2306.01708)
dare           drop and rescale, then the weighted sum, times `scale` (Yu et al. 2023, arXiv:2311.03099); dare_ties: then elect and mean
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from litlora.combine.arithmetic import Array, Pick, dropping, elected, trimming, weighted
from litlora.console import counted
from litlora.errors import UserError
from litlora.options import Combine

OWN = {"t": ("interpolate",), "decay": ("ema",), "density": ("ties", "dare", "dare_ties"), "scale": ("ties", "dare", "dare_ties")}
UNSET = {"t": 0.5, "decay": 0.9, "scale": 1.0}
DENSITY = {"ties": 0.2, "dare": 0.5, "dare_ties": 0.5}
MEANS = ("average", "greedy_soup", "ties", "dare_ties")  # in which a weight is a share, and so above 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done with the updates of the parents, in their order."""

    how: str
    weights: tuple[float, ...]
    values: dict[str, Any]  # the options that this way has: for the record
    density: float = 1.0
    scale: float = 1.0
    seed: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether the result is sum_i w_i tau_i."""
        return self.how not in DENSITY

    @property
    def is_mean(self) -> bool:
        """Whether it is that and the weights sum to 1, so that it is a mean of the parameters themselves: the base drops out."""
        return self.is_linear and math.isclose(sum(self.weights), 1.0, rel_tol=1e-12)

    def of(self, updates: Sequence[Array], present: Sequence[int], keys: Sequence[str]) -> Array:
        """The update that comes of those of the parents number `present`; `keys` make DARE's choice one of its own for each."""
        picks = self.picks([functools.partial(iter, (update,)) for update in updates], updates[0].size, keys)
        return self.sum([pick(update) for pick, update in zip(picks, updates, strict=True)], present)

    def picks(self, updates: Sequence[Callable[[], Iterator[Array]]], size: int, keys: Sequence[str]) -> list[Pick]:
        """What is taken of each update, which comes in blocks, before they are summed. Each may be read several times."""
        if self.how == "ties":
            return [trimming(update, size, self.density) for update in updates]
        if self.how in ("dare", "dare_ties"):
            return [dropping(self.density, f"{self.seed} {key}") for key in keys]
        return [lambda block: block for _ in updates]

    def sum(self, picked: Sequence[Array], present: Sequence[int]) -> Array:
        """What comes of a block of what was taken of each."""
        weights = [self.weights[number] for number in present]
        if self.is_linear:
            return weighted(picked, weights)
        return self.scale * (weighted if self.how == "dare" else elected)(picked, weights)


def recipe_of(options: Combine, given: Sequence[float], places: Sequence[str]) -> Recipe:
    """What the options mean for parents that were `given` these weights; `places` name them. UserError where they mean nothing."""
    how = options.how
    values: dict[str, Any] = {}
    for name, ways in OWN.items():
        value = getattr(options, name)
        if how in ways:
            values[name] = UNSET.get(name, DENSITY.get(how)) if value is None else value
        elif value is not None:
            raise UserError(f"is an option of {' and '.join(ways)}, and --how is {how}", where=f"--{name}", hint="leave it out")
    if how in ("dare", "dare_ties"):
        values["seed"] = options.seed
    if not places:
        raise UserError("nothing is given to combine", hint="litlora combine out/step-100 out/step-200 --how average")
    weights = weights_of(how, list(given), places, values)
    if not any(weights):
        raise UserError("every weight is 0, so nothing is left", hint="PATH:WEIGHT, as in out/step-200:0.5")
    return Recipe(
        how=how,
        weights=weights,
        values=values,
        density=values.get("density", 1.0),
        scale=values.get("scale", 1.0),
        seed=values.get("seed", 0),
    )


def weights_of(how: str, given: list[float], places: Sequence[str], values: dict[str, Any]) -> tuple[float, ...]:
    """The weight of each parent."""
    odd = next((place for place, weight in zip(places, given, strict=True) if weight != 1), "")
    if how in ("interpolate", "ema", "greedy_soup") and odd:
        raise UserError(f"{how} gives the weights itself", where=odd, hint="leave the weight out, or use --how weighted_sum")
    below = next((place for place, weight in zip(places, given, strict=True) if weight < 0 or (weight == 0 and how != "average")), "")
    if how in MEANS and below:
        raise UserError(f"in {how} a weight is a share, so it is above 0", where=below, hint="--how weighted_sum subtracts, too")
    if how == "interpolate":
        if len(places) != 2:
            raise UserError(
                f"interpolate lies between two checkpoints, and {counted(len(places), 'is', 'are')} given", where=", ".join(places[:4])
            )
        return 1 - values["t"], values["t"]
    if how == "ema":
        decay, last = values["decay"], len(places) - 1
        return tuple(decay**last if number == 0 else (1 - decay) * decay ** (last - number) for number in range(last + 1))
    if how in ("average", "greedy_soup"):
        total = sum(given)
        return tuple(weight / total for weight in given) if total else tuple(given)
    return tuple(given)
