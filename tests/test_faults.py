"""Faults by the real commands in real processes: a few trials of each here, all of them with `-m slow` (YARDSTICK F01 to F17, L07).

The trials themselves are in `extensions/reliability`; what a single commit must bear is in test_commit.py. LITLORA_TRIALS sets how many
the slow ones make.
"""

import io
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import litlora
from extensions.reliability import alterations, others, runs, writers
from extensions.reliability.place import Place, make_place, scratch, temporaries
from extensions.reliability.processes import Server
from extensions.reliability.writers import WRITERS, Writer
from litlora.checkpoint import names
from litlora.checkpoint.resolve import list_steps
from litlora.errors import Interrupted
from litlora.train.signals import Signals

TRIALS = int(os.environ.get("LITLORA_TRIALS", "200"))
LOSSES = pytest.mark.parametrize("lose", [None, "all", 1], ids=["process", "power", "power-in-part"])
AS_NOBODY = pytest.mark.skipif(  # root ignores modes, so root becomes nobody, who must be able to read the code
    os.getuid() == 0 and not all(place.stat().st_mode & 0o001 for place in Path(litlora.__file__).parents),
    reason="run as root from a directory that nobody else may enter",
)
EACH = pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the trials read /proc")


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    path = scratch()
    with Server() as server:
        yield make_place(path, server)
    shutil.rmtree(path)


# ---- F01, F02 --------------------------------------------------------------------------------------------------------


