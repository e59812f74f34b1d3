"""Tables to rows: CSV (RFC 4180, with a header) and Parquet. A row is an object whose keys are the columns."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from litlora.console import counted
from litlora.data.places import OnBad, Row, decode, refuse
from litlora.errors import UserError

DELIMITERS = ",;\t|"
AT_ONCE = 1024  # rows of a Parquet file that are in memory together
HEADER_HINT = "the first line names the columns"


def csv_rows(lines: Iterable[bytes], name: str, on_bad: OnBad | None) -> Iterator[Row]:
    """The rows of a CSV file. The delimiter is the one that the header has most of; a field in quotes may hold line breaks.

    A row with more or fewer fields than the header raises UserError or goes to `on_bad`; so does a quote out of place. A quote that is
    never closed takes the rest of the file with it, so that one always raises.
    """
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 KB, for all users of it
    text = _Lines(iter(lines), name)
    header_line = next(line for line in text if line.strip())
    delimiter = max(DELIMITERS, key=header_line.count)
    header = _header(header_line, delimiter, name, text.number)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        text.record.clear()
        begin = text.number + 1
        try:
            fields = next(reader, None)
            if fields is None:
                return
            if not "".join(text.record).strip():
                fields = []
            if fields and len(fields) != len(header):
                what = f"the row has {counted(len(fields), 'field')}, the header {len(header)}"
                at = _starts(text.record[0], delimiter)[len(header)] if len(text.record) == 1 and len(fields) > len(header) else 0
                refuse(what, "".join(text.record), at, name, begin, f"a field with {delimiter!r} in it stands in double quotes")
            if fields:
                yield Row(dict(zip(header, fields, strict=True)), f"{name}:{begin}:1")
        except csv.Error as error:
            _explain(error, "".join(text.record), delimiter, name, begin, on_bad)
        except UserError as refused:
            if on_bad is None:
                raise
            on_bad(refused)


@dataclass
class _Lines:
    """Lines of text, counted, for the csv module. Unlike a generator it goes on behind a line that it refused."""

    raw: Iterator[bytes]
    name: str
    number: int = 0  # of the line that was read last
    record: list[str] = field(default_factory=list)  # the lines since it was cleared

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.raw)
        self.number += 1
        text = decode(line, self.name, self.number)
        if "\x00" in text:
            refuse("a NUL byte, so this is no text", text, text.index("\x00"), self.name, self.number, "")
        self.record.append(text)
        return text


def parquet_rows(stream: BinaryIO, name: str) -> Iterator[Row]:
    """The rows of a Parquet file, a batch in memory at a time. A row's place is its number, from 1 on."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("Parquet is read by pyarrow, which is not installed", where=name, hint='pip install "litlora[parquet]"') from error
    number = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=AT_ONCE):
            for value in batch.to_pylist():
                number += 1
                yield Row(value, f"{name}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise UserError(f"not a Parquet file that can be read: {first_line}", where=name, hint="load it where it was made") from error
    if not number:
        raise UserError("the file is empty", where=name, hint="it needs at least one row")


# ---- a line of CSV ---------------------------------------------------------------------------------------------------


def _header(line: str, delimiter: str, name: str, number: int) -> list[str]:
    try:
        header = [title.strip() for title in next(csv.reader([line], delimiter=delimiter, strict=True))]
    except csv.Error:
        refuse("the header has a quote that is not closed", line, line.find('"'), name, number, HEADER_HINT)
    starts = _starts(line, delimiter)
    for column, title in enumerate(header):
        if not title:
            refuse(f"column {column + 1} has no name", line, starts[column], name, number, HEADER_HINT)
        if title in header[:column]:
            refuse(f"the column {title} stands twice", line, starts[column], name, number, "give each column its own name")
    return header


def _starts(line: str, delimiter: str) -> list[int]:
    """Where each field of a line begins."""
    starts, quoted = [0], False
    for at, letter in enumerate(line):
        if letter == '"':
            quoted = not quoted
        elif letter == delimiter and not quoted:
            starts.append(at + 1)
    return starts


def _explain(error: csv.Error, record: str, delimiter: str, name: str, begin: int, on_bad: OnBad | None) -> None:
    """Raise UserError for a quote that is not closed; for what spoils one row alone, raise it or hand it to `on_bad`."""
    unclosed = "unexpected end" in str(error)
    quotes = [at for at in _starts(record, delimiter) if record[at : at + 1] == '"']
    at = quotes[-1] if quotes else 0
    hint = 'a double quote inside quotes is written twice: ""'
    try:
        if unclosed:
            refuse("a quote is never closed", record, at, name, begin, hint)
        if "new-line" in str(error):
            refuse("a carriage return alone, which ends no line here", record, record.find("\r"), name, begin, "end lines with a line feed")
        at = next((n for n in range(at + 1, len(record)) if record[n] == '"' and _ends_wrongly(record, at, n, delimiter)), at)
        refuse("more text follows a closing quote", record, at + 1, name, begin, hint)
    except UserError as refused:
        if on_bad is None or unclosed:
            raise
        on_bad(refused)


def _ends_wrongly(record: str, opening: int, at: int, delimiter: str) -> bool:
    """Whether the quote at `at` closes the one at `opening` and something other than the field's end follows."""
    return record.count('"', opening + 1, at) % 2 == 0 and record[at + 1 : at + 2] not in (delimiter, '"', "\n", "\r", "")
