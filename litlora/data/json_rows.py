"""JSON to rows: an array of them, or one on each line. Strict: what two readers could take differently is refused at its place."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from litlora.data.places import OnBad, Row, decode, refuse
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


def array_rows(text: str, name: str) -> Iterator[Row]:
    """The rows of one array. Behind a mistake nothing can be told apart, so that one always raises."""
    position = _skip_space(text, 0) + 1
    line, line_start, seen = 1, 0, 0
    first = True
    while True:
        position = _skip_space(text, position)
        if first and text[position : position + 1] == "]":
            raise UserError("the file is empty", where=name, hint="it needs at least one row")
        first = False
        try:
            value, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            _explain(error, text, position, name, 1)
        line += text.count("\n", seen, position)
        line_start = text.rfind("\n", seen, position) + 1 or line_start  # not from the beginning: an array may be one long line
        seen = position
        yield Row(value, f"{name}:{line}:{position - line_start + 1}")
        position = _skip_space(text, end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            refuse("not valid JSON (expecting ',' or ']' after a row)", text, position, name, 1, "commas separate the rows of an array")
        position += 1
    if (rest := _skip_space(text, position + 1)) < len(text):
        refuse("not valid JSON (more follows after the array)", text, rest, name, 1, "one array holds all rows; or write one row a line")


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

NUMBERS = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9]{4301,}', re.DOTALL)


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r") and position < len(text):
        position += 1
    return position


def _explain(error: Exception, text: str, start: int, name: str, number: int) -> NoReturn:
    """Raise the UserError that says what is wrong with the JSON from `start` on."""
    hint = "each line is one complete JSON object" if number > 1 or "\n" not in text else "look at the place above"
    if isinstance(error, json.JSONDecodeError):
        at, said = error.pos, error.msg[0].lower() + error.msg[1:]
        if at < len(text) and text[at] == "\x00":
            said = "a NUL byte"
        refuse(f"not valid JSON ({said})", text, at, name, number, hint)
    if isinstance(error, _Duplicate):
        refuse(f"the key {error} stands twice in one object", text, _find_duplicate(text, start), name, number, "keep one of them")
    if isinstance(error, _Constant):
        at = next((m.start() for m in TOKENS.finditer(text, start) if m[0] == str(error)), start)
        refuse(f"{error} is not JSON", text, at, name, number, "write null, or leave the field out")
    if "integer string conversion" in str(error):
        at = next((m.start() for m in NUMBERS.finditer(text, start) if m[0][0] != '"'), start)
        refuse("a number of more than 4,300 digits", text, at, name, number, "write it as text")
    said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    refuse(f"not valid JSON ({said})", text, start, name, number, hint)


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
