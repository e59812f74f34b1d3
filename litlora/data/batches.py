"""Samples to batches: which rank computes what, and how much at once. Both are questions of speed, never of the result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from litlora.data.samples import IGNORE, Sample


@dataclass(frozen=True)
class Batch:
    """What is computed at once.

    tokens, targets   int64, (1, T) with `segments`, or (B, T) padded on the right; targets are IGNORE where not graded
    segments          the lengths of the samples in the stream, in order, without their prefix; None where rows are padded
    prefix            how many tokens in front of them are the beginning of each
    graded            how many targets are graded, over whole samples
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    segments: tuple[int, ...] | None
    prefix: int
    graded: int

    def loss(self, model: Any, device: torch.device) -> torch.Tensor:
        """Of a GPT (or what Fabric made of it): summed over the graded tokens (scalar)."""
        loss: torch.Tensor = model(self.tokens.to(device), self.targets.to(device), segments=self.segments, prefix=self.prefix)
        return loss


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


def pack(samples: Sequence[Sample], micro_batch_tokens: int, packing: bool = True, share: bool = False) -> list[Batch]:
    """Batches of at most `micro_batch_tokens` tokens (a longer sample is a batch of its own; none is ever cut).

    packing   whole samples one after another in one stream, nothing padded; else rows padded to the longest of them
    share     what the samples of a stream begin with alike (a template's first words, a system prompt) stands in it once
    """
    if packing and share:
        return [_stream(group, common(group)) for group in groups_alike(samples, micro_batch_tokens)]
    groups = first_fit(samples, micro_batch_tokens, padded=not packing)
    return [_stream(group) if packing else _rows(group) for group in groups]


def first_fit(samples: Sequence[Sample], room: int, *, padded: bool = False, shared: int = 0) -> list[list[Sample]]:
    """Groups of at most `room` tokens, longest samples first.

    padded   a sample costs as much as the longest of its group, which came first
    shared   tokens that all samples begin with, which a group holds once
    """
    groups: list[list[Sample]] = []
    left: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.tokens)):
        fits = (n for n, free in enumerate(left) if free >= len(groups[n][0].tokens if padded else sample.tokens) - shared)
        at = next(fits, None)
        if at is None:
            groups.append([])
            left.append(room - shared)
            at = len(groups) - 1
        groups[at].append(sample)
        left[at] -= len(groups[at][0].tokens if padded else sample.tokens) - shared
    return groups


# ---- what samples share ----------------------------------------------------------------------------------------------

LEAST = 8  # tokens: fewer are not worth it
A_BATCH = 24  # tokens: what one more batch costs beside its own


def common(samples: Sequence[Sample]) -> int:
    """How many tokens a stream of `samples` holds once: what all begin with, where that is enough."""
    shared = alike(samples)
    return shared if len(samples) > 1 and shared >= LEAST else 0


def alike(samples: Sequence[Sample]) -> int:
    """How many tokens all of `samples` begin with, alike in what is to be predicted too. The last token of a sample is its own."""
    first, shared = samples[0], min(len(sample.tokens) for sample in samples) - 1
    for sample in samples[1:]:
        differs = (first.tokens[:shared] != sample.tokens[:shared]) | (first.targets[:shared] != sample.targets[:shared])
        shared = int(differs.argmax()) if differs.any() else shared
    return shared


def by_next(samples: Sequence[Sample], shared: int) -> list[list[int]]:
    """The numbers of samples that begin alike, apart by what comes after that."""
    found: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        found.setdefault((int(sample.tokens[shared]), int(sample.targets[shared])), []).append(index)
    return list(found.values())


def groups_alike(samples: Sequence[Sample], room: int) -> list[list[Sample]]:
    """Groups for streams, made so that few tokens are computed: samples that have more in common go together where that pays."""
    together, shared = first_fit(samples, room, shared=common(samples)), alike(samples)
    kinds = [[samples[index] for index in members] for members in by_next(samples, shared)]
    others: list[Sample] = []
    apart: list[list[Sample]] = []
    for kind in kinds:
        if 1 < len(kind) < len(samples) and (len(kind) - 1) * (common(kind) - shared) > A_BATCH:
            apart += groups_alike(kind, room)
        else:
            others += kind
    apart += first_fit(others, room, shared=common(others)) if others else []
    return min(together, apart, key=cost)


def cost(groups: Sequence[Sequence[Sample]]) -> int:
    """Tokens that are computed for these groups, as streams."""
    return sum(sum(len(sample.tokens) for sample in group) - (len(group) - 1) * common(group) + A_BATCH for group in groups)


def _stream(samples: Sequence[Sample], prefix: int = 0) -> Batch:
    starts = samples[:1] if prefix else []
    tokens = np.concatenate([*(s.tokens[:prefix] for s in starts), *(s.tokens[prefix:] for s in samples)]).astype(np.int64)
    targets = np.concatenate([*(s.targets[:prefix] for s in starts), *(s.targets[prefix:] for s in samples)]).astype(np.int64)
    segments = tuple(len(sample.tokens) - prefix for sample in samples)
    graded = sum(int((sample.targets != IGNORE).sum()) for sample in samples)
    return Batch(torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None], segments, prefix, graded)


def _rows(samples: Sequence[Sample]) -> Batch:
    longest = max(len(sample.tokens) for sample in samples)
    tokens = np.zeros((len(samples), longest), dtype=np.int64)  # any id will do: nothing is graded there, and nothing looks ahead
    targets = np.full((len(samples), longest), IGNORE, dtype=np.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)], targets[row, : len(sample.tokens)] = sample.tokens, sample.targets
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), None, 0, int((targets != IGNORE).sum()))
