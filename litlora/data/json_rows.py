"""JSON to rows: an array of them, or one on each line. Strict: what two readers could take differently is refused at its place."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from litlora.data.places import WIDTH, OnBad, Row, decode, refuse
from litlora.errors import UserError


def line_rows(lines: Iterable[bytes], name: str, on_bad: OnBad | None) -> Iterator[Row]:
    """One row on each line. A line that is no JSON raises UserError, or is handed to `on_bad`."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = decode(line.rstrip(b"\r\n"), name, number)
            yield Row(_parse(text, name, number), f"{name}:{number}:1")
        except UserError as error:
            if on_bad is None:
                raise
            on_bad(error)


def _parse(text: str, name: str, number: int, hint: str = "each line is one complete JSON object") -> Any:
    try:
        value, end = DECODER.raw_decode(text, _skip_space(text, 0))
    except (ValueError, RecursionError) as error:
        _explain(error, text, 0, name, number)
    if (end := _skip_space(text, end)) < len(text):
        refuse("not valid JSON (more follows after the row)", text, end, name, number, hint)
    return value


def array_rows(blocks: Iterable[bytes], name: str) -> Iterator[Row]:
    """The rows of one array, of which about one block is held at a time, or one row. Behind a mistake nothing can be told apart, so that
    one always raises."""
    window = _Window(iter(blocks), name)
    window.next_letter()  # [
    window.at += 1
    if window.next_letter() == "]":
        raise UserError("the file holds an empty list", where=name, hint="it needs at least one row")
    while True:
        window.next_letter()
        value, end = window.value()
        yield Row(value, window.place())
        window.at = end
        letter = window.next_letter()
        if letter not in (",", "]"):
            window.refuse("not valid JSON (expecting ',' or ']' after a row)", "commas separate the rows of an array")
        window.at += 1
        if letter == "]":
            break
    if window.next_letter():
        window.refuse("not valid JSON (more follows after the array)", "one array holds all rows; or write one row a line")


