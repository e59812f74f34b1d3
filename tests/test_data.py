"""litlora/data: rows read with their places, formats told apart, samples cut and counted, orders and batches that change no result."""

import bz2
import contextlib
import gzip
import json
import lzma
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import byte_level, real

from litlora.data import rows as rows_module
from litlora.data.batches import Batch, pack, share_of_rank
from litlora.data.formats import Pair, Text, Verdict, format_of, parse_mapping, read_row, to_messages
from litlora.data.json_rows import array_rows
from litlora.data.order import epoch_order
from litlora.data.rows import DataFile, Row, data_files, read_rows, rows_of
from litlora.data.samples import IGNORE, DataSet, Sample, load_data
from litlora.errors import UserError
from litlora.options import RowsOptions
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer

GOOD = '{"prompt": "q", "completion": "a"}'
CHATML = (
    "{% for m in messages %}{{ '<|im_end|>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return Prompts(Tokenizer(byte_level(tmp_path_factory.mktemp("t"))), CHATML)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(path: Path | str, prompts: Prompts, length: int = 512, *, on_error: Any = "stop", map: Sequence[str] = (), **more: Any) -> DataSet:
    return load_data([str(path)], prompts, rows=RowsOptions(on_error=on_error, map=list(map)), max_seq_length=length, **more)


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def pairs(n: int, repeat: int = 1) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(n) for _ in range(repeat)]


# ---- rows: what is wrong, and where ----------------------------------------------------------------------------------

BAD = [
    # content of line 2, column, reason
    ('{"prompt": "q" "completion": "a"}', 16, r"not valid JSON \(expecting ',' delimiter\)"),
    ('{"prompt": "q", "completion": "a"', 34, "not valid JSON"),
    ('{"prompt": "q", "completion": }', 31, r"not valid JSON \(expecting value\)"),
    (GOOD + GOOD, 35, "more follows after the row"),
    ("not json", 1, r"not valid JSON \(expecting value\)"),
    ('{"prompt": "\x00", "completion": "a"}', 13, r"not valid JSON \(a NUL byte\)"),
    (b'{"prompt": "\xc3\xa9\xff", "completion": "a"}', 14, r"not UTF-8 \(byte 0xff\)"),
    ('{"prompt": "NaN", "completion": NaN}', 33, "NaN is not JSON"),
    ('{"prompt": "q", "completion": -Infinity}', 31, "-Infinity is not JSON"),
    ('{"prompt": "q", "completion": "a", "prompt": "r"}', 36, "the key prompt stands twice"),
    ('{"a": {"prompt": 1}, "prompt": "q", "b": [{"k": 1, "k": 2}]}', 52, "the key k stands twice"),
    ("[" * 100_000, 1, "nested too deeply"),
    ("[1, 2]", 1, "a row is an object with named fields, this one is a list"),
    ('{"prompt": 5, "completion": "a"}', 1, "'prompt' is a number, not text"),
    ('{"prompt": "q", "completion": null}', 1, "'completion' is null, not text"),
    ('{"prompt": "q"}', 1, r"completion row without 'completion' \(or output, response, answer, solution\); it has the key prompt"),
    ('{"prompt": "q", "completion": "  "}', 1, "the answer is empty"),
    ('{"prompt": "", "completion": "a"}', 1, "the prompt is empty"),
    ('{"prompt": "q", "completion": "\\ud83d"}', 1, r"half a character \(\\ud83d alone\)"),
]


@pytest.mark.parametrize(("line", "column", "reason"), BAD)
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path: Path, prompts: Prompts, line: str | bytes, column: int, reason: str) -> None:
    """F14. Against: line numbers counted from 0; duplicate keys let through; on_error skip ignored."""
    raw = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "rows.jsonl", GOOD.encode() + b"\n" + raw + b"\n\n" + GOOD.encode())
    with pytest.raises(UserError, match=reason) as caught:
        load(path, prompts)
    assert caught.value.where == f"{path}:2:{column}"
    if caught.value.context:
        shown, caret = caught.value.context
        assert len(shown) <= 100
        assert len(caret) <= 101
    data = load(path, prompts, on_error="skip")
    assert (data.counts.rows, data.counts.skipped, len(data.train)) == (3, 1, 2)
    assert data.skipped[0].startswith(f"{path}:2:{column}: ")
    assert "1 rows skipped" in data.summary()


def test_the_place_in_a_line_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"instruction": "q13", "input": "" "output": "a"}\n')
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    shown, caret = caught.value.context
    assert shown[len(caret) - 1 :].startswith('"output"')
    report = caught.value.report().splitlines()
    assert report[0] == f"error: {path}:1:36: not valid JSON (expecting ',' delimiter)"
    assert len(report) <= 5


