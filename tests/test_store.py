"""litlora/data/store.py: samples in memory and on disk are the same; what is kept is found again only where nothing changed."""

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, shared_data
from test_data import CHATML, jsonl, load, pairs, prompts  # noqa: F401  (a fixture)
from test_prompts import with_named_templates
from test_tokenizer import byte_level

from litlora.data import samples, store
from litlora.data.samples import DataSet, load_data
from litlora.errors import UserError
from litlora.options import RowsOptions
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file is large, and the cache is a directory of this test."""
    monkeypatch.setattr(samples, "LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "litlora" / "rows"


def shown(data: DataSet) -> Any:
    of = [[(sample.tokens.tolist(), sample.targets.tolist(), sample.where) for sample in part] for part in (data.train, data.validation)]
    return of, data.weights, data.groups, data.formats, data.counts, data.placeholder, data.fingerprint, data.tokens, data.graded


def test_the_first_placeholder_is_found_by_its_file_whoever_tokenized_it(tmp_path: Path, prompts: Prompts, kept: Path) -> None:  # noqa: F811
    """Counts and the place come from what was kept too: of a copy by another name, of the second file after the first."""
    rows = [*pairs(2), {"prompt": "q", "completion": "I am {{name}} by {{author}}."}]
    path, plain = jsonl(tmp_path / "rows.jsonl", rows), jsonl(tmp_path / "plain.jsonl", pairs(3))
    copy = jsonl(tmp_path / "copy.jsonl", rows)
    assert load(path, prompts).placeholder == f"{path}:3:1: {{{{name}}}}"
    found = [load_data([str(f) for f in files], prompts, rows=RowsOptions(), max_seq_length=512) for files in ((plain, copy), (copy, path))]
    assert [(data.counts.placeholders, data.placeholder) for data in found] == [(n, f"{copy}:3:1: {{{{name}}}}") for n in (1, 2)]
    assert len(list(kept.iterdir())) == 2


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose rows are made into samples from here on."""
    made: list[str] = []
    original = samples._Maker._made

    def made_of(maker: Any, file: Any) -> Any:
        made.append(file.name)
        return original(maker, file)

    monkeypatch.setattr(samples._Maker, "_made", made_of)
    return made


def test_samples_on_disk_are_those_in_memory(tmp_path: Path, prompts: Prompts, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """D06. The split too, and again from what was kept. Against: counts lost."""
    path = jsonl(tmp_path / "rows.jsonl", [*pairs(20), {"prompt": "x" * 600, "completion": "y"}])
    first = load(path, prompts, 100)
    made = counted(monkeypatch)
    again = load(path, prompts, 100)
    assert made == [] and len(list(kept.iterdir())) == 1
    monkeypatch.setattr(samples, "LARGE", 1 << 30)
    assert shown(first) == shown(again) == shown(load(path, prompts, 100)) and again.counts.truncated == 1
    assert shown(again.split(0.3, 7)) == shown(load(path, prompts, 100).split(0.3, 7))
    assert not isinstance(load(path, prompts).train[0].tokens, np.memmap) and isinstance(again.train.parts[0].tokens, np.memmap)


def test_what_changes_samples_finds_nothing(tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """D06: file, tokenizer, the rows of its embedding, template, that for tools, length, mask, mapping, --rows.on_error,
    --rows.documents. Another name and other neighbours do find it. Caught: each of these not looked at."""
    monkeypatch.setattr(store, "ENTRIES", 99)
    path = jsonl(tmp_path / "rows.jsonl", pairs(5))
    load(path, prompts)
    made = counted(monkeypatch)
    (tmp_path / "other").mkdir()
    copy = jsonl(tmp_path / "other" / "copy.jsonl", pairs(5))
    assert load(copy, prompts).train[3].where == f"{copy}:4:1" and made == []
    other_template = Prompts(prompts.tokenizer, "{# another #}" + CHATML)
    other_tokenizer = Prompts(Tokenizer(byte_level(tmp_path / "t", "<more>")), CHATML)
    with_tools = Prompts(Tokenizer(with_named_templates(tmp_path / "named", default=CHATML, tool_use="{# tools #}" + CHATML)), CHATML)
    assert with_tools.tokenizer.hash == prompts.tokenizer.hash
    text = tmp_path / "text.txt"
    text.write_text("one\ntwo\n")
    load(text, prompts)
    for changed in (
        lambda: load_data([str(text)], prompts, rows=RowsOptions(documents="line"), max_seq_length=512),
        lambda: load(path, with_tools),
        lambda: load(path, Prompts(Tokenizer(prompts.tokenizer.directory, rows=prompts.tokenizer.size - 1), CHATML)),
        lambda: load(path, other_template),
        lambda: load(path, other_tokenizer),
        lambda: load(path, prompts, 40),
        lambda: load(path, prompts, mask_prompt=False),
        lambda: load(path, prompts, on_error="skip"),
        lambda: load(path, prompts, map=["prompt=completion", "completion=prompt"]),
        lambda: load(jsonl(tmp_path / "rows.jsonl", pairs(6)), prompts),
    ):
        before = len(made)
        changed()
        assert len(made) == before + 1


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "about"])
def test_what_was_altered_is_made_again(tmp_path: Path, prompts: Prompts, kept: Path, damage: str) -> None:  # noqa: F811
    """A cache costs time, never a result. Against: sizes compared alone."""
    path = jsonl(tmp_path / "rows.jsonl", pairs(5))
    good = shown(load(path, prompts))
    entry = next(kept.iterdir())
    tokens = entry / "tokens"
    raw = bytearray(tokens.read_bytes())
    if damage == "flip":
        raw[9] ^= 1
        tokens.write_bytes(raw)
    elif damage == "cut":
        tokens.write_bytes(raw[:-4])
    elif damage == "delete":
        tokens.unlink()
    else:
        (entry / store.ABOUT).write_text("{")
    assert shown(load(path, prompts)) == good == shown(load(path, prompts))


