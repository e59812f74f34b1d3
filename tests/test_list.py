"""`litlora list`: the checkpoints of a run at one glance."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import flip
from conftest import ROOT
from talkers import make_step, make_talker

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.note import write_note
from litlora.checkpoint.resolve import resolve

LOSSES = {9: 0.9, 10: 0.4, 100: 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three steps, step-9 before step-10."""
    base = make_talker(tmp_path / "base")
    for step, loss in LOSSES.items():
        make_step(tmp_path / "out", step, base, val_loss=loss)
    return tmp_path / "out"


def listed(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["list", str(run), "--json", *words]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["steps"]
    return rows


def test_the_best_step_is_the_one_that_the_run_means(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `--checkpoint_dir RUN` takes is what is marked, also when the best one is torn."""
    rows = listed(run, capsys)
    assert [row["step"] for row in rows] == [9, 10, 100]
    assert [row["step"] for row in rows if row["best"]] == [10]
    assert resolve(run).path == run / "step-10"
    (run / "step-10" / names.ADAPTER_WEIGHTS).write_bytes(b"x")
    rows = listed(run, capsys)
    assert [(row["step"], row["whole"]) for row in rows if row["best"] or not row["whole"]] == [(10, False), (100, True)]
    assert resolve(run).path == run / "step-100"


def test_a_torn_step_is_named_with_its_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YARDSTICK F03: in its own row, and what else is not as it was."""
    (run / "step-9" / names.MANIFEST).unlink()
    (run / "step-100" / names.MERGED).mkdir()
    write_note(run / "step-9", "first words\nmore")
    capsys.readouterr()
    assert main(["list", str(run)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "epoch", "tokens", "train", "val", "MB", "state", "note"]
    assert rows[0].endswith(f"torn           {names.MANIFEST} is missing · first words") and rows[0].split()[0] == "9"
    assert rows[1].startswith("*    10   0.10   10.0k  1.5000  0.4000") and rows[1].endswith("whole")
    assert rows[2].endswith("whole, merged")
    row = listed(run, capsys)[0]
    assert (row["whole"], row["resumable"], row["faults"], row["val_loss"]) == (False, False, [f"{names.MANIFEST} is missing"], None)


def test_a_run_too_large_to_be_read_in_a_moment_is_not_called_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """YARDSTICK F03: an altered byte is found where bytes are read, and elsewhere nothing is said of them. Caught: `unread` as `whole`."""
    flip(run / "step-9" / names.ADAPTER_WEIGHTS, 8 * 3000)
    (run / "step-10" / names.ADAPTER_WEIGHTS).write_bytes(b"short")
    assert [row["whole"] for row in listed(run, capsys)] == [False, False, True]
    monkeypatch.setattr("litlora.commands.list.READ_UNASKED", 10)
    with monkeypatch.context() as closed:
        closed.setattr("litlora.checkpoint.manifest.sha256", lambda path: pytest.fail(f"{path} was read"))
        assert [row["whole"] for row in listed(run, capsys)] == [None, False, None]
        assert main(["list", str(run)]) == 0
    shown = capsys.readouterr()
    assert "whole" not in shown.out and shown.out.count("unread") == 2 and "--check reads every byte" in shown.err
    assert [row["whole"] for row in listed(run, capsys, "--check", "true")] == [False, False, True]


def test_what_is_no_step_is_mentioned_and_what_is_meant_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "step-9").rename(run / "step-9.torn")
    (run / names.temporary_name("step-11", 99999999)).mkdir()
    (run / "step-7").write_text("a file")
    capsys.readouterr()
    assert main(["list", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["best"], found["last"]) == (str(run / "step-10"), str(run / "step-100"))
    assert [(Path(one["path"]).name, one["kind"]) for one in found["leftovers"]] == [
        (".tmp-step-11-99999999", "temporary"),
        ("step-9.torn", "aside"),
    ]
    assert main(["list", str(run)]) == 0
    told = capsys.readouterr().err
    assert f"* {run / 'step-10'}: lowest validation loss (0.4000) of 2 in {run}" in told
    assert "step-9.torn: a torn step that was set aside" in told and "half-written" in told


def test_a_terminal_gets_a_table_and_everything_else_plain_text(run: Path) -> None:
    """NO_COLOR (https://no-color.org), TERM=dumb and pipes are honoured; a note cannot command the terminal."""
    write_note(run / "step-9", "\x1b[2Jgone")

    def seen(**changes: str) -> str:
        master, slave = pty.openpty()
        environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm", **changes}
        words = [sys.executable, "-m", "litlora", "list", str(run)]
        with subprocess.Popen(words, stdout=slave, stderr=slave, env=environment, cwd=ROOT) as child:
            os.close(slave)
            text = b""
            try:
                while part := os.read(master, 2**16):
                    text += part
            except OSError:  # Linux: the other end is closed
                pass
            assert child.wait() == 0
        os.close(master)
        return text.decode()

    assert "\x1b[1m" in seen() and "\x1b[2J" not in seen()
    for changes in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in seen(**changes) and "gone" in seen(**changes)


@pytest.mark.parametrize(
    ("key", "order"), [("step", [9, 10, 100]), ("val_loss", [10, 100, 9]), ("tokens", [9, 10, 100]), ("size", [9, 10, 100])]
)
def test_steps_are_sorted_as_asked(run: Path, capsys: pytest.CaptureFixture[str], key: str, order: list[int]) -> None:
    assert [row["step"] for row in listed(run, capsys, "--sort", key)] == order


def test_a_list_without_a_run_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(run.parent / "base")]) == 2
    assert main(["list", str(run / "nothing")]) == 2
    assert main(["list", "a\0b"]) == 2
    assert main(["list", str(run / "step-9")]) == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 4 and f"hint: litlora list {run}" in told


def test_a_run_that_is_not_there_is_not_called_an_empty_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a run of a close name is named, but no model. Caught: `is no run: it holds no step-N directories` of what does not exist."""
    for path, hint in ((run.parent / "ouut", f"did you mean {run}?"), (run.parent / "bas", "give the directory that holds the steps")):
        assert main(["list", str(path)]) == 2
        assert capsys.readouterr().err == f"error: {path}: there is no such directory\nhint: {hint}\n"


def test_several_runs_share_a_table_with_their_names(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its own best step; what is no run is left out, and it is said. Sorted by loss, they are one list."""
    other = tmp_path / "other"
    make_step(other, 20, tmp_path / "base", val_loss=0.45)
    paths = [str(path) for path in (run, tmp_path / "base", other)]
    capsys.readouterr()
    assert main(["list", *paths]) == 0
    shown = capsys.readouterr()
    head, *rows = shown.out.splitlines()
    assert head.split()[:2] == ["run", "step"]
    assert [(row.split()[0], "*" in row) for row in rows] == [(str(run), False), (str(run), True), (str(run), False), (str(other), True)]
    assert f"left out, for they are no runs: {tmp_path / 'base'}" in shown.err and f"* {other / 'step-20'}: " in shown.err
    assert main(["list", *paths, "--sort", "val_loss"]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]] == [str(run), str(other), str(run), str(run)]
    assert main(["list", *paths, "--json"]) == 0
    assert [(one["run"], len(one["steps"])) for one in json.loads(capsys.readouterr().out)] == [(str(run), 3), (str(other), 1)]
    assert main(["list", str(tmp_path / "base"), str(tmp_path)]) == 2
    assert "none of them is a run" in capsys.readouterr().err


def test_where_there_is_no_run_it_says_how_to_begin_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["list"]) == 2 and "hint: litlora finetune lora begins one" in capsys.readouterr().err


def test_a_run_without_a_step_is_an_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / names.RUN_YAML).write_text("seed: 1\n")
    assert main(["list", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "no checkpoint\n")
    assert listed(tmp_path, capsys) == []