def test_the_place_in_a_very_long_line_is_shown(tmp_path: Path) -> None:
    """F14: a 50 MB line (here 5 MB) is read, and only a piece of it is shown."""
    path = write(tmp_path / "rows.jsonl", '{"text": "' + "word " * 1_000_000 + '" 5}\n')
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    shown, caret = caught.value.context
    assert shown[len(caret) - 1] == "5"
    assert len(shown) <= 100


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n\n", "\n  \t\n"])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
def test_blank_lines_byte_order_marks_and_crlf_change_nothing(tmp_path: Path, ending: str, begin: bytes) -> None:
    """F14."""
    path = write(tmp_path / "rows.jsonl", begin + ending.join([GOOD] * 3).encode())
    assert [row.value for row in read_rows(path)] == [json.loads(GOOD)] * 3
    lines = [int(row.where.split(":")[-2]) for row in read_rows(path)]
    assert lines == [1 + n * ending.count("\n") for n in range(3)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_read_where_it_says_so(tmp_path: Path, encoding: str) -> None:
    """Excel and Windows save it; the places are those of the text. Against: a cut character taken for an end."""
    text = "\ufeff" * (encoding != "utf-16") + GOOD + "\r\n\n" + '{"text": "日\u2028本 🤗"}\n'
    path = write(tmp_path / "rows.jsonl", text.encode(encoding))
    assert [(row.value, row.where) for row in read_rows(path)] == [
        (json.loads(GOOD), f"{path}:1:1"),
        ({"text": "日\u2028本 🤗"}, f"{path}:3:1"),
    ]
    write(path, text.encode(encoding)[:-1])
    with pytest.raises(UserError, match="not UTF-16") as caught:
        list(read_rows(path))
    assert caught.value.where == f"{path}:3:18"


def test_utf_16_is_read_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that end within a character, and within half of one, change no line and no place."""
    rows = [{"prompt": "🙂é中" * 9, "completion": "🙂"}, {"prompt": "x", "completion": "y"}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for size in (1, 3, 7, 50):
        monkeypatch.setattr(rows_module, "BLOCK", size)
        for encoding in ("utf-16-le", "utf-16-be"):
            path = tmp_path / "rows.jsonl"
            path.write_bytes(f"\ufeff{text}".encode(encoding))
            assert [(row.value, row.where) for row in read_rows(path)] == list(zip(rows, (f"{path}:1:1", f"{path}:3:1"), strict=True))
            path.write_bytes(f"\ufeff{text}".encode(encoding) + "\ud83d".encode(encoding, "surrogatepass"))
            with pytest.raises(UserError, match="not UTF-16") as caught:
                list(read_rows(path))
            assert caught.value.where == f"{path}:3:{len(json.dumps(rows[1])) + 1}"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, separator: str) -> None:
    """F14: str.splitlines would cut rows in two at U+2028, which JSON allows inside strings. Against: splitlines in the reader."""
    rows = [{"text": f"a{separator}b"}, {"text": "c"}]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    if separator < " ":  # JSON wants those escaped
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    assert [row.value for row in read_rows(path)] == rows
    assert [row.where for row in read_rows(path)] == [f"{path}:1:1", f"{path}:2:1"]
    table = write(tmp_path / "rows.csv", f"text\na{separator}b\nc\n")
    assert [row.value for row in read_rows(table)] == rows


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_csv_rows_are_objects_with_places(tmp_path: Path, delimiter: str, ending: str) -> None:
    """Quotes, delimiters and line breaks inside a field; a place is where the row begins."""
    lines = ["instruction,output", 'q,"a ""b"", c\nd"', "日,本"]
    path = write(tmp_path / "rows.csv", "\ufeff" + ending.join(lines).replace(",", delimiter))
    step = ending.count("\n")
    assert [(row.value, row.where) for row in read_rows(path)] == [
        ({"instruction": "q", "output": f'a "b"{delimiter} c\nd'}, f"{path}:{1 + step}:1"),
        ({"instruction": "日", "output": "本"}, f"{path}:{2 + 2 * step}:1"),
    ]
    assert format_of(next(iter(read_rows(path)))) == "alpaca"


@pytest.mark.parametrize(
    ("text", "place", "reason", "after"),
    [
        ("q,a\n1,2,3\n4,5", "2:5", "the row has 3 fields, the header 2", 1),
        ("q,a\n1\n4,5", "2:1", "the row has 1 fields, the header 2", 1),
        ('q,a\n1,"x" y\n4,5', "2:6", "more text follows a closing quote", 1),
        ('q,a\n1,2\n4,"5\n6,7\n', "3:3", "a quote is never closed", None),
        ("q,a\n1,2\r3,4\n5,6", "2:4", "a carriage return alone", 1),
        ("q,a\n1,\x002\n5,6", "2:3", "a NUL byte", 1),
        ("q,q\n1,2", "1:3", "the column q stands twice", None),
        ("q,,a\n1,2,3", "1:3", "column 2 has no name", None),
        ('q,"a\n1,2', "1:3", "the header has a quote", None),
    ],
)
def test_a_mistake_in_csv_is_placed(tmp_path: Path, text: str, place: str, reason: str, after: int | None) -> None:
    """F14. Against: a long row cut to the header's length; an unclosed quote that swallows the file."""
    path = write(tmp_path / "rows.csv", text)
    with pytest.raises(UserError, match=reason) as caught:
        list(read_rows(path))
    assert caught.value.where == f"{path}:{place}"
    bad: list[UserError] = []
    if after is None:
        with pytest.raises(UserError, match=reason):
            list(read_rows(path, bad.append))
    else:
        assert len(list(read_rows(path, bad.append))) == after
        assert [error.where for error in bad] == [f"{path}:{place}"]


def test_csv_with_a_broken_character_is_placed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b"q,a\n1,\xff\n")
    with pytest.raises(UserError, match="not UTF-8") as caught:
        list(read_rows(path))
    assert caught.value.where == f"{path}:2:3"


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text\n" + "word " * 100_000 + "\n")
    assert len(next(iter(read_rows(path))).value["text"]) == 500_000


