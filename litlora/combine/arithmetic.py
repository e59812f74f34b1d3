"""The formulae: what becomes of several updates of one weight. Numpy alone; each function is one step of a paper.

An update tau_i is what parent number i adds to the weights of their base: of LoRA s_i B_i A_i, of a tensor trained whole
theta_i - theta_0. Arrays of one call have one shape; sums are taken in fp64.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
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


def trimmed(update: Array, density: float) -> Array:
    """Its largest numbers, the share `density` of them, the others zero (TIES, arXiv:2306.01708, algorithm 1, step 1).

    Of each tensor by itself, as PEFT and mergekit do; the paper ranks the numbers of all tensors together.
    """
    kept = max(1, int(density * update.size))
    if kept == update.size:
        return update
    flat = update.reshape(-1)
    largest = np.argpartition(np.abs(flat), update.size - kept)[update.size - kept :]
    result = np.zeros_like(flat)
    result[largest] = flat[largest]
    return result.reshape(update.shape)


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


def dropped(update: Array, density: float, key: str) -> Array:
    """Each number dropped with probability 1 - density, the others divided by density, so that the expectation stays
    (DARE, Yu et al. 2023, arXiv:2311.03099, section 3: m ~ Bernoulli(p), (1 - m) tau / (1 - p), p = 1 - density).

    `key` is all that the choice depends on: not the order of parents or tensors, nor the machine.
    """
    if density == 1:
        return update
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    kept = np.random.Generator(np.random.Philox(key=seed)).random(update.shape, dtype=np.float32) < density
    return np.where(kept, update / np.float32(density), np.float32(0))
