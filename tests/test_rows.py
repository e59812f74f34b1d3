"""litlora/data: rows read with their places, from every kind of file, and their formats told apart."""

# ruff: noqa: F401, F811  (a fixture is imported by its name)

import bz2
import contextlib
import gzip
import json
import lzma
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import shared_data
from test_data import ASKED, jsonl, load, pairs, prompts, write

from litlora.data import rows as rows_module
from litlora.data.formats import Pair, Text, Verdict, format_of, parse_mapping, read_row, texts, to_messages, unread
from litlora.data.json_rows import array_rows
from litlora.data.rows import DataFile, Row, data_files, read_rows, rows_of
from litlora.data.samples import marked, texts_of
from litlora.errors import UserError
from litlora.options import RowsOptions
from litlora.prompts import Prompts

GOOD = '{"prompt": "q", "completion": "a"}'


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
    assert "1 row skipped" in data.summary()


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
        ("q,a\n1\n4,5", "2:1", "the row has 1 field, the header 2", 1),
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        ("\ufeff", "the file is empty"),
        ("[]", "the file holds an empty list"),
        (" [ ]", "the file holds an empty list"),
    ],
)
def test_an_empty_file_is_refused(tmp_path: Path, prompts: Prompts, content: str, said: str) -> None:
    """F14: as what it is. Caught: `[]` told as an empty file."""
    with pytest.raises(UserError, match=said) as caught:
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


def test_what_speaks_of_rows_is_none_of_them(tmp_path: Path, prompts: Prompts) -> None:
    """A dataset's card, its licence and LLaMA-Factory's list lie beside the rows. Caught: card and licence learnt as documents; rows left
    out for their file's name."""
    jsonl(tmp_path / "rows.jsonl", pairs(2))
    jsonl(tmp_path / "citation.jsonl", pairs(3))
    for name in ("README.md", "LICENSE.txt", "dataset_info.json"):
        (tmp_path / name).write_text('{"rows": {"file_name": "rows.jsonl"}}')
    rows = [str(tmp_path / f"{name}.jsonl") for name in ("citation", "rows")]
    assert load(tmp_path, prompts).formats == dict.fromkeys(rows, "completion")
    assert load(tmp_path / "README.md", prompts).formats == {str(tmp_path / "README.md"): "text"}


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


# ---- formats -----------------------------------------------------------------------------------------------------------

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


def test_what_stands_beside_a_question_is_asked_with_it(prompts: Prompts) -> None:
    """OpenOrca's system prompts, and what a question is about. Caught: both were left out without a word."""
    row = {"system_prompt": "S", "question": "q", "context": "about", "answer": "a", "id": 1}
    asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "q\n\nabout"}, ASKED[1]]
    assert to_messages(Row(row, "rows.jsonl:1:1")) == asked
    assert to_messages(Row({"input": "q", "output": "a", "system_prompt": ""}, "rows.jsonl:1:1")) == ASKED
    assert to_messages(Row({**row, "context": ["ab", "out"]}, "rows.jsonl:1:1"))[1]["content"] == "q\n\nab\n\nout"
    with pytest.raises(UserError, match="'context' has a part that is no text"):
        to_messages(Row({**row, "context": [1]}, "rows.jsonl:1:1"))
    passages = {"title": ["t"], "sentences": [["s"]]}  # HotpotQA's
    for form in ({**row, "context": passages}, {"instruction": "q", "input": passages, "output": "a"}):
        with pytest.raises(UserError, match="is an object, not text") as refused:  # caught: nothing said of what to do
            to_messages(Row(form, "rows.jsonl:1:1"))
        assert "make it a text or a list of texts; or give the field another name" in refused.value.hint
    assert to_messages(Row({**row, "context": None, "passages": passages}, "rows.jsonl:1:1"))[1]["content"] == "q"
    own = [{"role": "system", "content": "own"}, *ASKED]
    assert to_messages(Row({"messages": own, "system_prompt": "S"}, "rows.jsonl:1:1")) == own, "a second system message"
    asks = {"prompt": ASKED[:1], "completion": ASKED[1:], "context": "about"}
    assert unread(Row(asks, "rows.jsonl:1:1"), None, "completion") == {"context"}
    thought = {**ASKED[1], "reasoning_content": "hm"}
    assert texts(to_messages(Row({"messages": [ASKED[0], thought]}, "rows.jsonl:1:1"))) == ["q", "hm", "a"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_what_an_answer_thought_is_read(key: str) -> None:
    """Under every name that templates have for it. Against: dropped without a word."""
    thought = {"reasoning_content": "t", "thinking": "t"}
    assert to_messages(Row({"messages": [ASKED[0], {**ASKED[1], key: "t"}]}, "rows.jsonl:1:1")) == [ASKED[0], {**ASKED[1], **thought}]
    with pytest.raises(UserError, match=f"'{key}' of message 2"):
        to_messages(Row({"messages": [ASKED[0], {**ASKED[1], key: 3}]}, "rows.jsonl:1:1"))


def test_rows_with_tools_become_samples(tmp_path: Path, prompts: Prompts) -> None:
    """All the way from a file. Caught: a TypeError for every such row, from the look for placeholders."""
    shown = "{{ tools[0].function.name if tools }}:{% for m in messages %}{{ m.content or m.tool_calls[0].function.name }}</s>{% endfor %}"
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": CALLED[1:], "tools": [TOOL]}])
    speaking = Prompts(prompts.tokenizer, shown)
    assert [marked(sample, speaking) for sample in load(path, speaking).train] == ["weather:q</s>«weather</s>»rain</s>«a</s>»"]
    assert list(texts_of([str(path)], RowsOptions())) == ["q", "rain", "a"]


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
