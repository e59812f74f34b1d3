"""`litlora note`: the user's own words about a checkpoint, and the tags in them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from talkers import make_step, make_talker

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.note import first_line, read_note, tags_of
from litlora.checkpoint.resolve import read_step


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps; step-9 is its best."""
    base = make_talker(tmp_path / "base")
    for step, loss in ((9, 0.4), (10, 0.5)):
        make_step(tmp_path / "out", step, base, val_loss=loss)
    return tmp_path / "out"


def test_notes_are_kept_shown_and_taken_away_and_never_tear_a_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A note is the user's own: it is not hashed, and the step stays whole. list and inspect show it."""
    step = run / "step-9"
    assert main(["note", str(step), "sounds right #release #v1.0"]) == 0
    assert main(["note", str(step), "second thought", "--append"]) == 0
    capsys.readouterr()
    assert main(["note", str(step)]) == 0
    assert capsys.readouterr().out == "sounds right #release #v1.0\nsecond thought\n"
    assert read_step(step).is_whole
    assert main(["list", str(run), "--json", "--tag", "#release"]) == 0
    rows = json.loads(capsys.readouterr().out)["steps"]
    assert [(one["step"], one["note"], one["tags"]) for one in rows] == [(9, "sounds right #release #v1.0", ["release", "v1.0"])]
    assert main(["inspect", str(step), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["note"], found["tags"]) == ("sounds right #release #v1.0\nsecond thought", ["release", "v1.0"])
    assert main(["note", str(step), ""]) == 0
    assert not (step / names.NOTE).exists()
    assert read_step(step).is_whole and read_note(step) == ""


def test_a_run_means_its_best_step_and_which_that_was_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, step, why in (
        ("", "step-9", "lowest validation loss"),
        ("best", "step-9", "lowest validation loss"),
        ("last", "step-10", "newest"),
    ):
        assert main(["note", str(run / path), f"of {path}"]) == 0
        shown = capsys.readouterr()
        assert shown.out == f"{run / step}\n"
        assert f"{run / step}: {why}" in shown.err
        assert read_note(run / step) == f"of {path}".strip()


def test_a_note_about_nothing_or_about_no_step_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["note"]) == 2
    assert main(["note", str(run.parent / "base"), "text"]) == 2
    assert main(["note", str(run / "step-11"), "text"]) == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 3 and "did you mean" in told


def test_a_tag_is_a_word_that_begins_with_a_hash() -> None:
    assert tags_of("# heading\n#one two#three #four, (#five) #one ## #. #six.") == ["one", "four", "six"]


@given(st.text())
def test_any_text_is_a_note(text: str) -> None:
    """YARDSTICK Z01: tags never hold a hash or a space, each is there once, and a first line is one line."""
    tags = tags_of(text)
    assert len(tags) == len(set(tags)) and not any("#" in tag or tag.split() != [tag] for tag in tags)
    assert len(first_line(text.strip()).splitlines()) <= 1
