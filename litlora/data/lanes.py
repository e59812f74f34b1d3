"""Samples that are computed side by side: which of them in which lane, so that all lanes are done at about the same time.

What a lane costs are its tokens; what samples of a lane begin with alike is computed once in it (data/batches.py).
"""

from collections.abc import Sequence

from litlora.data.batches import LEAST, Batch, alike, by_next, pack
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
        lengths = [len(sample.tokens) for sample in samples]
        kinds = kinds_of(samples) if share and packing else [(list(range(len(samples))), 0)]
        found, (alone,) = spread(lengths, kinds, lanes), spread(lengths, kinds, 1)
        spare = micro_batch_tokens - sum(max(lengths[index] for index in lane.members) for lane in found)
        if spare >= 0 and max(lane.load for lane in found) * lanes * TOGETHER <= alone.load:
            shares = [[samples[index] for index in sorted(lane.members)] for lane in found]
            rooms = [max(len(sample.tokens) for sample in own) + spare // len(shares) for own in shares]
            return [pack(own, room, packing, share) for own, room in zip(shares, rooms, strict=True)]
    return [pack(samples, micro_batch_tokens, packing, share)]


def kinds_of(samples: Sequence[Sample]) -> list[tuple[list[int], int]]:
    """Samples by what they begin with: the numbers of those of a kind, and the tokens that all of these have in common."""
    shared = alike(samples)
    kinds, others = [], []
    for members in by_next(samples, shared):
        of_kind = alike([samples[index] for index in members]) if len(members) > 1 else 0
        if of_kind >= shared + LEAST:
            kinds.append((members, of_kind))
        else:
            others += members
    return [*kinds, (others, shared if shared >= LEAST else 0)]


class Lane:
    """Samples by their numbers, and how many tokens are computed of them."""

    def __init__(self, lengths: Sequence[int], kinds: Sequence[tuple[list[int], int]]) -> None:
        self.lengths, self.members, self.load = lengths, list[int](), 0
        self.kind_of = {index: kind for kind, (members, _) in enumerate(kinds) for index in members}
        self.shared, self.held = [shared for _, shared in kinds], [0] * len(kinds)

    def put(self, index: int) -> None:
        self.load += self.cost(index)
        self.held[self.kind_of[index]] += 1
        self.members.append(index)

    def take(self, index: int) -> None:
        self.members.remove(index)
        self.held[self.kind_of[index]] -= 1
        self.load -= self.cost(index)

    def cost(self, index: int) -> int:
        """Tokens more with a sample that is not in it."""
        kind = self.kind_of[index]
        return self.lengths[index] - (self.shared[kind] if self.held[kind] else 0)


def spread(lengths: Sequence[int], kinds: Sequence[tuple[list[int], int]], number: int) -> list[Lane]:
    """Samples over lanes: the longest first, each to where it is done first; then exchanged as long as the last lane ends sooner."""
    lanes = [Lane(lengths, kinds) for _ in range(number)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        min(lanes, key=lambda lane: lane.load + lane.cost(index)).put(index)
    while len(lengths) <= SEARCHED and improve(lanes):
        pass
    return [lane for lane in lanes if lane.members]


def improve(lanes: Sequence[Lane]) -> bool:
    """Give a sample of the lane with most to do to another, or exchange it for one there, where both then have less to do than that."""
    most = max(lanes, key=lambda lane: lane.load)
    before = most.load
    for other in (lane for lane in lanes if lane is not most):
        for given in list(most.members):
            most.take(given)
            other.put(given)
            for taken in (None, *other.members[:-1]):
                if taken is not None:
                    other.take(taken)
                    most.put(taken)
                if max(most.load, other.load) < before:
                    return True
                if taken is not None:
                    most.take(taken)
                    other.put(taken)
            other.take(given)
            most.put(given)
    return False