def test_parquet_rows_are_those_of_the_table(tmp_path: Path, prompts: Prompts) -> None:
    """The extra `parquet`; nested columns as well. Against: numbers of rows begun anew in each batch."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    for part in range(2):
        rows = [{"messages": ASKED, "id": n} for n in range(1500)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / f"train-0000{part}-of-00002.parquet", row_group_size=600)
    path = tmp_path / "data" / "train-00001-of-00002.parquet"
    read = list(read_rows(path))
    assert [row.value["id"] for row in read] == list(range(1500))
    assert read[0].value["messages"] == ASKED and read[-1].where == f"{path}:1500"
    assert len(load(tmp_path / "data", prompts).train) == 3000
    write(path, path.read_bytes()[:-40])
    with pytest.raises(UserError, match="not a Parquet file that can be read"):
        list(read_rows(path))


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pyarrow, which is not installed") as caught:
        list(read_rows(write(tmp_path / "rows.parquet", b"PAR1")))
    assert caught.value.hint == 'pip install "litlora[parquet]"'


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "[]", " [ ]"])
def test_an_empty_file_is_refused(tmp_path: Path, prompts: Prompts, content: str) -> None:
    """F14."""
    with pytest.raises(UserError, match="the file is empty") as caught:
        load(write(tmp_path / "rows.json", content), prompts, on_error="skip")
    assert caught.value.where == str(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (gzip.compress(GOOD.encode(), mtime=0), "gzip-compressed"),
        (GOOD.encode("utf-32"), "UTF-32"),
        (b"PK\x03\x04..", "a zip archive"),
        (b"PAR1..", "a parquet file"),
        (bz2.compress(GOOD.encode()), "bzip2-compressed"),
        (lzma.compress(GOOD.encode()), "xz-compressed"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "zstd-compressed"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(20), "an Excel or Word file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "what Git LFS left"),
    ],
)
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path: Path, prompts: Prompts, content: bytes, form: str) -> None:
    """F14: gz by mistake, and its like."""
    for name in ("rows.jsonl", "rows.json", "rows.txt", "rows.csv"):
        with pytest.raises(UserError, match=form) as caught:
            load(write(tmp_path / name, content), prompts, on_error="skip")
        assert caught.value.hint


def test_a_json_array_gives_each_row_its_place(tmp_path: Path, prompts: Prompts) -> None:
    path = write(tmp_path / "rows.json", json.dumps(pairs(3), indent=2))
    assert [row.where for row in read_rows(path)] == [f"{path}:{line}:3" for line in (2, 6, 10)]
    path = write(tmp_path / "flat.json", f" [{GOOD}, {GOOD}]\n")
    assert [row.where for row in read_rows(path)] == [f"{path}:1:3", f"{path}:1:39"]
    rows = [*pairs(2), {"prompt": "q", "completion": ""}]
    data = load(write(tmp_path / "some.json", json.dumps(rows, indent=2)), prompts, on_error="skip")
    assert data.skipped == [f"{tmp_path / 'some.json'}:10:3: the answer is empty"]


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (f"[\n{GOOD}\n{GOOD}\n]", "3:1", "expecting ',' or ']'"),
        (f"[\n{GOOD},\n]", "3:1", "expecting value"),
        (f"[\n{GOOD}\n", "3:1", "expecting ',' or ']'"),
        (f"[{GOOD}] {GOOD}", "1:38", "more follows after the array"),
        (f'[\n{GOOD},\n  {{"a": 1, "a": 2}}]', "3:12", "the key a stands twice"),
        (f'[\n{GOOD},\n  {{"a": NaN}}]', "3:9", "NaN is not JSON"),
        (f'[\n{GOOD},\n  {{"{"7" * 5000}": {"9" * 5000}}}]', "3:5008", "a number of more than 4,300 digits"),
    ],
)
def test_a_mistake_in_a_json_array_is_placed(tmp_path: Path, content: str, place: str, reason: str) -> None:
    path = write(tmp_path / "rows.json", content)
    with pytest.raises(UserError, match=reason) as caught:
        list(read_rows(path))
    assert caught.value.where == f"{path}:{place}"


@pytest.mark.parametrize("layout", [None, 2], ids=["one line", "many lines"])
@pytest.mark.parametrize(
    "broken", ["", "]", ",", "[", '"', "\udcff", "\x00", "NaN", '{"a":1,"a":2}', "9" * 4301], ids=lambda text: repr(text[:14])
)
def test_a_json_array_is_read_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, layout: int | None) -> None:
    """Rows, places and mistakes are those of one large block, wherever blocks end: within a row, a number, a letter of several bytes.
    Caught: a row that is cut handed out or refused (`12` of `123`), the column counted from the block's beginning."""
    rows = [{"prompt": "🙂é中" * 40, "completion": "🙂\n" * 3}, 123, [], {"prompt": "x " * 300, "completion": "y"}]
    text = json.dumps(rows, ensure_ascii=False, indent=layout)
    path = write(tmp_path / "rows.json", (text[:-1] + (f",\n {broken} " if broken else "") + "]\n ").encode("utf-8", "surrogateescape"))

    def read() -> tuple[list[tuple[object, str]], str]:
        found: list[tuple[object, str]] = []
        try:
            found += ((row.value, row.where) for row in read_rows(path))
        except UserError as error:
            return found, str(error)
        return found, ""

    whole = read()
    assert bool(whole[1]) == bool(broken), whole[1]
    for size in (1, 2, 3, 7, 64, 501):
        monkeypatch.setattr(rows_module, "BLOCK", size)
        found, said = read()
        assert said == whole[1], size
        rows_before = len(whole[0])  # of a block with bytes that are no text none is given
        assert found == whole[0] if broken != "\udcff" else found[:rows_before] == whole[0], size


