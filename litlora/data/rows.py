"""Files to rows: JSON, JSON lines and plain text, read so that a mistake is named by file, line and column."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from litlora.errors import UserError, did_you_mean

KINDS = {".json": "json", ".jsonl": "lines", ".ndjson": "lines", ".txt": "text", ".md": "text"}
VALIDATION = ("val", "valid", "validation", "dev", "eval")
OTHER_FORMS = {  # what a file begins with that is no text -> what it is, what to do
    b"\x1f\x8b": ("gzip-compressed", "unpack it first: gunzip"),
    b"PK\x03\x04": ("a zip archive", "unpack it first"),
    b"PAR1": ("a parquet file", "write it as JSON lines"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
}
WIDTH = 100  # characters of a line that are shown around a mistake
OnBad = Callable[[UserError], None]


@dataclass(frozen=True)
class Row:
    """One row as its file has it."""

    value: Any
    where: str  # "rows.jsonl:14:1"


def read_rows(path: str | Path, on_bad: OnBad | None = None) -> Iterator[Row]:
    """The rows of a file. A text file is one row, {"text": ...}.

    A line that is no JSON raises UserError; with `on_bad` the error is handed to it and the next line is read. In a
    JSON array nothing after a mistake can be told apart, so that one always raises.
    """
    path = Path(path)
    return rows_of_bytes(read_file(path), str(path), KINDS[path.suffix.lower()], on_bad)


def read_file(path: Path) -> bytes:
    """The bytes of a data file; UserError where it cannot be one."""
    if not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError("there is no such file", where=path, hint=near or "look at the path, from the directory you are in")
    if path.is_dir():
        raise UserError("a directory, not a file", where=path)
    if path.suffix.lower() not in KINDS:
        raise UserError(f"rows are read from {', '.join(KINDS)}, not from {path.suffix or 'a file without a suffix'}", where=path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from error


def rows_of_bytes(data: bytes, name: str, kind: str, on_bad: OnBad | None = None, documents: str = "file") -> Iterator[Row]:
    """`read_rows` of bytes at hand; `kind` is json, lines or text. `documents`: what is one row of a text: file, blank (between blank
    lines) or line."""
    for magic, (form, remedy) in OTHER_FORMS.items():
        if data.startswith(magic):
            raise UserError(f"{form}, not text", where=f"{name}:1:1", hint=remedy)
    data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark says nothing in UTF-8
    if not data.strip():
        raise UserError("the file is empty", where=name, hint="it needs at least one row")
    if kind == "text":
        return _text_rows(data, name, documents)
    if kind == "json":
        begin = data.lstrip()[:1]
        if begin == b"[":
            return _array(_decode(data, name, 1), name)
        if begin == b"{" and (whole := _whole_object(data)) is not None:
            return iter([Row(whole, f"{name}:1:1")])
    return _lines(data, name, on_bad)


def data_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The training and the validation files that a file or a directory stands for."""
    if not path.is_dir():
        return [path], []
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in KINDS and p.is_file())
    validation = [p for p in files if p.stem.lower() in VALIDATION]
    others = [p for p in files if p not in validation and p.stem.lower() != "test"]
    train = [p for p in files if p.stem.lower() in ("train", "training")] or others
    if not train:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        hint = f"put a train.jsonl there, or other files ({', '.join(KINDS)})"
        raise UserError(f"no rows in this directory (found: {found})", where=path, hint=hint)
    return train, validation


# ---- kinds of files --------------------------------------------------------------------------------------------------


def _lines(data: bytes, name: str, on_bad: OnBad | None) -> Iterator[Row]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = _decode(line.removesuffix(b"\r"), name, number)
            yield Row(_parse_line(text, name, number), f"{name}:{number}:1")
        except UserError as error:
            if on_bad is None:
                raise
            on_bad(error)


def _parse_line(text: str, name: str, number: int) -> Any:
    try:
        value, end = DECODER.raw_decode(text, _skip_space(text, 0))
    except (ValueError, RecursionError) as error:
        _explain(error, text, 0, name, number)
    if (end := _skip_space(text, end)) < len(text):
        _refuse("not valid JSON (more follows after the row)", text, end, name, number, "each line is one complete JSON object")
    return value


def _array(text: str, name: str) -> Iterator[Row]:
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
        line_start = text.rfind("\n", 0, position) + 1
        seen = position
        yield Row(value, f"{name}:{line}:{position - line_start + 1}")
        position = _skip_space(text, end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            _refuse("not valid JSON (expecting ',' or ']' after a row)", text, position, name, 1, "commas separate the rows of an array")
        position += 1
    if (rest := _skip_space(text, position + 1)) < len(text):
        _refuse("not valid JSON (more follows after the array)", text, rest, name, 1, "one array holds all rows; or write one row a line")


def _whole_object(data: bytes) -> Any:
    """The value, if the whole of a .json file is one object; None if not (then it may be lines)."""
    try:
        return DECODER.decode(data.decode("utf-8").strip())
    except (ValueError, RecursionError):
        return None


def _text_rows(data: bytes, name: str, documents: str) -> Iterator[Row]:
    text = _decode(data, name, 1)
    if "\x00" in text:
        _refuse("a NUL byte, so this is no text", text, text.index("\x00"), name, 1, "")
    text = text.replace("\r\n", "\n")
    if documents == "file":
        yield Row({"text": text}, f"{name}:1:1")
        return
    lines: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            lines.append(line)
        if lines and (documents == "line" or not line.strip()):
            first = number if line.strip() else number - len(lines)
            yield Row({"text": "\n".join(lines)}, f"{name}:{first}:1")
            lines = []


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
        _refuse(f"not valid JSON ({said})", text, at, name, number, hint)
    if isinstance(error, _Duplicate):
        _refuse(f"the key {error} stands twice in one object", text, _find_duplicate(text, start), name, number, "keep one of them")
    if isinstance(error, _Constant):
        at = next((m.start() for m in TOKENS.finditer(text, start) if m[0] == str(error)), start)
        _refuse(f"{error} is not JSON", text, at, name, number, "write null, or leave the field out")
    said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    _refuse(f"not valid JSON ({said})", text, start, name, number, hint)


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


def _decode(data: bytes, name: str, number: int) -> str:
    """UTF-8 text; `number` is the line with which `data` begins."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", errors="replace")
        at = len(data[: error.start].decode("utf-8"))
        _refuse(f"not UTF-8 (byte 0x{data[error.start]:02x})", text, at, name, number, "save the file as UTF-8")


def _refuse(what: str, text: str, at: int, name: str, number: int, hint: str) -> NoReturn:
    """Raise UserError at character `at` of `text`, which begins on line `number`, and show the place."""
    at = min(at, len(text))
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    line, column = text[start : end if end >= 0 else len(text)], at - start
    left = max(0, column - WIDTH * 2 // 3)
    shown = "".join(c if c.isprintable() else " " for c in line[left : left + WIDTH])
    where = f"{name}:{number + text.count(chr(10), 0, at)}:{column + 1}"
    raise UserError(what, where=where, context=[shown, " " * (column - left) + "^"], hint=hint)
