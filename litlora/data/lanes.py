"""Samples that are computed side by side: which of them in which lane, so that all lanes are done at about the same time.

What a lane costs are its tokens; what samples of a lane begin with alike is computed once in it (data/batches.py).
"""

from collections.abc import Sequence

from litlora.data.batches import LEAST, Batch, alike, pack
from litlora.data.samples import Sample

TOGETHER = 0.75  # how fast n cores are at one thing, of n times one core (135M shape, two cores: 0.70 to 0.78)
SEARCHED = 64  # samples: among more of them greed is good enough, and a search takes long


def in_lanes(
    samples: Sequence[Sample], micro_batch_tokens: int, packing: bool = True, share: bool = False, lanes: int = 1
) -> list[list[Batch]]:
    """What each lane computes, one batch after another; all lanes together at most `micro_batch_tokens` at once (or one longer sample).

    One lane where they would not fit beside each other, or one would work while the others wait: all cores then work at one thing.
    """
    if lanes > 1:
        kinds = kinds_of(samples) if share and packing else [(list(range(len(samples))), 0)]
        spread = Spread([len(sample.tokens) for sample in samples], kinds, lanes)
        shares = [[samples[index] for index in sorted(lane)] for lane in spread.lanes if lane]
        longest = [max(len(sample.tokens) for sample in own) for own in shares]
        spare = micro_batch_tokens - sum(longest)
        if spare >= 0 and spread.largest * lanes * TOGETHER <= spread.alone:
            rooms = (own + spare // len(shares) for own in longest)
            return [pack(own, room, packing, share) for own, room in zip(shares, rooms, strict=True)]
    return [pack(samples, micro_batch_tokens, packing, share)]


def kinds_of(samples: Sequence[Sample]) -> list[tuple[list[int], int]]:
    """Samples by what they begin with: the numbers of those of a kind, and the tokens that all of these have in common."""
    shared = alike(samples)
    by_next: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        by_next.setdefault((int(sample.tokens[shared]), int(sample.targets[shared])), []).append(index)
    kinds, others = [], []
    for members in by_next.values():
        of_kind = alike([samples[index] for index in members]) if len(members) > 1 else 0
        if of_kind >= shared + LEAST:
            kinds.append((members, of_kind))
        else:
            others += members
    return [*kinds, (others, shared if shared >= LEAST else 0)]


class Spread:
    """Samples over lanes: the longest first, each to where it is done first; then exchanged as long as the last lane ends sooner."""

    def __init__(self, lengths: Sequence[int], kinds: Sequence[tuple[list[int], int]], lanes: int) -> None:
        self.lengths = lengths
        self.kind_of = {index: kind for kind, (members, _) in enumerate(kinds) for index in members}
        self.shared = [shared for _, shared in kinds]
        self.alone = self.load(list(range(len(lengths))))  # of all of them in one lane
        self.lanes: list[list[int]] = [[] for _ in range(lanes)]
        for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
            min(self.lanes, key=lambda lane: self.load([*lane, index])).append(index)
        while len(lengths) <= SEARCHED and self.improve():
            pass

    @property
    def largest(self) -> int:
        return max(map(self.load, self.lanes))

    def load(self, lane: Sequence[int]) -> int:
        """Tokens that are computed in a lane."""
        kinds = [self.kind_of[index] for index in lane]
        return sum(self.lengths[index] for index in lane) - sum((kinds.count(kind) - 1) * self.shared[kind] for kind in set(kinds))

    def improve(self) -> bool:
        """Give a sample of the lane with most to do to another, or exchange it for one there, where both then have less to do than that."""
        loads = list(map(self.load, self.lanes))
        most = max(range(len(loads)), key=loads.__getitem__)
        for other in (lane for lane in range(len(loads)) if lane != most):
            for given in self.lanes[most]:
                for taken in ([], *([index] for index in self.lanes[other])):
                    mine = [index for index in self.lanes[most] if index != given] + taken
                    theirs = [index for index in self.lanes[other] if index not in taken] + [given]
                    if max(self.load(mine), self.load(theirs)) < loads[most]:
                        self.lanes[most], self.lanes[other] = mine, theirs
                        return True
        return False