def test_of_a_json_array_no_more_is_read_than_its_rows_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is larger than memory is read. Caught: the array joined before it is looked at."""
    path = write(tmp_path / "rows.json", json.dumps(pairs(1000)).encode())
    monkeypatch.setattr(rows_module, "BLOCK", 64)
    with path.open("rb") as stream:
        monkeypatch.setattr(rows_module.DataFile, "open", lambda self: contextlib.nullcontext(stream))
        rows = read_rows(path)
        for n in range(1, 11):
            next(rows)
            assert stream.tell() <= path.stat().st_size * (n + 3) / 1000 + 2 * 64


@pytest.mark.parametrize(
    "broken", ["{]", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 5000, "1 2", '{"a": "b" "c"}'], ids=lambda text: text[:16]
)
def test_behind_a_mistake_in_a_json_array_nothing_is_read(broken: str) -> None:
    """It is refused in the memory of one row too. Caught: all that follows read, for a row that seems to be cut."""
    read: list[int] = []
    rows = f'{{"prompt": "{"x" * 80}"}},'.encode()

    def endless() -> Iterator[bytes]:
        yield f"[{rows.decode()}{broken},".encode()
        for n in range(1000):
            read.append(n)
            yield rows

    with pytest.raises(UserError, match=r"rows\.json:1:"):
        list(array_rows(endless(), "rows.json"))
    assert len(read) < 10


def test_lines_named_json_and_one_object_are_read_too(tmp_path: Path, prompts: Prompts) -> None:
    path = write(tmp_path / "rows.json", f"{GOOD}\n{GOOD}\n")
    assert len(list(read_rows(path))) == 2
    assert len(list(read_rows(write(path, GOOD)))) == 1
    with pytest.raises(UserError, match="a row with the key data; known are messages"):
        load(write(path, json.dumps({"data": pairs(2)}, indent=1)), prompts)


def test_a_file_that_is_not_there_gets_a_suggestion(tmp_path: Path, prompts: Prompts) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(UserError, match="there is no such file") as caught:
        load(tmp_path / "trian.jsonl", prompts)
    assert caught.value.hint == "did you mean train.jsonl?"
    with pytest.raises(UserError, match=r"not from \.xlsx") as caught:
        load(write(tmp_path / "rows.xlsx", "a,b"), prompts)
    assert caught.value.hint == "save the table as CSV"
    with pytest.raises(UserError, match=r"not from \.gz") as caught:
        load(write(tmp_path / "rows.jsonl.gz", "a,b"), prompts)
    assert caught.value.hint == "unpack it first: gunzip"


@pytest.mark.parametrize("kind", ["link", "loop", "pipe"])
def test_what_only_looks_like_a_file_is_refused_and_never_left_out(tmp_path: Path, prompts: Prompts, kind: str) -> None:
    """F14: a link to nothing, a link to itself, a named pipe, which would wait for ever; by name, and in a directory beside a good file.

    Caught: in a directory, passed over; a link taken for no file. (A pipe that is opened hangs the test.)
    """
    jsonl(tmp_path / "other.jsonl", pairs(2))
    path = tmp_path / "train.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("train.jsonl" if kind == "loop" else "moved/train.jsonl")
    for data in (path, tmp_path):
        with pytest.raises(UserError, match="no regular file" if kind == "pipe" else "a link to nothing that is there") as caught:
            load(data, prompts)
        assert caught.value.where == str(path)


def test_a_directory_gives_its_training_and_its_validation_file(tmp_path: Path, prompts: Prompts) -> None:
    for name, n in (("train.jsonl", 5), ("val.jsonl", 2), ("test.jsonl", 3)):
        jsonl(tmp_path / name, pairs(n))
    train, validation = data_files(tmp_path)
    assert ([p.name for p in train], [p.name for p in validation]) == (["train.jsonl"], ["val.jsonl"])
    data = load(tmp_path, prompts).split(0.5, seed=1)
    assert (len(data.train), len(data.validation)) == (5, 2)
    assert len(load(tmp_path, prompts, heldout=True).train) == 2
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match=r"no rows in this directory \(found: nothing\)"):
        load(tmp_path / "more", prompts)
    jsonl(tmp_path / "more" / "a.jsonl", pairs(2))
    jsonl(tmp_path / "more" / "b.jsonl", pairs(3))
    assert len(load(tmp_path / "more", prompts).train) == 5


# ---- formats -----------------------------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
FORMS = [
    ("messages", {"messages": ASKED}, ASKED),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASKED[1]], "id": 3}, ASKED),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": "x"}, ASKED),
    ("sharegpt", {"conversations": ASKED}, ASKED),
    ("sharegpt", {"conversation": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "system": ""}, ASKED),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, ASKED),
    ("alpaca", {"instruction": "q", "output": "a", "category": "c"}, ASKED),
    ("alpaca", {"instruction": "q", "context": "c", "response": "a"}, [{"role": "user", "content": "q\n\nc"}, ASKED[1]]),
    (
        "alpaca",
        {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["u", "v"]]},
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "v"},
            {"role": "user", "content": "q\n\ni"},
            ASKED[1],
        ],
    ),
    ("completion", {"prompt": "q", "completion": "a"}, ASKED),
    ("completion", {"question": "q", "answer": "a"}, ASKED),
    ("completion", {"prompt": "q", "response": "a"}, ASKED),
    ("completion", {"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
    ("completion", {"input": "q", "output": "a"}, ASKED),
    ("messages", {"messages": json.dumps(ASKED)}, ASKED),
    ("messages", {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ASKED),
    ("text", {"text": "t", "url": "u", "label": True}, Text("t")),
]  # fmt: skip


@pytest.mark.parametrize(("form", "value", "expected"), FORMS)
def test_a_format_is_known_by_its_keys(form: str, value: dict[str, Any], expected: Any) -> None:
    """D01."""
    row = Row(value, "rows.jsonl:1:1")
    assert format_of(row) == form
    assert to_messages(row) == expected


@pytest.mark.parametrize(
    ("file", "form", "rows", "skipped"),
    [
        ("instruct/alpaca_data-0-3252-en.json", "alpaca", 3252, 4),
        ("instruct/alpaca_zh_demo.json", "alpaca", 1000, 0),
        ("instruct/gpteacher_codegen.json", "alpaca", 4535, 0),
        ("instruct/litgpt_fixture_dolly.json", "alpaca", None, 0),
        ("instruct/fastchat_dummy_conversation.json", "sharegpt", None, 0),
        ("instruct/identity.json", "alpaca", 91, 0),
        ("math/gsm8k_train.jsonl", "completion", 7473, 0),
        ("text/c4_demo.jsonl", "text", None, 0),
        ("text/tinystories_sample.txt", "text", 1, 0),
    ],
)
def test_published_data_is_read(file: str, form: str, rows: int | None, skipped: int) -> None:
    read = list(read_rows(shared_data(file)))
    assert rows in (None, len(read))
    assert format_of(read[0]) == form
    refused = []
    for row in read:
        try:
            to_messages(row, form=form)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) == skipped, refused[:5]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            {"title": "t", "author": "a"},
            r"a row with keys title, author; known are messages \| conversations \| instruction\+output \| prompt\+completion",
        ),
        ({}, "a row with no keys"),
        ("text", "this one is text"),
        ({"instruction": "q", "input": "i"}, r"alpaca row without 'output' \(or response"),
        ({"messages": "q"}, "'messages' is text, not a list"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": [{"content": "q"}]}, "message 1 of 'messages' has no 'role'"),
        ({"messages": [{"role": "narrator", "content": "q"}]}, "has role 'narrator'; known are"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "has role"),
        (
            {"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "a tool call of message 2 of 'messages' has no name",
        ),
        ({"messages": [ASKED[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "the arguments of a tool call"),
        ({"messages": ASKED, "tools": ["f"]}, "'tools' is a list, not a list of objects"),
        ({"messages": "[1", "x": 1}, "'messages' is not valid JSON"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": None}]}, "'content' of message 2 of 'messages' is null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASKED[1]]}, "a part that is no text"),
        ({"messages": ASKED[:1]}, "no assistant message"),
        ({"messages": [{**ASKED[1], "weight": 2}]}, "weight of message 1"),
        ({"messages": ASKED, "label": False}, "rows with a verdict"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "rows of preferences"),
        ({"prompt": "q", "chosen": "a"}, "preference row without 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "q", "chosen": [ASKED[0]], "rejected": "a"}, "no assistant message"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history is not a list"),
        ({"text": " "}, "the text is empty"),
    ],
)
def test_a_row_that_cannot_be_learnt_is_refused_with_the_reason(value: Any, reason: str) -> None:
    """F14: wrong types, missing fields, and rows whose meaning would be lost (verdicts, tools)."""
    with pytest.raises(UserError, match=reason) as caught:
        to_messages(Row(value, "rows.jsonl:7:1"))
    assert caught.value.where == "rows.jsonl:7:1"


def test_preference_data_is_not_learnt_by_mistake(prompts: Prompts) -> None:
    for file in ("dpo_en_demo.json", "kto_en_demo.json"):
        with pytest.raises(UserError, match="not learnt by fine-tuning"):
            load(shared_data(f"instruct/{file}"), prompts)


CHOSEN, REJECTED = ASKED, [ASKED[0], {"role": "assistant", "content": "b"}]
PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": ASKED[:1], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
    {"prompt": "q", "chosen": CHOSEN, "rejected": REJECTED},
    {"chosen": CHOSEN, "rejected": REJECTED},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    {"input": {"messages": ASKED[:1]}, "preferred_output": CHOSEN[1:], "non_preferred_output": REJECTED[1:]},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
]


@pytest.mark.parametrize("value", PAIRS)
def test_preference_rows_are_understood(value: dict[str, Any]) -> None:
    """Seven ways to write two answers to one prompt."""
    row = Row(value, "rows.jsonl:1:1")
    assert format_of(row) == "preference"
    assert read_row(row) == Pair(CHOSEN, REJECTED)


def test_published_preference_rows_are_understood() -> None:
    read = [read_row(row) for row in read_rows(shared_data("instruct/dpo_en_demo.json"))]
    assert all(isinstance(value, Pair) for value in read) and len(read) == 300
    judged = [read_row(row) for row in read_rows(shared_data("instruct/kto_en_demo.json"))]
    assert {value.good for value in judged if isinstance(value, Verdict)} == {True, False} and len(judged) == 300


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLED = [
    {"role": "tools", "content": [TOOL]},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "a"},
]


def test_tools_are_read_as_openai_and_as_sharegpt_write_them() -> None:
    """Arguments that are the text of an object become the object: a template writes them out itself. Against: left as text."""
    texts = [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}]
    openai = {"messages": [ASKED[0], {"role": "assistant", "content": None, "tool_calls": texts}, CALLED[3], ASKED[1]], "tools": [TOOL]}
    said = [("human", "q"), ("function_call", json.dumps(CALL["function"])), ("observation", "rain"), ("gpt", "a")]
    sharegpt = {"conversations": [{"from": role, "value": text} for role, text in said], "tools": json.dumps([TOOL["function"]])}
    for value in (openai, sharegpt):
        assert to_messages(Row(value, "rows.jsonl:1:1")) == CALLED


def test_fields_of_other_names_are_mapped(tmp_path: Path, prompts: Prompts) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"frage": "q", "antwort": "a", "prompt": "other"}])
    with pytest.raises(UserError, match="without 'completion'") as caught:
        load(path, prompts)
    assert "--rows.map completion=" in caught.value.hint
    for entries in (["prompt=frage", "completion=antwort"], ["prompt=frage, completion=antwort"]):
        assert to_messages(next(iter(read_rows(path))), parse_mapping(entries)) == ASKED
    with pytest.raises(UserError, match="without 'fragen', which"):
        load(path, prompts, map=["prompt=fragen"])
    for entry, reason in (("prompt", "is not OURS=YOURS"), ("promt=frage", "no row has a field 'promt'")):
        with pytest.raises(UserError, match=reason):
            parse_mapping([entry])


def test_all_rows_of_a_file_have_one_format(tmp_path: Path, prompts: Prompts) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*pairs(1), {"messages": ASKED}])
    with pytest.raises(UserError, match="completion row without 'prompt'") as caught:
        load(path, prompts)
    assert caught.value.where == f"{path}:2:1"


# ---- samples -----------------------------------------------------------------------------------------------------------


def test_a_sample_is_shifted_once_and_graded_to_its_end(tmp_path: Path, prompts: Prompts) -> None:
    """D01, D03: targets are the next ids, IGNORE in the prompt; the last target is EOS."""
    data = load(jsonl(tmp_path / "rows.jsonl", pairs(1)), prompts)
    sample, tokenizer = data.train[0], prompts.tokenizer
    assert sample.tokens.dtype == sample.targets.dtype == np.int32
    assert tokenizer.decode(sample.tokens, skip_special=False) == "<|im_end|>user\nquestion 0</s><|im_end|>assistant\nanswer 0"
    shown = sample.targets != IGNORE
    assert tokenizer.decode(sample.targets[shown], skip_special=False) == "answer 0</s>"
    assert (sample.targets[:-1][shown[:-1]] == sample.tokens[1:][shown[:-1]]).all()
    assert sample.where == f"{tmp_path / 'rows.jsonl'}:1:1"
    assert (data.tokens, data.graded, data.longest) == (len(sample.tokens), int(shown.sum()), len(sample.tokens))
    assert sample.graded == data.graded


def test_without_masking_every_token_is_graded(tmp_path: Path, prompts: Prompts) -> None:
    data = load(jsonl(tmp_path / "rows.jsonl", pairs(1)), prompts, mask_prompt=False)
    assert (data.train[0].targets != IGNORE).all()


def test_long_samples_are_cut_and_counted(tmp_path: Path, prompts: Prompts) -> None:
    """D03, F14. A sample cut before its answer trains nothing, so it is left out, and counted."""
    rows = [{"prompt": "q", "completion": "a" * 50}, {"prompt": "q" * 90, "completion": "a"}, {"prompt": "q", "completion": "a"}]
    whole = load(jsonl(tmp_path / "rows.jsonl", rows), prompts)
    assert [whole.counts.truncated, whole.counts.nothing_graded] == [0, 0]
    data = load(tmp_path / "rows.jsonl", prompts, 40)
    assert [data.counts.truncated, data.counts.nothing_graded, len(data.train), data.longest] == [2, 1, 2, 40]
    assert (data.train[0].tokens == whole.train[0].tokens[:40]).all()
    assert "2 cut to length · 1 without a graded token" in data.summary()


def test_rows_with_nothing_to_train_are_refused_with_the_count(tmp_path: Path, prompts: Prompts) -> None:
    """F14."""
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "q" * 90, "completion": "a"}] * 3 + [{"prompt": 1, "completion": "a"}])
    with pytest.raises(UserError, match="of 4 rows, 3 have no graded token within 40 tokens and 1 were skipped"):
        load(path, prompts, 40, on_error="skip")
    with pytest.raises(UserError, match="no rows") as caught:
        load(write(tmp_path / "rows.csv", "prompt,completion\n"), prompts)
    assert "row below" in caught.value.hint
    with pytest.raises(UserError, match="not text") as caught:
        load(path, prompts, 40)
    assert caught.value.hint == "--rows.on_error skip trains without such rows"
    with pytest.raises(UserError, match="all 2 rows were skipped"):
        load(jsonl(path, [{"prompt": 1, "completion": "a"}, {"text": "t"}]), prompts, on_error="skip")


def test_a_text_is_cut_into_pieces_that_predict_every_token_once(tmp_path: Path) -> None:
    """D02, D03: one BOS at the very beginning, EOS at the very end."""
    prompts = Prompts(real("../models/stories3m-llama"))
    text = "Once upon a time there was a fox. " * 20
    ids = prompts.tokenizer.encode(text, special=False)
    data = load(write(tmp_path / "story.txt", text), prompts, 16)
    assert [int(i) for sample in data.train for i in sample.targets] == [*ids, 2]
    assert [int(i) for sample in data.train for i in sample.tokens] == [1, *ids]
    assert {len(sample.tokens) for sample in data.train[:-1]} == {16}
    assert data.counts.truncated == 0
    assert data.formats == {str(tmp_path / "story.txt"): "text"}


def test_a_long_text_is_learnt_as_if_read_at_once(tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a document is tokenized by has no say in what is learnt. Against: the end of each piece dropped; an end token in between."""
    text = "".join(f"line {n} of a text\n" for n in range(400))
    path = write(tmp_path / "text.txt", text)
    whole = load(path, prompts, 64)
    for piece in (10, 500, 2000):
        monkeypatch.setattr("litlora.data.rows.PIECE", piece)
        assert len(list(read_rows(path))) > 2
        cut = load(path, prompts, 64)
        assert [sample.tokens.tolist() for sample in cut.train] == [sample.tokens.tolist() for sample in whole.train]
        assert [sample.targets.tolist() for sample in cut.train] == [sample.targets.tolist() for sample in whole.train]


