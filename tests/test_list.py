"""`litlora list` and `litlora note`: the checkpoints of a run at one glance, and what the user wrote about them."""

import json
from pathlib import Path
from typing import Any

import pytest
from talkers import make_step, make_talker

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.note import tags_of
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
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
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
    """YARDSTICK F03."""
    (run / "step-9" / names.MANIFEST).unlink()
    capsys.readouterr()
    assert main(["list", str(run)]) == 0
    shown = capsys.readouterr()
    assert "torn" in shown.out
    assert f"{run / 'step-9'}: {names.MANIFEST}" in shown.err


@pytest.mark.parametrize(("key", "order"), [("step", [9, 10, 100]), ("val_loss", [10, 100, 9]), ("train_loss", [9, 10, 100])])
def test_steps_are_sorted_as_asked(run: Path, capsys: pytest.CaptureFixture[str], key: str, order: list[int]) -> None:
    assert [row["step"] for row in listed(run, capsys, "--sort", key)] == order


def test_notes_are_kept_shown_and_taken_away_and_never_tear_a_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A note is the user's own: it is not hashed, and the step stays whole."""
    step = run / "step-9"
    assert main(["note", str(step), "sounds right #release #v1.0"]) == 0
    assert main(["note", str(step), "second thought", "--append"]) == 0
    capsys.readouterr()
    assert main(["note", str(step)]) == 0
    assert capsys.readouterr().out == "sounds right #release #v1.0\nsecond thought\n"
    row = listed(run, capsys, "--tag", "#release")
    assert [(one["step"], one["note"], one["tags"], one["whole"]) for one in row] == [
        (9, "sounds right #release #v1.0", ["release", "v1.0"], True)
    ]
    assert main(["note", str(step), ""]) == 0
    assert not (step / names.NOTE).exists()


def test_a_note_without_a_step_and_a_list_without_a_run_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["note"]) == 2
    assert main(["note", str(run.parent / "base"), "text"]) == 2
    assert main(["list", str(run.parent / "base")]) == 2
    assert main(["list", str(run / "nothing")]) == 2
    assert capsys.readouterr().err.count("error:") == 4


def test_a_tag_is_a_word_that_begins_with_a_hash() -> None:
    assert tags_of("# heading\n#one two#three #four, (#five) #one") == ["one", "four"]
