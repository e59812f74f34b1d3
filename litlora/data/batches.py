"""Samples to batches: which rank computes what, and how much at once. Both are questions of speed, never of the result."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from litlora.data.samples import IGNORE, Sample


@dataclass(frozen=True)
class Batch:
    """What is computed at once.

    tokens, targets   int64, (1, T) with `segments`, or (B, T) padded on the right; targets are IGNORE where not graded
    segments          the lengths of the samples in the stream, in order; None where rows are padded
    graded            how many targets are graded
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    segments: tuple[int, ...] | None
    graded: int


def share_of_rank(window: Sequence[Sample], rank: int, world: int) -> list[Sample]:
    """The samples of a window that one of `world` ranks computes: all ranks get about the same number of tokens.

    Longest first, each to the rank with least to do. Every sample is on one rank; a rank may have none.
    """
    loads = [0] * world
    mine = []
    for index in sorted(range(len(window)), key=lambda i: (-len(window[i].tokens), i)):
        least = loads.index(min(loads))
        loads[least] += len(window[index].tokens)
        if least == rank:
            mine.append(index)
    return [window[index] for index in sorted(mine)]


def pack(samples: Sequence[Sample], micro_batch_tokens: int, packing: bool = True) -> list[Batch]:
    """Batches of at most `micro_batch_tokens` tokens (a longer sample is a batch of its own; none is ever cut).

    packing   whole samples one after another in one stream, nothing padded; else rows padded to the longest of them
    """
    groups: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.tokens)):
        # A padded row costs as much as the longest of its batch, which came first.
        fits = (n for n, left in enumerate(room) if left >= (len(sample.tokens) if packing else len(groups[n][0].tokens)))
        at = next(fits, None)
        if at is None:
            groups.append([])
            room.append(micro_batch_tokens)
            at = len(groups) - 1
        groups[at].append(sample)
        room[at] -= len(sample.tokens) if packing else len(groups[at][0].tokens)
    return [_stream(group) if packing else _rows(group) for group in groups]


def _stream(samples: Sequence[Sample]) -> Batch:
    tokens = np.concatenate([sample.tokens for sample in samples]).astype(np.int64)
    targets = np.concatenate([sample.targets for sample in samples]).astype(np.int64)
    segments = tuple(len(sample.tokens) for sample in samples)
    return Batch(torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None], segments, int((targets != IGNORE).sum()))


def _rows(samples: Sequence[Sample]) -> Batch:
    longest = max(len(sample.tokens) for sample in samples)
    tokens = np.zeros((len(samples), longest), dtype=np.int64)  # any id will do: nothing is graded there, and nothing looks ahead
    targets = np.full((len(samples), longest), IGNORE, dtype=np.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)], targets[row, : len(sample.tokens)] = sample.tokens, sample.targets
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), None, int((targets != IGNORE).sum()))