def test_a_history_that_is_rewritten_gives_samples_that_stay_together(tmp_path: Path) -> None:
    """One row, several samples: never on both sides of the split."""
    template = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '-' }}</s>{% endfor %}"
    prompts = Prompts(Tokenizer(byte_level(tmp_path / "t")), template)
    rows = [{"messages": [*ASKED, {"role": "user", "content": f"r{i}"}, ASKED[1]]} for i in range(10)]
    data = load(jsonl(tmp_path / "rows.jsonl", rows), prompts)
    assert len(data.train) == 20
    held = data.split(0.3, seed=3)
    assert len(held.validation) == 6
    assert not {sample.where for sample in held.train} & {sample.where for sample in held.validation}


@pytest.mark.parametrize("seed", range(5))
def test_doubles_of_a_row_stay_on_one_side_of_the_split(tmp_path: Path, prompts: Prompts, seed: int) -> None:
    """Held-out rows that were trained on prove nothing. Against: groups by place instead of content."""
    path = jsonl(tmp_path / "rows.jsonl", random.Random(seed).sample(pairs(40, repeat=3), 120))
    data = load(path, prompts).split(0.1, seed=seed)
    assert (len(data.train), len(data.validation)) == (108, 12)
    assert not {sample.tokens.tobytes() for sample in data.train} & {sample.tokens.tobytes() for sample in data.validation}
    assert len(data.weights) == len(data.train) == len(data.groups)