def test_nothing_is_kept_of_rows_with_mistakes_nor_where_it_is_not_wanted(tmp_path: Path, prompts: Prompts, kept: Path) -> None:  # noqa: F811
    """Skipped rows are listed by their places each time; a run that fails leaves nothing behind."""
    path = jsonl(tmp_path / "rows.jsonl", [*pairs(3), {"prompt": "q"}])
    with pytest.raises(UserError):
        load(path, prompts)
    for _ in range(2):
        data = load(path, prompts, on_error="skip")
        assert len(data.skipped) == 1 and data.skipped[0].startswith(f"{path}:4:1: completion row without") and len(data.train) == 3
    del data
    assert list(kept.iterdir()) == []
    for n in range(store.ENTRIES + 3):
        load(jsonl(tmp_path / "rows.jsonl", pairs(n + 1)), prompts)
    assert len(list(kept.iterdir())) == store.ENTRIES


def test_a_home_that_cannot_be_written_to_costs_time_alone(
    tmp_path: Path,
    prompts: Prompts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The samples are on disk all the same, elsewhere: no more memory is taken."""
    store._warn_once.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = load(jsonl(tmp_path / "rows.jsonl", pairs(3)), prompts)
    assert len(data.train) == 3 and isinstance(data.train.parts[0].tokens, np.memmap) and capsys.readouterr().err == ""


def test_without_a_cache_nothing_stays(tmp_path: Path, prompts: Prompts, kept: Path) -> None:  # noqa: F811
    """`--rows.cache false`: what was tokenized is on disk while it is used, and what others kept is not looked at."""
    path = jsonl(tmp_path / "rows.jsonl", pairs(5))
    data = load_data([str(path)], prompts, rows=RowsOptions(cache=False), max_seq_length=512)
    assert len(data.train) == 5 and isinstance(data.train.parts[0].tokens, np.memmap)
    del data
    assert not kept.exists() or list(kept.iterdir()) == []


def test_samples_of_several_files_keep_their_own_places(tmp_path: Path, prompts: Prompts) -> None:  # noqa: F811
    """Against: samples of the first file for those of the second; another way to cut a text found in the cache."""
    first, second = (
        jsonl(tmp_path / "a.jsonl", pairs(3)),
        jsonl(tmp_path / "b.jsonl", [{"prompt": "other", "completion": "one"}, *pairs(1)]),
    )
    data = load_data([str(first), str(second)], prompts, rows=RowsOptions(), max_seq_length=512)
    assert [sample.where for sample in data.train] == [f"{first}:{n}:1" for n in (1, 2, 3)] + [f"{second}:{n}:1" for n in (1, 2)]
    alone = load(second, prompts)
    assert data.train[3].tokens.tolist() == alone.train[0].tokens.tolist() != data.train[0].tokens.tolist()
    text = tmp_path / "text.txt"
    text.write_text("one\ntwo\n\nthree\n")
    ways: dict[Any, int] = {"file": 1, "blank": 2, "line": 3}
    assert {way: len(load_data([str(text)], prompts, rows=RowsOptions(documents=way), max_seq_length=512).train) for way in ways} == ways


def test_a_cache_that_cannot_be_written_costs_time_alone(
    tmp_path: Path,
    prompts: Prompts,  # noqa: F811
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk that is full in the middle: every row is there once, counted once, and it is said once."""
    store._warn_once.cache_clear()
    paths = [jsonl(tmp_path / f"{n}.jsonl", [*pairs(n), {"prompt": "q"}]) for n in (3, 4)]
    good = [shown(load(path, prompts, on_error="skip")) for path in paths]
    original = store._write

    def full(made: Any, name: str, streams: Any) -> None:
        original(made, name, streams)
        if not isinstance(streams["tokens"], io.BytesIO):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "_write", full)
    data = [load(path, prompts, on_error="skip") for path in paths]
    assert [shown(one) for one in data] == good and all(len(one.skipped) == 1 for one in data)
    assert list(kept.iterdir()) == []
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_one_file_read_as_another_kind_is_other_rows(tmp_path: Path, prompts: Prompts) -> None:  # noqa: F811
    """The bytes are the same: rows of a .jsonl, one text of a .txt."""
    rows = jsonl(tmp_path / "rows.jsonl", pairs(5))
    text = Path(shutil.copy(rows, tmp_path / "rows.txt"))
    first, second = load(rows, prompts), load(text, prompts)
    assert (len(first.train), second.formats) == (5, {str(text): "text"}) and len(second.train) == 1
    assert first.fingerprint != second.fingerprint and first.fingerprint == load(rows, prompts).fingerprint


