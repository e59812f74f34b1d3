"""What a user is told when something cannot be done, and the exit code that goes with it.

    0 done    2 refused before work began    1 failed at work    130, 143 interrupted after a commit

`UserError` is for the user's input, `WorkError` for the machine's failures; an `assert` is for us.
"""

import contextlib
import difflib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

JOINERS = "\u200c\u200d"  # invisible, and part of words and of emoji


class Refusal(Exception):
    """The three parts of every message: what is wrong (and where), some context, one action."""

    def __init__(
        self,
        what: str,
        *,
        where: str | Path = "",  # "rows.jsonl:14:36", "out/step-200/litlora.json: base.path"
        context: Sequence[str] = (),  # up to three lines that show the place
        hint: str = "",  # one action that helps
    ) -> None:
        Exception.__init__(self, f"{where}: {what}" if where else what)
        self.what, self.where, self.context, self.hint = what, str(where), tuple(context[:3]), hint

    def report(self) -> str:
        """The text for standard error, at most five lines of it ours."""
        lines = [f"error: {told(str(self))}", *(f"  {printable(line)}" for line in self.context)]
        return "\n".join([*lines, f"hint: {told(self.hint)}"] if self.hint else lines)


class UserError(Refusal, ValueError):
    """Input that was refused before any work began. Exit code 2; nothing was written."""

    exit_code = 2


class WorkError(Refusal, RuntimeError):
    """Work that began and failed. Exit code 1; what was committed before is untouched."""

    exit_code = 1


@contextlib.contextmanager
def located(where: str | Path) -> Iterator[None]:
    """What is refused inside is refused of this file."""
    try:
        yield
    except UserError as error:
        place = f"{where}: {error.where}" if error.where else where
        raise UserError(error.what, where=place, context=error.context, hint=error.hint) from error


class Interrupted(Exception):
    """A signal was obeyed after a commit. Exit code 128 + the signal's number; `message` tells the user how to go on."""

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message or f"interrupted by signal {signal_number}")
        self.exit_code, self.message = 128 + signal_number, message


def printable(text: str, keep: str = "") -> str:
    """`text` with whatever could command a terminal, or mislead who reads it, written out (`\\x1b`, `\\u202e`), but for what is in `keep`.

    For names and texts that come from files of somebody else's.
    """
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter in keep or letter in JOINERS or unicodedata.category(letter) == "Zs"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def told(text: str) -> str:
    """A message of ours, whose further lines are indented, made `printable`: no name in it begins a line of its own."""
    return "\n  ".join(map(printable, text.split("\n  ")))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""


def no_such_file(path: Path) -> UserError:
    """What to say of a path to a file that is not there, with the name beside it that is closest."""
    near = ""
    with contextlib.suppress(OSError):  # no directory, or one that may not be read
        near = did_you_mean(path.name, [beside.name for beside in path.parent.iterdir()])
    return UserError("there is no such file", where=path, hint=near or "look at the path, from the directory you are in")
