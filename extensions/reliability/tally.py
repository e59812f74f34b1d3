"""What came of the trials of one fault: how many, how many losses of which kind, and the first of them in words."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

KINDS = {
    "lost": "a checkpoint that was said to be committed, or that was there before, is gone or cannot be used",
    "torn": "something incomplete lies under a final name, or is taken for whole",
    "undetected": "an altered file was not found, or not named",
    "differs": "what was resumed or made again is not, bit for bit, what an undisturbed run makes",
    "exit code": "another exit code than the documented one, no message, or no end",
    "left over": "temporary files remain after the next start",
}


@dataclass
class Tally:
    """Trials of one fault."""

    name: str  # "kill -9 while training"
    trials: int = 0
    seconds: float = 0.0
    losses: Counter[str] = field(default_factory=Counter)  # by kind
    notes: Counter[str] = field(default_factory=Counter)  # what happened in the trials: "inside a commit" 57
    examples: list[str] = field(default_factory=list)

    def loss(self, kind: str, words: str) -> None:
        assert kind in KINDS
        self.losses[kind] += 1
        self.examples.append(f"{kind}: {words[-2000:]}")

    @contextmanager
    def trial(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.trials += 1
        self.seconds += time.monotonic() - began

    def expect(self, kind: str, promise: bool, words: str) -> bool:
        """A loss of this kind unless the promise holds; whether it does."""
        if not promise:
            self.loss(kind, words)
        return promise

    def add(self, more: "Tally") -> None:
        """More trials of the same fault."""
        self.trials += more.trials
        self.seconds += more.seconds
        self.losses += more.losses
        self.notes += more.notes
        self.examples += more.examples

    def assert_none(self) -> None:
        """For the tests."""
        assert not self.losses, "\n".join([f"{self.name}: {dict(self.losses)} in {self.trials} trials", *self.examples[:5]])


def table(tallies: list[Tally]) -> str:
    """Markdown: one row per fault."""
    kinds = list(KINDS)
    lines = [f"| fault | trials | {' | '.join(kinds)} | seconds | of the trials |", f"|---|---:|{'---:|' * len(kinds)}---:|---|"]
    for one in tallies:
        notes = ", ".join(f"{count} {what}" for what, count in one.notes.items())
        lines.append(
            f"| {one.name} | {one.trials:,} | {' | '.join(str(one.losses[kind]) for kind in kinds)} | {one.seconds:,.0f} | {notes} |"
        )
    total = sum(one.trials for one in tallies)
    losses = [str(sum(one.losses[kind] for one in tallies)) for kind in kinds]
    lines.append(f"| **all** | **{total:,}** | {' | '.join(losses)} | {sum(one.seconds for one in tallies):,.0f} | |")
    return "\n".join(lines)