def some_points(place: Place, number: int, *more: str) -> list[int]:
    """So many calls of a run, spread over it."""
    root = place.fresh("crash")
    calls = runs.calls_of(place, place.finetune(root / "out", runs.STEPS, *more), root)
    return [1 + calls * k // number + k % 7 for k in range(number)]


@LOSSES
def test_a_run_that_crashes_anywhere_keeps_what_was_committed_and_resumes_to_the_same_bits(place: Place, lose: int | str | None) -> None:
    """F01, F02, R01. Caught: run.yaml written after metrics.csv; metrics that are not synced before their step is committed."""
    runs.crashes(place, lose, some_points(place, 2)).assert_none()


def test_a_power_cut_after_the_end_takes_nothing(place: Place) -> None:
    """F02: with `all` lost that was not synced."""
    runs.crashes(place, "all", [0]).assert_none()


def test_a_crash_while_old_steps_are_deleted_leaves_whole_ones(place: Place) -> None:
    """F09: between the commit and the end of the deletion, at several points."""
    runs.crashes(place, "all", some_points(place, 2, "--train.keep", "1"), "", "--train.keep", "1").assert_none()


@pytest.mark.slow
@LOSSES
@pytest.mark.parametrize("more", [(), ("--train.keep", "1")], ids=["all", "keep 1"])
def test_a_run_that_crashes_at_any_of_its_calls_loses_nothing(place: Place, lose: int | str | None, more: tuple[str, ...]) -> None:
    """F01, F02, F09: every call to the disk of a whole run, retention included."""
    runs.crashes(place, lose, None, "", *more).assert_none()


@pytest.mark.parametrize("what", runs.SYNCED)
def test_leaving_out_any_one_fsync_of_a_run_is_noticed(place: Place, what: str) -> None:
    """F02, must catch: the trials above see a loss when this one fsync is removed."""
    assert runs.crashes(place, "all", [0], runs.SYNCED[what]).losses


@pytest.mark.slow
@EACH
def test_leaving_out_any_one_fsync_of_a_command_is_noticed(place: Place, writer: Writer) -> None:
    """F02, must catch, for merges, notes, deeper and extended models."""
    for pattern in writer.synced:
        assert writers.crashes(place, writer, "all", [0], pattern).losses, pattern


@EACH
def test_what_a_command_writes_is_whole_or_not_there_after_a_crash(place: Place, writer: Writer) -> None:
    """F01, F02 for the other writers: old or new, and the same command makes it again."""
    writers.crashes(place, writer, "all", share=23).assert_none()


@pytest.mark.slow
@EACH
@LOSSES
def test_what_a_command_writes_is_whole_after_a_crash_at_any_call(place: Place, writer: Writer, lose: int | str | None) -> None:
    """F01, F02."""
    writers.crashes(place, writer, lose).assert_none()


# ---- F03 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_every_altered_file_is_found_and_named(place: Place, seeds: int) -> None:
    """F03. Caught: a merge's report without a hash of its own."""
    alterations.of_a_step(place, seeds).assert_none()
    alterations.of_a_merged_model(place, seeds).assert_none()


@pytest.mark.parametrize("files", [1, pytest.param(99, marks=pytest.mark.slow)])
def test_the_commands_refuse_an_altered_step_and_fall_back_in_its_run(place: Place, files: int) -> None:
    """F03: verify, inspect, generate, evaluate, merge_lora, convert, combine, diff, list and --resume."""
    alterations.by_the_commands(place, files).assert_none()


@pytest.mark.parametrize("files", [1, pytest.param(99, marks=pytest.mark.slow)])
def test_no_command_meets_a_bad_file_of_a_merged_model_with_a_bug(place: Place, files: int) -> None:
    """F03: verify, inspect, generate and convert."""
    alterations.merged_by_the_commands(place, files).assert_none()


# ---- F04, L07 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "inside"), [(3, 1), pytest.param(TRIALS, TRIALS // 4, marks=pytest.mark.slow)])
def test_kill_9_in_and_between_commits_loses_nothing(place: Place, count: int, inside: int) -> None:
    """F04: `inside` kills and more land while the commit thread writes. What is left resumes to an undisturbed run's bits."""
    tally = runs.kills(place, count, inside, steps=16 if count < 10 else 120)
    tally.assert_none()
    assert tally.notes["inside a commit"] >= inside


@pytest.mark.slow
@EACH
def test_kill_9_in_a_command_loses_nothing(place: Place, writer: Writer) -> None:
    """F04."""
    writers.kills(place, writer, TRIALS // 8).assert_none()


@pytest.mark.slow
def test_a_long_run_that_is_killed_again_and_again_stays_small_and_exact(place: Place) -> None:
    """L07: final weights equal to the bit, the disk bounded by what is kept, memory level. LITLORA_SOAK sets the steps."""
    steps = int(os.environ.get("LITLORA_SOAK", "2000"))
    more = ("--train.keep", "3", "--train.save_interval", "20", "--eval.interval", "100")
    tally = runs.kills(place, max(10, TRIALS // 10), 0, steps, 7, *more)
    tally.assert_none()
    from litlora.train.metrics import read

    undisturbed = place.undisturbed(steps, *more)
    assert len(list_steps(undisturbed)) <= 3 + 1  # and the best
    memory = [float(row["memory_mb"]) for row in read(undisturbed / names.METRICS)]
    assert memory[-1] - memory[len(memory) // 4] < max(1.0, steps / 1000) * 2, "memory grows"


# ---- F07, F08 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, pytest.param(TRIALS // 4, marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_with_its_bytes_and_takes_nothing(place: Place, count: int) -> None:
    """F07: RLIMIT_FSIZE, and disks that are full before or become full. Caught: a probe file left where nothing can be written."""
    runs.file_limits(place, count).assert_none()
    others.full_disks(place, count).assert_none()


@EACH
def test_a_full_disk_ends_a_command_with_its_bytes_and_takes_nothing(place: Place, writer: Writer) -> None:
    """F07."""
    writers.file_limits(place, writer, 2).assert_none()


def test_a_full_disk_for_the_metrics_costs_one_warning(place: Place) -> None:
    """F07: a logger is not the run."""
    others.full_logs(place).assert_none()


def test_a_run_whose_words_nobody_hears_is_taken_to_its_end(place: Place) -> None:
    """F07. Caught: a reader that went away (`2>&1 | head`) ended the run with exit code 0, a terminal that went away with 1, a full disk of
    the log with 1 and no word, and a closed standard error with a bug's message before it began."""
    others.unwritable_outputs(place).assert_none()


@AS_NOBODY
def test_a_place_that_cannot_be_written_to_is_refused_before_a_model_is_loaded(place: Place) -> None:
    """F08, for the real command without root's privileges."""
    others.closed_places(place).assert_none()


@AS_NOBODY
@EACH
def test_a_command_never_reports_success_where_it_may_not_write(place: Place, writer: Writer) -> None:
    """F08."""
    writers.read_only(place, writer).assert_none()


# ---- F10, F16, F17 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, pytest.param(TRIALS // 2, marks=pytest.mark.slow)])
def test_signals_at_any_time_end_in_a_commit_and_resume_to_the_same_bits(place: Place, count: int) -> None:
    """F10: before training, in steps, validations and commits; a second one ends it at once, and nothing is torn."""
    runs.signals(place, count, steps=10 if count < 10 else 24, within=60).assert_none()


def test_a_signal_in_the_middle_of_a_print_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """F10. Caught, once in a hundred signals: "reentrant call inside BufferedWriter" ended the run with exit code 1 and no commit."""

    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call")

    monkeypatch.setattr("sys.stderr", Busy())
    signals = Signals()
    signals.training = True
    signals.receive(signal.SIGINT, None)
    assert signals.asked() == (True, False)


def test_a_signal_before_training_that_torch_takes_for_an_error_of_its_own_ends_the_run_as_asked() -> None:
    """F10. Caught, twice in a hundred signals: "ValueError: could not determine the shape of object type" and exit code 1."""
    signals = Signals()

    def swallow() -> None:
        with signals:
            try:
                signals.receive(signal.SIGTERM, None)
            except Interrupted:
                raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    with pytest.raises(Interrupted) as caught:
        swallow()
    assert caught.value.exit_code == 143
    assert "no step was under way" in caught.value.message  # Caught: a run that ended without a word
    with pytest.raises(ValueError, match="its own"), Signals():
        raise ValueError("an error of its own")


def test_values_that_are_not_finite_are_never_committed(place: Place) -> None:
    """F16."""
    others.broken_values(place).assert_none()


def test_a_second_trainer_is_refused_and_a_killed_ones_lock_is_taken_over(place: Place) -> None:
    """F17. Two that begin in the same moment: one trains."""
    others.two_trainers(place, 1).assert_none()


def test_the_trials_can_fail(place: Place) -> None:
    """What judges a run sees a torn step, a lost one, a wrong result and leftovers, each made on purpose."""
    run = place.fresh("spoilt") / "out"
    shutil.copytree(place.undisturbed(runs.STEPS), run)
    tally = runs.Tally("spoilt")
    runs.judge(tally, run, runs.STEPS, "")
    tally.assert_none()
    (run / ".tmp-step-9-999999999").mkdir()
    assert temporaries(run)
    path = run / names.step_name(runs.STEPS) / names.ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    runs.judge(tally, run, runs.STEPS, "")
    assert tally.losses == {"torn": 1, "lost": 1}
    shutil.rmtree(run / names.step_name(runs.STEPS))
    metrics = run / names.METRICS
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-3]))
    runs.go_on(tally, place, run, [], runs.STEPS, "")
    assert tally.losses["differs"] == 1, "two rows of the metrics are missing for good"
