"""What the user sees on the way: header, warnings, one live line. All of it goes to standard error; results (a table) are printed.

On a terminal progress is one line that is redrawn; elsewhere, or with TERM=dumb, it is a `key=value` line now and then, and one at the end.
NO_COLOR (https://no-color.org) is honoured. Where it can no longer be written (its reader or the terminal is gone, the disk of a log is
full) nothing is said, and the work goes on: what is said is not the work.
"""

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

from litlora.errors import WorkError, printable, told

MB = 10**6
NAME_WIDTH = 10  # of a header's names, so that the lines of several come to stand below each other
WIDE = 120  # columns from which on a progress line has a bar
BETWEEN_LINES = 10.0  # seconds, where each state of a long job is a line of its own
STYLED = re.compile(r"(\x1b\[[\d;]*m)")  # colours and weights: ours
STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def is_terminal() -> bool:
    """Whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


def style(text: str, name: str) -> str:
    """`text` in a style for standard error, plain where colours are not wanted."""
    if os.environ.get("NO_COLOR") or not is_terminal():
        return text
    return f"\x1b[{STYLES[name]}m{text}\x1b[0m"


def harmless(text: str) -> str:
    """Lines for a terminal, in which nothing is a command but our own styles, whatever names of somebody else's are in them."""
    return "".join(part if STYLED.fullmatch(part) else printable(part, keep="\n\t") for part in STYLED.split(text))


def say(text: str = "") -> None:
    """On standard error: what is not the result."""
    with contextlib.suppress(OSError):
        print(harmless(text), file=sys.stderr, flush=True)


def put(text: object = "", end: str = "\n") -> None:
    """A result, on standard output, as it is. WorkError where it cannot be written, but for a reader that went away."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise WorkError(f"cannot be written: {error.strerror}", where="standard output", hint="see where it goes") from error


def put_words(text: str, end: str = "\n") -> None:
    """A model's words, on standard output: as they are; on a terminal without the control characters by which they could take it over."""
    put(tame(text) if sys.stdout.isatty() else text, end)


def tame(text: str) -> str:
    """Marks that join letters or turn their direction stay: unlike a name, a text may need them."""
    return "".join(letter if letter in "\n\t" or letter.isprintable() or not 0 <= ord(letter) < 0xA0 else "\ufffd" for letter in text)


def drop_output() -> None:
    """What waits to be written goes nowhere: at the end of the process it would fail once more."""
    with contextlib.suppress(OSError):  # where standard output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(text: str) -> None:
    """A result for people to read, on standard output."""
    put(harmless(text))


def put_json(value: Any, indent: int | None = None) -> None:
    """A result for programs, on standard output: letters as they are, and whatever could command a terminal, or mislead who reads it,
    as JSON writes it (`\\u009b`); so too what is no text, as a path's bytes may be."""
    import json

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if not text.isascii() or "\x7f" in text:
        text = "".join(c if c == "\n" or printable(c) == c else json.dumps(c)[1:-1] for c in text)
    put(text)


def warn(text: str, hint: str = "") -> None:
    say(f"{style('warning:', 'yellow')} {told(text)}")
    if hint:
        say(f"hint: {told(hint)}")


def header(rows: Sequence[tuple[str, str]]) -> None:
    """Aligned lines of name and value: what is about to happen, in a few lines."""
    width = max(NAME_WIDTH, *(len(name) + 2 for name, _ in rows))
    for name, value in rows:
        say(f"{style(f'{name:<{width}}', 'dim')}{printable(value)}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = (), bold: Collection[int] = ()) -> None:
    """A result, on standard output: rich's table on a terminal, aligned text elsewhere and with NO_COLOR.

    `right`: columns of numbers; `bold`: rows that stand out.
    """
    rows = [[printable(word) for word in row] for row in rows]
    if sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb" and not os.environ.get("NO_COLOR"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for number, word in enumerate(head):
            table.add_column(word, justify="right" if number in right else "left", no_wrap=number < len(head) - 1)
        for number, row in enumerate(rows):
            table.add_row(*map(Text, row), style="bold" if number in bold else None)
        shown = io.StringIO()  # where rich itself cannot write, it ends the process
        Console(file=shown, force_terminal=True, highlight=False).print(table)
        put(shown.getvalue(), end="")
        return
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        padded = (f"{word:>{width}}" if n in right else f"{word:<{width}}" for n, (word, width) in enumerate(zip(row, widths, strict=True)))
        put("  ".join(padded).rstrip())


def amount(size: int) -> str:
    """Bytes as people read them: 812 bytes, 3.1 kB, 12.6 MB, 16.1 GB."""
    for unit, word in ((10**9, "GB"), (MB, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {word}"
    return counted(size, "byte")


def counted(number: float, one: str, many: str = "") -> str:
    """`1 row`, `1,600 rows`, `0.5 epochs`; `many` where it is not `one` with an s."""
    shown = f"{int(number):,}" if float(number).is_integer() else f"{number:g}"
    return f"{shown} {one if number == 1 else many or f'{one}s'}"


class Progress:
    """How far a long job is: one live line (rich) on a terminal, with a bar where that is WIDE, else a `key=value` line now and then."""

    def __init__(self, total: int, unit: str, *, start: int = 0, quiet: bool = False) -> None:
        self.total, self.unit, self.quiet = total, unit, quiet
        self.shown = time.monotonic()
        self.bar: Any = None
        self.unsaid = ""  # the last state, where there was no line of it
        if is_terminal() and not quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True, highlight=False)
            wide = console.width >= WIDE
            beside = 41 if wide else 9  # columns: the bar and two times, or one time
            self.room = console.width - len(f"{unit} {total}/{total} ") - beside
            columns = (
                TextColumn(unit),
                MofNCompleteColumn(),
                *((BarColumn(20),) if wide else ()),
                TextColumn("{task.fields[shown]}"),
                *((TimeElapsedColumn(),) if wide else ()),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=console)
            self.task = self.bar.add_task(unit, total=total, completed=start, shown="")
            self.bar.start()

    def update(self, done: int, **fields: str) -> None:
        """Show that `done` of `total` are done, and the fields beside it (loss, tokens/s ...)."""
        if self.bar is not None:
            shown = [f"{name} {value}" for name, value in fields.items()]
            while len("  ".join(shown)) > self.room and len(shown) > 1:
                shown.pop()  # the step and the loss are never cut short for what stands behind them
            with contextlib.suppress(OSError):
                self.bar.update(self.task, completed=done, shown="  ".join(shown))
        elif not self.quiet:
            state = [f"{self.unit}={done}/{self.total}", *(f"{name}={value.replace(' ', '')}" for name, value in fields.items())]
            self.unsaid = " ".join(state)
            if done >= self.total or time.monotonic() - self.shown >= BETWEEN_LINES:
                self.say_state()

    def say_state(self) -> None:
        """The line of the last state, if it is not there yet."""
        if self.unsaid:
            say(self.unsaid)
        self.unsaid, self.shown = "", time.monotonic()

    def line(self, text: str) -> None:
        """A lasting line above the live one."""
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.console.print(harmless(text), markup=False, highlight=False)
        elif not self.quiet:
            say(text)

    def close(self) -> None:
        """Leave the live line where it is and go on below it; elsewhere the last state is said."""
        self.say_state()
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.stop()
            self.bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """0.4 s, 35 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """A count as people read it: 812, 3.1k, 2.2M, 8.0B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
