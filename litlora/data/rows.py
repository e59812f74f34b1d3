"""Files to rows: JSON, JSON lines, CSV, Parquet and plain text, read so that a mistake is named by file, line and column.

Lines, and the rows of an array, are read one at a time, so a file may be larger than memory.
"""

import codecs
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal

from litlora.data.json_rows import array_rows, is_row, line_rows, one_object
from litlora.data.places import OnBad, Row, decode, refuse
from litlora.data.table_rows import csv_rows, parquet_rows
from litlora.errors import UserError, no_such_file

KINDS = {".json": "json", ".jsonl": "lines", ".ndjson": "lines", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
KINDS |= {".txt": "text", ".md": "text"}
VALIDATION = ("val", "valid", "validation", "dev", "eval")
ABOUT = {  # kind of file -> what a directory of rows has beside
    "text": ("readme", "license", "licence", "notice", "changelog", "citation"),
    "json": ("dataset_info", "dataset_infos"),
}
OTHER_FORMS = {  # what a file begins with that is no text -> what it is, what to do
    b"\x1f\x8b": ("gzip-compressed", "unpack it first: gunzip"),
    b"PK\x03\x04": ("a zip archive, or an Excel table", "unpack it first; save a table as CSV"),
    b"\xd0\xcf\x11\xe0": ("an Excel or Word file", "save the table as CSV"),
    b"BZh": ("bzip2-compressed", "unpack it first: bunzip2"),
    b"\xfd7zXZ": ("xz-compressed", "unpack it first: unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "unpack it first: unzstd"),
    b"version https://git-lfs": ("what Git LFS left in place of the file", "fetch the file itself: git lfs pull"),
    b"PAR1": ("a parquet file", "call it .parquet"),
    codecs.BOM_UTF32_LE: ("UTF-32 text", "save it as UTF-8"),
    codecs.BOM_UTF32_BE: ("UTF-32 text", "save it as UTF-8"),
}
OTHER_ENDS = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip"}  # what unpacks it
OTHER_ENDS |= dict.fromkeys((".xlsx", ".xls", ".ods"), "")
UTF_16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
BLOCK = 1 << 20  # bytes of UTF-16, or of an array, that are read at once
PIECE = 1 << 20  # characters of a long text that are read at once
Documents = Literal["file", "blank", "line"]


@dataclass(frozen=True)
class DataFile:
    """What rows are read from: a file, or bytes at hand."""

    name: str
    kind: str  # json, lines, csv, parquet or text
    data: bytes | None = None

    def open(self) -> BinaryIO:
        """From its beginning. UserError where it cannot be read."""
        try:
            return open(self.name, "rb") if self.data is None else io.BytesIO(self.data)
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})", where=self.name) from error

    def sha256(self) -> str:
        """Of its bytes, read once more."""
        state = hashlib.sha256()
        with self.open() as stream:
            while block := stream.read(1 << 20):
                state.update(block)
        return state.hexdigest()

    @property
    def size(self) -> int:
        """In bytes."""
        return Path(self.name).stat().st_size if self.data is None else len(self.data)


def read_rows(path: str | Path, on_bad: OnBad | None = None) -> Iterator[Row]:
    """The rows of a file. A text file is one document, {"text": ...}.

    A line that is no JSON raises UserError; with `on_bad` the error is handed to it and the next line is read. In a
    JSON array nothing after a mistake can be told apart, so that one always raises.
    """
    return rows_of(data_file(Path(path)), on_bad)


def data_file(path: Path) -> DataFile:
    """A file to read rows from; UserError where it cannot be one."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"is a link to nothing that is there ({os.readlink(path)})", where=path, hint="name the file itself")
    if not path.exists():
        raise no_such_file(path)
    if path.is_dir():
        raise UserError("a directory, not a file", where=path)
    end = path.suffix.lower()
    if end not in KINDS:
        hint = "" if end not in OTHER_ENDS else f"unpack it first: {OTHER_ENDS[end]}" if OTHER_ENDS[end] else "save the table as CSV"
        raise UserError(f"rows are read from {', '.join(KINDS)}, not from {end or 'a file without a suffix'}", where=path, hint=hint)
    if not path.is_file():
        raise UserError("is no regular file, and what is read is read twice", where=path, hint="write it into a file first")
    return DataFile(str(path), KINDS[end])


def data_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The training and the validation files that a path stands for: train.jsonl, val.jsonl, train-00000-of-00002.parquet ...

    What only speaks of the rows (README.md, LICENSE.txt, dataset_info.json) is none of them, unless it is named by itself.
    """
    if not path.is_dir():
        return [path], []
    kinds = {p: KINDS[p.suffix.lower()] for p in path.iterdir() if p.suffix.lower() in KINDS and not p.is_dir()}
    files = sorted(p for p, kind in kinds.items() if p.stem.lower() not in ABOUT.get(kind, ()))
    part = {p: p.stem.lower().partition("-")[0] for p in files}
    validation = [p for p in files if part[p] in VALIDATION]
    others = [p for p in files if p not in validation and part[p] != "test"]
    train = [p for p in files if part[p] in ("train", "training")] or others
    if not train:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        hint = f"put a train.jsonl there, or other files ({', '.join(KINDS)})"
        raise UserError(f"no rows in this directory (found: {found})", where=path, hint=hint)
    return train, validation


