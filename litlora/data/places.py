"""A row and its place in a file, and how a mistake in a file is shown: file, line, column, the line itself, a caret below it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from litlora.errors import UserError

WIDTH = 100  # characters of a line that are shown around a mistake
OnBad = Callable[[UserError], None]


@dataclass(frozen=True)
class Row:
    """One row as its file has it. A long text comes in several; a document begins with the first of them and ends with the last."""

    value: Any
    where: str  # "rows.jsonl:14:1"
    begins: bool = True
    ends: bool = True


def decode(data: bytes, name: str, number: int) -> str:
    """UTF-8 text; `number` is the line with which `data` begins. UserError at the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", errors="replace")
        at = len(data[: error.start].decode("utf-8"))
        refuse(f"not UTF-8 (byte 0x{data[error.start]:02x})", text, at, name, number, "save the file as UTF-8")


def refuse(what: str, text: str, at: int, name: str, number: int, hint: str, column: int = 0) -> NoReturn:
    """Raise UserError at character `at` of `text`, which begins on line `number` behind `column` characters, and show the place."""
    at = min(at, len(text))
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    line, here = text[start : end if end >= 0 else len(text)], at - start
    left = max(0, here - WIDTH * 2 // 3)
    shown = "".join(c if c.isprintable() else " " for c in line[left : left + WIDTH])
    where = f"{name}:{number + text.count(chr(10), 0, at)}:{here + 1 + (column if start == 0 else 0)}"
    raise UserError(what, where=where, context=[shown, " " * (here - left) + "^"], hint=hint)