def test_the_split_is_the_seeds_and_the_rows_not_their_orders(tmp_path: Path, prompts: Prompts) -> None:
    one, other = jsonl(tmp_path / "a.jsonl", pairs(50)), jsonl(tmp_path / "b.jsonl", pairs(50)[::-1])

    def held(path: Path, seed: int) -> set[bytes]:
        return {sample.tokens.tobytes() for sample in load(path, prompts).split(0.2, seed).validation}

    assert held(one, 1) == held(other, 1) != held(one, 2)
    assert len(load(one, prompts).split(0.2, 1, max_samples=3).validation) == 3
    assert len(load(one, prompts).split(0.2, 1, max_samples=3).train) == 40
    assert len(load(one, prompts).split(0.0, 1).validation) == 0
    with pytest.raises(UserError, match="one row alone cannot be trained on"):
        load(jsonl(one, pairs(1, repeat=5)), prompts).split(0.2, 1)
    two = load(jsonl(one, pairs(2)), prompts).split(0.9, 1)
    assert (len(two.train), len(two.validation)) == (1, 1)


def test_files_have_weights(tmp_path: Path, prompts: Prompts) -> None:
    one, other = jsonl(tmp_path / "a.jsonl", pairs(2)), jsonl(tmp_path / "b:3.jsonl", pairs(3))
    rows = RowsOptions()
    data = load_data([f"{one}:0.5", str(other), f"{other}:2"], prompts, rows=rows, max_seq_length=99)
    assert data.weights == [0.5] * 2 + [1.0] * 3 + [2.0] * 3
    for wrong, reason in ((f"{one}:0", "the weight 0 is not above 0"), (f"{one}:nan", "the weight nan"), (f"{one}:x", "no such file")):
        with pytest.raises(UserError, match=reason):
            load_data([wrong], prompts, rows=rows, max_seq_length=99)