def rows_of(file: DataFile, on_bad: OnBad | None = None, documents: Documents = "file") -> Iterator[Row]:
    """`read_rows` of a DataFile. `documents`: what is one document of a text: the file, what stands between blank lines, or a line."""
    with file.open() as stream:
        if file.kind == "parquet":
            yield from parquet_rows(stream, file.name)
            return
        begin = stream.read(32)
        for magic, (form, remedy) in OTHER_FORMS.items():
            if begin.startswith(magic):
                raise UserError(f"{form}, not text", where=f"{file.name}:1:1", hint=remedy)
        bom = len(codecs.BOM_UTF8) if begin.startswith(codecs.BOM_UTF8) else 0
        if file.kind == "json" and begin[bom:].lstrip().startswith(b"["):
            stream.seek(bom)
            yield from array_rows(iter(lambda: stream.read(BLOCK), b""), file.name)
            return
        stream.seek(0)
        lines = _utf8_lines(stream, file.name)
        before = []  # blank lines, and the first that is not
        for line in lines:
            before.append(line)
            if line.strip():
                yield from _parsed(before[-1], chain(before, lines), file, on_bad, documents)
                return
        raise UserError("the file is empty", where=file.name, hint="it needs at least one row")


def _parsed(first: bytes, lines: Iterable[bytes], file: DataFile, on_bad: OnBad | None, documents: Documents) -> Iterator[Row]:
    """The rows of `lines`, the first of which that is not blank is `first`."""
    if file.kind == "text":
        return text_rows(lines, file.name, documents)
    if file.kind == "csv":
        return csv_rows(lines, file.name, on_bad)
    if file.kind == "json":
        if first.lstrip().startswith(b"["):
            return array_rows(lines, file.name)
        if first.lstrip().startswith(b"{") and not is_row(first):
            data = b"".join(lines)
            try:
                return iter([one_object(decode(data, file.name, 1), file.name)])
            except UserError:
                if first.strip() == b"{":  # an object over several lines; else rows, the first of which has a mistake
                    raise
            lines = io.BytesIO(data)
    return line_rows(lines, file.name, on_bad)


def _utf8_lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines of a text, its byte order mark taken off; UTF-16 is known by its own. Nothing but a line feed ends a line."""
    begin = stream.read(3)
    if (encoding := UTF_16.get(begin[:2])) is not None:
        stream.seek(2)
        yield from _from_utf16(stream, encoding, name)
    else:
        stream.seek(len(codecs.BOM_UTF8) if begin == codecs.BOM_UTF8 else 0)
        yield from stream


def _from_utf16(stream: BinaryIO, encoding: str, name: str) -> Iterator[bytes]:
    """The lines as UTF-8. UserError at the first bytes that are no text."""
    decoder, number = codecs.getincrementaldecoder(encoding)(), 1
    parts: list[str] = []  # of the line that is not at its end yet
    block = None
    while block != b"":
        block = stream.read(BLOCK)
        try:
            first, *others = decoder.decode(block, final=not block).split("\n")
        except UnicodeDecodeError as error:
            good = "".join([*parts, error.object[: error.start].decode(encoding)])
            refuse(f"not UTF-16 ({error.reason})", good, len(good), name, number, "save the file as UTF-8")
        parts.append(first)
        for other in others:
            yield "".join([*parts, "\n"]).encode()
            parts, number = [other], number + 1
    if any(parts):
        yield "".join(parts).encode()


def text_rows(lines: Iterable[bytes], name: str, documents: Documents) -> Iterator[Row]:
    """The documents of a text. A whole file is handed out in pieces that begin with a line; what stands between blank lines is not cut."""
    kept: list[str] = []
    first, size, begins = 1, 0, True
    for number, raw in enumerate(lines, 1):
        line = decode(raw, name, number)
        if "\x00" in line:
            refuse("a NUL byte, so this is no text", line, line.index("\x00"), name, number, "")
        line = line.replace("\r\n", "\n")
        if documents != "file" and not line.strip():
            if kept:
                yield Row({"text": "".join(kept).removesuffix("\n")}, f"{name}:{first}:1")
            kept = []
            continue
        if kept and (documents == "line" or (documents == "file" and size >= PIECE)):
            whole = documents == "line"
            yield Row({"text": "".join(kept).removesuffix("\n") if whole else "".join(kept)}, f"{name}:{first}:1", begins, whole)
            kept, begins = [], whole
        if not kept:
            first, size = number, 0
        kept.append(line)
        size += len(line)
    if kept:
        text = "".join(kept)
        yield Row({"text": text if documents == "file" else text.removesuffix("\n")}, f"{name}:{first}:1", begins)
