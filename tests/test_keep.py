"""Which checkpoints of a run stay (YARDSTICK F09): `--train.keep` and `--train.keep_states`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_samples import add_step, copy
from crashing_disk import Disk, in_child
from test_saving import talker, weights_of, words

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.note import write_note
from litlora.checkpoint.resolve import list_steps, newest_resumable
from litlora.checkpoint.run import drop_old_states, drop_old_steps, kept_number, prepare_run_directory
from litlora.errors import UserError

LOSSES = {8: 2.0, 9: 1.0, 10: 1.5, 11: 1.0, 12: None, 100: 1.2}  # 11 is the best: of equal ones the newest

__all__ = ["talker"]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, whose files are newest where the step is oldest."""
    run = tmp_path_factory.mktemp("keep") / "out"
    for age, (step, loss) in enumerate(LOSSES.items()):
        path = add_step(run, step, val_loss=loss)
        for entry in (path, *path.iterdir()):
            os.utime(entry, (2_000_000_000 - age, 2_000_000_000 - age))
    return run


def numbers(run: Path) -> list[int]:
    return [step.number for step in list_steps(run) if step.is_whole]


@pytest.mark.parametrize(
    ("text", "kept"),
    [("all", [8, 9, 10, 11, 12, 100]), ("1", [11, 100]), ("best", [11, 100]), ("last", [11, 100]), ("best,last,3", [11, 12, 100])],
)
def test_the_newest_by_number_and_the_best_stay(six: Path, tmp_path: Path, text: str, kept: list[int]) -> None:
    """F09: step-9 is older than step-10 and step-100, whatever the clock said when they were written."""
    run = copy(six, tmp_path / "out")
    number = kept_number(text, "--train.keep", ("best", "last"))
    dropped = drop_old_steps(run, number, []) if number is not None else []
    assert numbers(run) == kept
    assert sorted([*kept, *(names.step_number(path) or 0 for path in dropped)]) == list(LOSSES)
    assert sorted(path.name for path in run.iterdir()) == sorted(names.step_name(step) for step in kept)


@pytest.mark.parametrize("text", ["", "0", "-1", "newest", "3,0", "best;last", "all,3", "1.5"])
def test_what_does_not_say_what_stays_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="does not say what stays"):
        kept_number(text, "--train.keep", ("best", "last"))
    with pytest.raises(UserError, match="does not say what stays"):
        kept_number("best", "--train.keep_states")


def note(step: Path) -> None:
    write_note(step, "#release")


def merge(step: Path) -> None:
    (step / names.MERGED).mkdir()
    (step / names.MERGED / names.MERGE_REPORT).write_text("{}")


def merging(step: Path) -> None:
    (step / names.temporary_name(names.MERGED, os.getpid())).mkdir()


def foreign(step: Path) -> None:
    (step / "notes.txt").write_text("mine")


def linked(step: Path) -> None:
    elsewhere = step.rename(step.parent.parent / "elsewhere")
    step.symlink_to(elsewhere)


def torn(step: Path) -> None:
    (step / names.MANIFEST).write_bytes(b"{")


@pytest.mark.parametrize("reason", [note, merge, merging, foreign, linked, torn])
def test_what_is_worth_more_than_its_number_stays(six: Path, tmp_path: Path, reason: Callable[[Path], None]) -> None:
    """F09: and everything in it. Mutations: deleting what --overwrite would delete; deleting what a link points at."""
    run = copy(six, tmp_path / "out")
    reason(run / "step-9")
    before = sorted(path.name for path in (run / "step-9").iterdir())
    drop_old_steps(run, 1, [])
    assert sorted(path.name for path in run.iterdir()) == ["step-100", "step-11", "step-9"]
    assert sorted(path.name for path in (run / "step-9").iterdir()) == before


def test_what_a_run_began_with_stays(six: Path, tmp_path: Path) -> None:
    """F09: however its path is written. What stands beside the steps is nobody's business."""
    run = copy(six, tmp_path / "out")
    for name in (names.RUN_YAML, "mine.txt", "step-8.torn", "step-008", "step-x"):
        (run / name).mkdir() if name.startswith("step") else (run / name).touch()
    drop_old_steps(run, 2, [Path(os.path.relpath(run / "step-10"))])
    assert numbers(run) == [10, 11, 12, 100]
    assert {names.RUN_YAML, "mine.txt", "step-8.torn", "step-008", "step-x"} <= {path.name for path in run.iterdir()}