def test_an_entry_that_comes_while_it_is_looked_for_stays(
    tmp_path: Path,
    prompts: Prompts,  # noqa: F811
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process puts it there just after this one saw that there is none."""
    path = jsonl(tmp_path / "rows.jsonl", pairs(5))
    good = shown(load(path, prompts))
    (entry,) = kept.iterdir()
    elsewhere = entry.rename(tmp_path / "theirs")
    (elsewhere / "theirs").write_text("")  # a number of an inode would not do: it is given out again
    read_bytes, read_text = Path.read_bytes, Path.read_text

    def late(original: Any) -> Any:
        def read(self: Path, *args: Any, **more: Any) -> Any:
            try:
                return original(self, *args, **more)
            finally:
                if self == entry / store.ABOUT and elsewhere.exists():
                    elsewhere.rename(entry)

        return read

    monkeypatch.setattr(Path, "read_bytes", late(read_bytes))
    monkeypatch.setattr(Path, "read_text", late(read_text))
    assert shown(load(path, prompts)) == good
    assert [(found / "theirs").exists() for found in kept.iterdir()] == [True]


READ = """
import resource, sys
from pathlib import Path
from litlora.data.samples import load_data
from litlora.options import RowsOptions
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer
data = load_data([sys.argv[1]], Prompts(Tokenizer(sys.argv[2])), rows=RowsOptions(cache=False), max_seq_length=512)
total = sum(int(sample.tokens[0]) for sample in data.train)
file_pages = int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
print(data.tokens, file_pages, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_text_larger_than_memory_is_streamed(tmp_path: Path) -> None:
    """Memory does not grow with the text: four times as much costs less than 60 MB more (all of it would be 300 MB)."""
    text = shared_data("text/wiki_demo.txt").read_bytes()
    tokenizer = shared_data("models/stories3m-llama")
    peaks = []
    for times in (12, 48):
        path = tmp_path / f"{times}.txt"
        path.write_bytes(text * times)
        words = [sys.executable, "-c", READ, str(path), str(tokenizer)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        tokens, anonymous, _ = map(int, done.stdout.split())
        assert tokens > times * 200_000
        peaks.append(anonymous)
    assert peaks[1] - peaks[0] < 60_000, peaks
