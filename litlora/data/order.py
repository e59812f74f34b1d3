"""The order in which an epoch sees its samples: a function of the seed and the epoch, and of nothing else. No torch."""

import math
from collections.abc import Sequence

import numpy as np


def epoch_order(weights: Sequence[float], seed: int, epoch: int) -> list[int]:
    """Indices of the samples of one epoch, shuffled. `weights`: passes per epoch, one for each sample.

    Weight 1 is once, 2 twice; of the samples with weight 0.3 each epoch draws three in ten, others each time. The bits
    are PCG64's, whose stream NumPy keeps the same from version to version (which it does not promise of `shuffle`).
    """
    passes = np.asarray(weights, dtype=np.float64)
    whole = np.floor(passes).astype(np.int64)
    chosen = [np.repeat(np.arange(len(passes)), whole)]
    part = passes - whole
    for n, share in enumerate(np.unique(part[part > 0])):
        members = np.flatnonzero(part == share)
        count = math.floor(share * len(members) + 0.5)
        chosen.append(members[np.argsort(_bits(len(members), seed, epoch, n + 1), kind="stable")[:count]])
    indices = np.concatenate(chosen)
    return [int(i) for i in indices[np.argsort(_bits(len(indices), seed, epoch, 0), kind="stable")]]


def _bits(n: int, *seed: int) -> np.ndarray:
    """n random 64-bit numbers."""
    return np.random.PCG64(np.random.SeedSequence([abs(part) * 2 + (part < 0) for part in seed])).random_raw(n)
