"""The formulae: what becomes of several updates of one weight. Numpy alone; each function is one step of a paper.

An update tau_i is what parent number i adds to the weights of their base: of LoRA s_i B_i A_i, of a tensor trained whole
theta_i - theta_0. Arrays of one call have one shape; sums are taken in fp64.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Pick = Callable[[Array], Array]  # of an update, whose blocks it is given in their order: what is taken of it
Factors = tuple[Array, Array]  # B (out, R) and A (R, in): an update B A


# ---- low rank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """What storing an update with a smaller rank cost. Squares of Frobenius norms, from the singular values."""

    exact: float  # ||B A||^2
    lost: float  # ||B A - what was stored||^2

    @property
    def error(self) -> float:
        """||stored - exact|| / ||exact||."""
        return float(np.sqrt(self.lost / self.exact)) if self.exact else 0.0

    @property
    def energy(self) -> float:
        """||stored||^2 / ||exact||^2: what was kept is orthogonal to what was not."""
        return 1 - self.lost / self.exact if self.exact else 1.0


def stacked(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...], exactly. The weight is multiplied in fp64 and rounded once."""
    b = [(w * left.astype(np.float64)).astype(np.float32) for w, (left, _) in zip(weights, factors, strict=True)]
    return np.concatenate(b, axis=1), np.concatenate([right for _, right in factors], axis=0)


def shortened(factors: Factors, rank: int) -> tuple[Factors, Cut]:
    """The best approximation of B A by `rank` (Eckart and Young 1936), and what it costs. B A itself is never formed:

    with B = Q R and A' = P S (QR of both), B A = Q (R S') P', and the singular values are those of the small R S'.
    """
    (q, r), (p, s) = (np.linalg.qr(side.astype(np.float64)) for side in (factors[0], factors[1].T))
    left, values, right = np.linalg.svd(r @ s.T, full_matrices=False)
    return halves(q @ left, values, right @ p.T, rank)


def factored(update: Array, rank: int) -> tuple[Factors, Cut]:
    """The same of an update (out, in) that has no factors yet."""
    return halves(*np.linalg.svd(update, full_matrices=False), rank)


def halves(left: Array, values: Array, right: Array, rank: int) -> tuple[Factors, Cut]:
    """The first `rank` components, the root of each singular value on either side, so that both can be trained on."""
    rank = min(rank, len(values))
    roots, squares = np.sqrt(values[:rank]), np.square(values, dtype=np.float64)
    b, a = left[:, :rank] * roots, roots[:, None] * right[:rank]
    return (b.astype(np.float32), a.astype(np.float32)), Cut(float(squares.sum()), float(squares[rank:].sum()))


# ---- sums ------------------------------------------------------------------------------------------------------------


def weighted(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    """sum_i w_i tau_i: task arithmetic (Ilharco et al. 2022, arXiv:2212.04089, section 2)."""
    total = np.zeros(updates[0].shape)
    for weight, update in zip(weights, updates, strict=True):
        total += weight * update.astype(np.float64)
    return total


# ---- TIES ------------------------------------------------------------------------------------------------------------


def trimming(passes: Callable[[], Iterator[Array]], size: int, density: float) -> Pick:
    """What keeps the largest numbers of an update, the share `density` of its `size`, and makes the others zero (TIES, arXiv:2306.01708,
    algorithm 1, step 1); of those that are equally large, the first.

    Of each tensor by itself, as PEFT and mergekit do; the paper ranks the numbers of all tensors together. The update comes in blocks,
    which `passes` begins anew: the size of the least number kept is found by counting, 16 of its 31 bits at a time, so that no tensor is
    ever in memory as a whole.
    """
    kept = max(1, int(density * size))
    if kept == size:
        return lambda block: block
    upper = np.zeros(1 << 15, np.int64)
    for block in passes():
        upper += np.bincount(magnitudes(block) >> 16, minlength=len(upper))
    first, larger = least_kept(upper, kept)
    lower = np.zeros(1 << 16, np.int64)
    for block in passes():
        found = magnitudes(block)
        lower += np.bincount(found[found >> 16 == first] & 0xFFFF, minlength=len(lower))
    second, between = least_kept(lower, kept - larger)
    least, ties = first << 16 | second, kept - larger - between

    def trim(block: Array) -> Array:
        nonlocal ties
        found = magnitudes(block)
        keeps = found > least
        equal = np.flatnonzero(found == least)[:ties]
        keeps[equal] = True
        ties -= len(equal)
        return np.where(keeps.reshape(block.shape), block, np.float32(0))

    return trim


def magnitudes(block: Array) -> npt.NDArray[np.uint32]:
    """The bits of |x| in fp32 (n,): as whole numbers they have the order of the numbers."""
    return np.ascontiguousarray(block, np.float32).reshape(-1).view(np.uint32) & np.uint32(0x7FFFFFFF)


def least_kept(counts: npt.NDArray[np.int64], kept: int) -> tuple[int, int]:
    """Of numbers counted by size, the size of the `kept`-th largest, and how many are larger than that size."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, kept))
    return len(counts) - 1 - place, int(from_above[place - 1]) if place else 0


def elected(updates: Sequence[Array], weights: Sequence[float]) -> Array:
    """Steps 2 and 3: the sign gamma = sgn(sum_i w_i tau_i) of each number, then the mean of those that have it,

        tau = sum w_i tau_i / sum w_i over the i with sgn(tau_i) = gamma.

    The paper has no weights; with equal ones this is its formula. (PEFT elects the sign without them and divides by the number
    of those that agree, so that with unequal weights it computes something else.) Where nobody has a number it is zero.
    """
    sign = np.where(weighted(updates, weights) >= 0, 1, -1)
    total, share = np.zeros(updates[0].shape), np.zeros(updates[0].shape)
    for weight, update in zip(weights, updates, strict=True):
        agrees = np.sign(update) == sign
        total += np.where(agrees, weight * update.astype(np.float64), 0)
        share += np.where(agrees, weight, 0)
    return np.divide(total, share, out=np.zeros_like(total), where=share != 0)


# ---- DARE ------------------------------------------------------------------------------------------------------------


def dropping(density: float, key: str) -> Pick:
    """What drops each number of an update with probability 1 - density and divides the others by density, so that the expectation stays
    (DARE, Yu et al. 2023, arXiv:2311.03099, section 3: m ~ Bernoulli(p), (1 - m) tau / (1 - p), p = 1 - density).

    `key` is all that the choice depends on: not the order of parents or tensors, nor the blocks that it comes in, nor the machine.
    """
    if density == 1:
        return lambda block: block
    drawn = np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")))
    return lambda block: np.where(drawn.random(block.shape, dtype=np.float32) < density, block / np.float32(density), np.float32(0))