def test_the_demo_has_training_and_held_out_rows(prompts: Prompts) -> None:
    data = load("demo", prompts)
    assert len(data.train) == 1600
    assert len(data.validation) == len(load("demo", prompts, heldout=True).train) == 200
    assert not {s.tokens.tobytes() for s in data.train} & {s.tokens.tobytes() for s in data.validation}
    assert data.formats["demo:train"] == "alpaca"


def test_the_fingerprint_changes_with_whatever_changes_samples(tmp_path: Path, prompts: Prompts) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(3))
    first = load(path, prompts).fingerprint
    assert first == load(path, prompts).fingerprint == load(jsonl(tmp_path / "b.jsonl", pairs(3)), prompts).fingerprint
    others = [
        load(path, prompts, 500),
        load(path, prompts, mask_prompt=False),
        load(f"{path}:2", prompts),
        load(path, Prompts(prompts.tokenizer)),
    ]
    others += [load(jsonl(path, pairs(4)), prompts)]
    assert len({first, *(data.fingerprint for data in others)}) == 6


def test_reading_and_ordering_data_imports_no_torch() -> None:
    """DESIGN section 2. Only batches.py needs it."""
    code = "import sys, litlora.data.samples, litlora.data.order; assert not {'torch', 'lightning_fabric', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- orders ------------------------------------------------------------------------------------------------------------