def test_a_crash_at_any_moment_of_commit_and_deletion_leaves_whole_steps(six: Path, tmp_path: Path) -> None:
    """F09: no step is ever half-deleted under its own name, the best and the newest are there, and the next start removes the rest.

    Mutation: deleting without renaming first.
    """
    calls, k = 1000, 0
    while (k := k + 1) <= calls + 1:
        run = copy(six, tmp_path / f"{k}" / "out")

        def work(say: Callable[[str], None], run: Path = run, k: int = k) -> None:
            disk = Disk(run.parent, k)
            disk.install()
            add_step(run, 101, val_loss=3.0)
            say("COMMITTED ")
            drop_old_steps(run, 1, [])
            say(str(len(disk.calls)))

        code, said = in_child(work)
        if code == 0:
            calls = int(said.split()[1])
        assert code in (0, 137), said
        steps = list_steps(run)
        assert all(step.is_resumable for step in steps), k
        assert {11} <= {step.number for step in steps}
        newest, passed = newest_resumable(run)
        assert newest is not None and not passed and newest.number == (101 if said.startswith("COMMITTED") else newest.number) >= 100
        (run / names.RUN_YAML).touch()
        prepare_run_directory(run, resume=True).close()
        assert not list(run.glob(".*"))
    assert calls > 40, "nothing was tried"


def test_old_training_states_go_and_their_steps_stay_whole(six: Path, tmp_path: Path) -> None:
    run = copy(six, tmp_path / "out")
    drop_old_states(run, 2)
    assert [step.number for step in list_steps(run) if step.is_resumable] == [12, 100]
    assert numbers(run) == list(LOSSES)


# ---- by the command --------------------------------------------------------------------------------------------------


def test_a_run_keeps_what_was_asked_for(talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F09: after every commit, with the weights of a run that keeps everything; what a resumed run goes on from stays too."""
    whole, few = tmp_path / "whole", tmp_path / "few"
    more = "--train.save_interval 1 --eval.interval 1"
    assert main(words(talker, whole, more=more)) == 0
    losses = {step.number: step.manifest.val_loss for step in list_steps(whole) if step.manifest and step.manifest.val_loss}
    assert len(losses) == 12

    def best(of: list[int]) -> int:
        return min(of, key=lambda number: (losses[number], -number))

    assert (
        main(
            words(
                talker, few, more=f"{more} --train.keep best,last,2 --train.keep_states 1 --train.max_steps 7 --train.lr_schedule constant"
            )
        )
        == 0
    )
    capsys.readouterr()
    kept = numbers(few)
    assert {6, 7} <= set(kept) and len(kept) <= 3
    assert [step.number for step in list_steps(few) if step.is_resumable] == [7]
    assert main(["finetune", "lora", "--resume", "--out_dir", str(few), "--train.max_steps", "12"]) == 0
    assert {7, 11, 12} <= set(numbers(few)) and len(numbers(few)) <= 4
    again = tmp_path / "again"
    assert main(words(talker, again, more=f"{more} --train.keep 1")) == 0
    assert numbers(again) == sorted({12, best(list(losses))})
    assert weights_of(again / "step-12") == weights_of(whole / "step-12")
    assert main(words(talker, tmp_path / "none", more="--train.keep some")) == 2
    assert "does not say what stays" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_what_cannot_be_deleted_is_told_and_training_goes_on(
    talker: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint too many is no reason to lose the run."""
    from litlora.train import run

    def denied(*args: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", "step-4")

    monkeypatch.setattr(run, "drop_old_steps", denied)
    assert main(words(talker, tmp_path / "out", more="--train.keep 1")) == 0
    assert "an old checkpoint could not be deleted: Permission denied: step-4" in capsys.readouterr().err
    assert numbers(tmp_path / "out") == [4, 8, 12]