class _Window:
    """The part of a text that is looked at.

    at             where in `text` the next thing stands
    line, column   where in the whole that of index `seen` is, from 1 and from 0 on
    """

    def __init__(self, blocks: Iterator[bytes], name: str) -> None:
        self.blocks, self.name = blocks, name
        self.text, self.at = "", 0
        self.line, self.column, self.seen = 1, 0, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def more(self) -> bool:
        """Read as much again as is held, at least a block, and let go of what is done with; whether anything came."""
        parts, size, wanted = [""], 0, len(self.text) - self.at
        while size <= wanted and (block := next(self.blocks, None)) is not None:
            parts.append(self.decode(block, parts))
            size += len(parts[-1])
        if size == 0:
            self.decode(b"", parts, final=True)
            return False
        self.place()
        done = max(0, self.at - WIDTH)  # a mistake is shown with what stands before it
        self.text, self.at, self.seen = self.text[done:] + "".join(parts), self.at - done, self.seen - done
        return True

    def decode(self, block: bytes, before: Sequence[str], final: bool = False) -> str:
        try:
            return self.decoder.decode(block, final)
        except UnicodeDecodeError as error:
            self.text += "".join(before) + error.object[: error.start].decode("utf-8")
            self.at = len(self.text)
            self.text += error.object[error.start :].decode("utf-8", errors="replace")
            self.refuse(f"not UTF-8 (byte 0x{error.object[error.start]:02x})", "save the file as UTF-8")

    def next_letter(self) -> str:
        """Go to the next character that is no space; "" at the end."""
        while True:
            self.at = _skip_space(self.text, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> tuple[Any, int]:
        """The value that begins here, and where it ends. What seems to be wrong with it may only not be there yet, but no more is read
        than can tell: behind a mistake there may be more than memory holds."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                after = _skip_space(self.text, end)
                if self.text[after : after + 1] in (",", "]") or self.reaches(after) or not self.more():
                    return value, end
            except (ValueError, RecursionError) as error:
                if self.is_sure(error) or not self.more():
                    line, column = self.start()
                    _explain(error, self.text, self.at, self.name, line, "look at the place above", column)

    def reaches(self, at: int) -> bool:
        """Whether so much follows a place that nothing in it is cut off, and all that is shown of it is there."""
        return at + WIDTH < len(self.text)

    def is_sure(self, error: Exception) -> bool:
        """Whether it is a mistake whatever follows: a string may still end, and digits may still become a fraction."""
        if str(error).startswith("Unterminated string") or DIGITS in str(error):
            return False
        return self.reaches(_mistake(error, self.text, self.at)[1])

    def place(self) -> str:
        """`rows.json:14:3` of what stands here."""
        if lines := self.text.count("\n", self.seen, self.at):
            self.line, self.column = self.line + lines, self.at - self.text.rfind("\n", self.seen, self.at) - 1
        else:
            self.column += self.at - self.seen
        self.seen = self.at
        return f"{self.name}:{self.line}:{self.column + 1}"

    def start(self) -> tuple[int, int]:
        """Line and column of what `text` begins with; of the column it is enough that it is right for the line of `seen`."""
        return self.line - self.text.count("\n", 0, self.seen), max(0, self.column - self.seen)

    def refuse(self, what: str, hint: str) -> NoReturn:
        line, column = self.start()
        refuse(what, self.text, self.at, self.name, line, hint, column)


def is_row(line: bytes) -> bool:
    """Whether a line is a whole JSON value: then its file has one on each line, whatever it is called."""
    try:
        DECODER.decode(line.decode("utf-8").strip())
    except (ValueError, RecursionError):
        return False
    return True


def one_object(text: str, name: str) -> Row:
    """The only row of a file."""
    return Row(_parse(text, name, 1, "one object is one row; rows stand in an array, or one on each line"), f"{name}:1:1")


# ---- what is wrong, and where ----------------------------------------------------------------------------------------


class _Duplicate(ValueError):
    pass


class _Constant(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Duplicate(next(key for n, key in enumerate(keys) if key in keys[:n]))
    return value


def _constant(word: str) -> NoReturn:
    raise _Constant(word)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|-?Infinity|NaN', re.DOTALL)
NUL = "\x00"
DIGITS = "integer string conversion"  # what Python says of too many
NUMBERS = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9]{4301,}', re.DOTALL)


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r") and position < len(text):
        position += 1
    return position


def _explain(error: Exception, text: str, start: int, name: str, number: int, hint: str = "", column: int = 0) -> NoReturn:
    """Raise the UserError that says what is wrong with the JSON from `start` on."""
    what, at, remedy = _mistake(error, text, start)
    hint = remedy or hint or ("each line is one complete JSON object" if number > 1 or "\n" not in text else "look at the place above")
    refuse(what, text, at, name, number, hint, column)


def _mistake(error: Exception, text: str, start: int) -> tuple[str, int, str]:
    """What is wrong with the JSON from `start` on, where, and what to do if that is known."""
    if isinstance(error, json.JSONDecodeError):
        said = error.msg[0].lower() + error.msg[1:]
        return f"not valid JSON ({'a NUL byte' if text[error.pos : error.pos + 1] == NUL else said})", error.pos, ""
    if isinstance(error, _Duplicate):
        return f"the key {error} stands twice in one object", _find_duplicate(text, start), "keep one of them"
    if isinstance(error, _Constant):
        at = next((m.start() for m in TOKENS.finditer(text, start) if m[0] == str(error)), start)
        return f"{error} is not JSON", at, "write null, or leave the field out"
    if DIGITS in str(error):
        at = next((m.start() for m in NUMBERS.finditer(text, start) if m[0][0] != '"'), start)
        return "a number of more than 4,300 digits", at, "write it as text"
    return f"not valid JSON ({'it is nested too deeply' if isinstance(error, RecursionError) else error})", start, ""


def _find_duplicate(text: str, start: int) -> int:
    """Where the first key stands that its object already has."""
    open_keys: list[set[str] | None] = []
    tokens = list(TOKENS.finditer(text, start))
    for n, token in enumerate(tokens):
        if token[0] in "{[":
            open_keys.append(set() if token[0] == "{" else None)
        elif token[0] in "}]":
            open_keys.pop()
        elif token[0].startswith('"') and n + 1 < len(tokens) and tokens[n + 1][0] == ":" and open_keys and open_keys[-1] is not None:
            key = json.loads(token[0])
            if key in open_keys[-1]:
                return token.start()
            open_keys[-1].add(key)
    return start