def test_every_sample_comes_once_an_epoch_in_another_order() -> None:
    """N12, R03."""
    orders = [epoch_order([1.0] * 13, seed=5, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(13)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != epoch_order([1.0] * 13, seed=6, epoch=0)


def test_an_order_is_a_function_of_seed_and_epoch_alone() -> None:
    """R03: no global state, and the same on every machine and version: the numbers are written down."""
    np.random.seed(0)
    random.seed(0)
    before = random.getstate()
    assert epoch_order([1.0] * 8, seed=1234, epoch=2) == epoch_order([1.0] * 8, seed=1234, epoch=2) == [1, 4, 0, 2, 6, 3, 5, 7]
    assert random.getstate() == before
    code = "from litlora.data.order import epoch_order; print(epoch_order([1.0] * 8, seed=1234, epoch=2))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout) == [
        1,
        4,
        0,
        2,
        6,
        3,
        5,
        7,
    ]


def test_weights_are_passes_per_epoch() -> None:
    weights = [1.0] * 10 + [2.0] * 10 + [0.3] * 10 + [2.5] * 4 + [0.0] * 5
    seen = [Counter(epoch_order(weights, 7, epoch)) for epoch in range(200)]
    for counts in seen:
        assert [counts[i] for i in range(20)] == [1] * 10 + [2] * 10
        assert sum(counts[i] for i in range(20, 30)) == 3
        assert sorted(counts[i] for i in range(30, 34)) == [2, 2, 3, 3]
        assert not any(counts[i] for i in range(34, 39))
    drawn = [sum(counts[i] for counts in seen) for i in range(20, 30)]
    assert min(drawn) > 35  # 60 expected, each epoch another choice


@given(st.lists(st.sampled_from([0.25, 1.0, 1.5, 3.0]), min_size=1, max_size=60), st.integers(0, 2**31), st.integers(0, 9))
def test_orders_have_the_length_that_the_weights_say(weights: list[float], seed: int, epoch: int) -> None:
    expected = sum(math.floor(w) for w in weights) + sum(
        math.floor(part * sum(1 for w in weights if w % 1 == part) + 0.5) for part in {w % 1 for w in weights}
    )
    assert len(epoch_order(weights, seed, epoch)) == expected


# ---- batches -----------------------------------------------------------------------------------------------------------


def samples_of(lengths: Sequence[int]) -> list[Sample]:
    made = []
    for n, length in enumerate(lengths):
        tokens = np.arange(length, dtype=np.int32) + 1000 * (n + 1)
        targets = np.where(np.arange(length) % 3 == 0, IGNORE, tokens + 1).astype(np.int32)
        made.append(Sample(tokens, targets, f"row {n}"))
    return made


def taken_apart(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The samples of a batch, from its segments or its rows."""
    parts = []
    if batch.segments is None:
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            length = next((n for n, token in enumerate(tokens) if token == 0), len(tokens))
            assert set(targets[length:]) <= {IGNORE}
            parts.append((tokens[:length], targets[:length]))
        return parts
    assert batch.tokens.shape[0] == 1
    assert batch.prefix + sum(batch.segments) == batch.tokens.shape[1]
    tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
    start = batch.prefix
    for length in batch.segments:
        own = slice(start, start + length)
        parts.append((tokens[: batch.prefix] + tokens[own], targets[: batch.prefix] + targets[own]))
        start += length
    return parts


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 100), st.booleans())
def test_a_batch_holds_whole_samples_and_each_sample_is_in_one(lengths: list[int], limit: int, packing: bool) -> None:
    """N10's and N12's ground: nothing split, nothing lost, no label of one sample beside tokens of another. Against: FFD with >."""
    samples = samples_of(lengths)
    batches = pack(samples, limit, packing)
    parts = [part for batch in batches for part in taken_apart(batch)]
    assert sorted(parts) == sorted((sample.tokens.tolist(), sample.targets.tolist()) for sample in samples)
    for batch in batches:
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.numel() <= limit or len(taken_apart(batch)) == 1
        assert batch.graded == int((batch.targets != IGNORE).sum())
    assert sum(batch.graded for batch in batches) == sum(sample.graded for sample in samples)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 25), st.integers(0, 2)), min_size=1, max_size=25), st.integers(1, 150))
def test_a_batch_that_shares_a_beginning_holds_the_same_samples(kinds: list[tuple[int, int, int]], limit: int) -> None:
    """N09's ground. Rows of a few templates, some of them twice, some graded from the start.

    Caught: a beginning alike in its tokens but not in what is graded; the last token of a sample that is another's beginning shared.
    """
    samples = [templated(*kind) for kind in kinds]
    batches = pack(samples, limit, share=True)
    parts = [part for batch in batches for part in taken_apart(batch)]
    assert sorted(parts) == sorted((sample.tokens.tolist(), sample.targets.tolist()) for sample in samples)
    assert all(batch.tokens.numel() <= limit or len(taken_apart(batch)) == 1 for batch in batches)
    assert all(min(batch.segments or ()) > 0 for batch in batches)
    assert sum(batch.graded for batch in batches) == sum(sample.graded for sample in samples)
    apart = pack(samples, limit)
    assert sum(batch.tokens.numel() + 24 for batch in batches) <= sum(batch.tokens.numel() + 24 for batch in apart)


def templated(template: int, length: int, seed: int) -> Sample:
    """A sample that begins with 30 words of a template; the templates agree in their first 12. Template 3 is graded throughout."""
    words = [*range(100, 112), *range(200 + 100 * (template % 3), 218 + 100 * (template % 3))]
    tokens = np.array([*words, *np.random.default_rng(seed).integers(0, 9, length)], dtype=np.int32)
    targets = np.append(tokens[1:], 9)
    targets[: 0 if template == 3 else 29] = IGNORE
    return Sample(tokens, targets, f"{template} {length}")


def test_what_is_shared_is_computed_once() -> None:
    """Two templates of 30 words, 8 rows of 10 more words of each: two streams of 29 + 8 x 11 tokens, where they were 640."""
    samples = [templated(template, 10, seed) for seed in range(8) for template in (0, 1)]
    batches = pack(samples, 1024, share=True)
    assert [(batch.prefix, batch.segments) for batch in batches] == [(29, (11,) * 8)] * 2, "the last word predicts what is not alike"
    few = pack([templated(0, 10, 0), templated(1, 10, 0)], 1024, share=True)
    assert [(batch.prefix, batch.segments) for batch in few] == [(12, (28, 28))], "a batch for each would cost more"


def test_what_is_shared_pays() -> None:
    """From 8 tokens on, of two samples or more, and where fewer tokens are computed in the end: a batch counts as 24 more.

    Caught: more than 8; a sample that shares with itself; rows of a template always together, however they fill batches.
    """

    def alike_in(count: int) -> list[Sample]:
        rows = [np.array([*range(count), last, 9], dtype=np.int32) for last in (50, 60)]
        return [Sample(tokens, np.append(tokens[1:], 0), "") for tokens in rows]

    # the target of the last token that is alike is not
    assert [pack(alike_in(count), 100, share=True)[0].prefix for count in (8, 9)] == [0, 8]
    assert [batch.prefix for batch in pack(alike_in(9), 11, share=True)] == [0, 0]
    rows = [templated(*kind) for kind in [(1, 10, 0), (2, 25, 1), (0, 5, 2), (1, 5, 3)]]
    assert sum(batch.tokens.numel() + 24 for batch in pack(rows, 80, share=True)) == 171  # 189 with both rows of template 1 in a batch


def test_packing_fills_batches() -> None:
    samples = samples_of([30, 10, 20, 20, 10, 10])
    assert sorted(batch.tokens.numel() for batch in pack(samples, 50)) == [50, 50]
    assert [tuple(batch.tokens.shape) for batch in pack(samples, 60, packing=False)] == [(2, 30), (3, 20), (1, 10)]
    assert all(batch.segments is None for batch in pack(samples, 60, packing=False))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_ranks_share_a_window_without_loss_and_evenly(lengths: list[int], world: int) -> None:
    """N12: every sample on one rank; no rank has more than the others by more than the longest sample."""
    window = samples_of(lengths)
    shares = [share_of_rank(window, rank, world) for rank in range(world)]
    assert sorted(sample.where for share in shares for sample in share) == sorted(sample.where for sample in window)
    loads = [sum(len(sample.tokens) for sample in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
    if world == 1:
        assert shares[0] == window


def test_a_window_of_one_sample_leaves_the_other_ranks_idle() -> None:
    """N12: the tail window of 13 samples by 4."""
    assert [len(share_of_rank(samples_of([5]), rank, 2)) for rank in range(2)] == [1, 0]


def test_ranks_are_balanced_by_tokens_not_by_samples() -> None:
    shares = [share_of_rank(samples_of([10, 40, 10, 10, 10]), rank, 2) for rank in range(2)]
    assert [[len(sample.tokens) for sample in share] for share in shares] == [[40], [10, 10, 10, 10]]


@pytest.mark.parametrize(
    ("documents", "wanted"),
    [
        ("file", [("one\ntwo\n\n\nthree \n", 1)]),
        ("blank", [("one\ntwo", 1), ("three ", 5)]),
        ("line", [("one", 1), ("two", 2), ("three ", 5)]),
    ],
)
def test_a_text_file_is_cut_into_documents_as_asked(tmp_path: Path, documents: str, wanted: list[tuple[str, int]]) -> None:
    """Each document is a row with the line it begins at; nothing of the text is lost, and an unknown place is never named."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\n\n\nthree \n")
    rows = list(rows_of(DataFile(str(path), "text"), documents=documents))
    assert [(row.value["text"], row.where) for row in rows] == [(text, f"{path}:{line}:1") for text, line in wanted]
