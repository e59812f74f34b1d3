"""Commits beside training: what a step holds, when it is said to be committed, and what becomes of one that fails (YARDSTICK F05)."""

import concurrent.futures
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from lightning_fabric import Fabric
from talkers import make_talker

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.resolve import list_steps
from litlora.errors import Interrupted, WorkError
from litlora.train import loop, run, saving
from litlora.train.metrics import read
from litlora.train.plan import Position
from litlora.train.saving import Commit, Prepared, Saver

METHODS = {  # whose steps are made in different ways: a file of PEFT's, what lies beside it exactly, a whole model
    "lora": "lora --lora.r 4 --lora.dropout 0.1",
    "pissa": "lora --lora.r 4 --lora.init pissa",
    "full": "full",
}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, rows): a tiny base and rows for it."""
    place = tmp_path_factory.mktemp("talker")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Name a colour, {n}.", "output": "blue" * (n % 4 + 1)}) + "\n" for n in range(24)))
    return make_talker(place / "base"), rows


def words(talker: tuple[Path, Path], out: Path, method: str = "lora", more: str = "") -> list[str]:
    base, rows = talker
    text = f"finetune {METHODS[method]} --checkpoint_dir {base} --data {rows} --out_dir {out} --train.global_batch_size 2 --train.lr 1e-3"
    text += " --train.max_steps 12 --train.save_interval 4 --eval.interval 0 --eval.fraction 0.2 --threads 1 --accelerator cpu"
    return f"{text} {more}".split()


def weights_of(step: Path) -> dict[str, bytes]:
    """All that training made in a step."""
    found = (names.ADAPTER_WEIGHTS, names.OWN_ADAPTER_WEIGHTS, names.WEIGHTS, names.TRAINING_STATE)
    return {name: (step / name).read_bytes() for name in found if (step / name).exists()}


# ---- by the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_step_holds_its_own_values_however_long_its_commit_takes(
    talker: tuple[Path, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """F05: each commit is held back until training has taken three more steps; every byte is that of a run that waits for its commits.

    Caught: handing over views of the weights, or of the optimizer's state.
    """
    waiting, beside = tmp_path / "waiting", tmp_path / "beside"
    with monkeypatch.context() as patch:
        patch.setattr(run, "free_memory", lambda: 0)
        assert main(words(talker, waiting, method)) == 0

    taken = threading.Condition()
    steps = 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal steps
        result = train_step(*args, **more)
        with taken:
            steps += 1
            taken.notify_all()
        return result

    def late(place: Path, manifest: Any, **more: Any) -> Any:
        with taken:
            assert taken.wait_for(lambda: steps >= min(12, manifest.step + 3), timeout=60)
        return commit_step(place, manifest, **more)

    train_step, commit_step = loop.train_step, run.commit_step
    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(run, "commit_step", late)
    capsys.readouterr()
    assert main(words(talker, beside, method)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("COMMITTED")]
    assert [line.split()[1] for line in said] == ["step=4", "step=8", "step=12"]
    for number in (4, 8, 12):
        assert weights_of(beside / names.step_name(number)) == weights_of(waiting / names.step_name(number))
    assert weights_of(beside / "step-4") != weights_of(beside / "step-8")


@pytest.mark.parametrize("failing", [4, 12])
def test_a_commit_that_fails_ends_the_run_at_the_next_step(
    talker: tuple[Path, Path], tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """F05, F07: exit code 1 and the error's own words, from the thread that writes; what was committed before is there.

    Caught: looking at commits only when the next one is due; not waiting for the last one.
    """
    commit_step, look = run.commit_step, Saver.look

    def full(place: Path, manifest: Any, **more: Any) -> Any:
        if manifest.step == failing:
            assert threading.current_thread() is not threading.main_thread()
            raise WorkError("the disk is full: 10 bytes needed, 9 free")
        return commit_step(place, manifest, **more)

    def patient(self: Saver) -> bool:
        concurrent.futures.wait([self.flight[2]] if self.flight else [])
        return look(self)

    monkeypatch.setattr(run, "commit_step", full)
    monkeypatch.setattr(Saver, "look", patient)
    assert main(words(talker, tmp_path / "out")) == 1
    said = capsys.readouterr()
    assert "error: the disk is full: 10 bytes needed, 9 free" in said.err and not said.out
    assert f"COMMITTED step={failing}" not in said.err
    assert [step.number for step in list_steps(tmp_path / "out")] == list(range(4, failing, 4))
    assert read(tmp_path / "out" / names.METRICS)[-1]["step"] == str(min(12, failing))


@pytest.mark.parametrize(("ending", "code", "shown"), [("signal", 1, "disk is full"), ("nan", 1, "the loss is nan at step 6")])
def test_however_a_run_ends_it_waits_for_the_commit_on_its_way(
    talker: tuple[Path, Path], tmp_path: Path, ending: str, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """F05, F10, F16: the step that a signal asked for fails: that is no 143. A loss that is not finite names the last step that is durable,
    and the failed commit is told beside it.
    """
    commit_step, train_step = run.commit_step, loop.train_step
    gate = threading.Event()

    def full(place: Path, manifest: Any, **more: Any) -> Any:
        gate.wait(60)
        if manifest.step > 4 or ending == "nan":
            raise WorkError("the disk is full")
        return commit_step(place, manifest, **more)

    taken = 0

    def spoilt(*args: Any, **more: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 6:
            if ending == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.3, gate.set).start()
        result = train_step(*args, **more)
        return result._replace(loss=float("nan")) if taken == 6 and ending == "nan" else result

    monkeypatch.setattr(run, "commit_step", full)
    monkeypatch.setattr(loop, "train_step", spoilt)
    assert main(words(talker, tmp_path / "out")) == code
    said = capsys.readouterr().err
    assert shown in said and said.count("error:") == 1
    if ending == "nan":
        assert "nothing was committed yet" in said and "not committed either: the disk is full" in said
    assert [step.number for step in list_steps(tmp_path / "out")] == ([4] if ending == "signal" else [])


# ---- the saver alone -------------------------------------------------------------------------------------------------


def commit_of(step: int) -> Commit:
    return Commit(position=Position(step=step), loss=1.0, val_loss=None)


@pytest.fixture
def one() -> Any:
    return Fabric(accelerator="cpu", devices=1, precision="32-true")


def test_one_commit_is_on_its_way_at_a_time_and_is_said_once_it_is_durable(one: Any) -> None:
    """DESIGN section 3. Caught: saying it when it is begun; not waiting for the earlier one."""
    said, events, gate = list[str](), list[str](), threading.Event()

    def prepare(commit: Commit) -> Prepared:
        step = commit.position.step
        events.append(f"copied {step}")

        def write() -> None:
            gate.wait(60)
            events.append(f"written {step}")

        return Prepared(write=write)

    with Saver(one, prepare, 0, said.append) as saver:
        saver.save(commit_of(1))
        assert not saver.look() and not said and events == ["copied 1"]
        threading.Timer(0.2, gate.set).start()
        saver.save(commit_of(2))
        assert events[:3] == ["copied 1", "written 1", "copied 2"] and said == ["COMMITTED step=1"]
        assert saver.newest() == 2
    assert said == ["COMMITTED step=1", "COMMITTED step=2"]


def test_what_is_old_goes_only_after_the_new_step_was_said_to_be_there(
    talker: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DESIGN section 3, F09: by the command, at each deletion. Caught: deleting in the commit itself, which is said when it is over."""
    drop, said, dropped = run.drop_old_steps, "", list[str]()

    def watched(place: Path, *more: Any, **named: Any) -> Any:
        nonlocal said
        said += capsys.readouterr().err
        newest = list_steps(place)[-1].number
        assert threading.current_thread() is not threading.main_thread()
        dropped.append(f"{newest} {said.count(f'COMMITTED step={newest}')}")
        return drop(place, *more, **named)

    monkeypatch.setattr(run, "drop_old_steps", watched)
    assert main(words(talker, tmp_path / "out", more="--train.keep 1")) == 0
    assert dropped == ["4 1", "8 1", "12 1"]
    assert [step.number for step in list_steps(tmp_path / "out")] == [12]


@pytest.mark.parametrize("failing", [1, 2])
def test_what_fails_after_a_commit_is_not_lost_unsaid(one: Any, failing: int) -> None:
    """The step it came after is durable, and was said. Caught: not looking at it before the next commit, or at the end."""
    said, written = list[str](), list[int]()

    def prepare(commit: Commit) -> Prepared:
        step = commit.position.step

        def after() -> None:
            if step == failing:
                raise OSError("the cable is out")

        return Prepared(write=lambda: written.append(step), after=after)

    def work() -> None:
        with Saver(one, prepare, 0, said.append) as saver:
            for step in (1, 2):
                saver.save(commit_of(step))

    with pytest.raises(OSError, match="the cable is out"):
        work()
    assert written == [1, 2][:failing] and said == ["COMMITTED step=1", "COMMITTED step=2"][:failing]


def test_what_is_not_copied_is_written_before_training_goes_on(one: Any) -> None:
    """A whole model may be too large to copy. Caught: handing it over all the same."""
    said, written = list[str](), list[int]()

    def prepare(commit: Commit) -> Prepared:
        return Prepared(write=lambda: time.sleep(0.1) or written.append(commit.position.step), in_background=False)  # type: ignore[func-returns-value]

    with Saver(one, prepare, 0, said.append) as saver:
        saver.save(commit_of(1))
        assert written == [1] and said == ["COMMITTED step=1"]


def test_the_first_error_is_the_one_that_is_reported(one: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """And the commit that fails beside it is told, not lost."""

    def prepare(commit: Commit) -> Prepared:
        def write() -> None:
            raise OSError("the cable is out")

        return Prepared(write=write)

    def work() -> None:
        with Saver(one, prepare, 0, lambda text: None) as saver:
            saver.save(commit_of(1))
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        work()
    assert "the cable is out" in capsys.readouterr().err


def test_what_cannot_be_prepared_is_raised_at_once(one: Any) -> None:
    """And leaves nothing on its way."""

    def prepare(commit: Commit) -> Prepared:
        raise WorkError("nothing changed")

    with Saver(one, prepare, 3, lambda text: None) as saver:
        with pytest.raises(WorkError, match="nothing changed"):
            saver.save(commit_of(4))
        assert saver.newest() == 3


def test_free_memory_is_a_number_of_bytes_that_can_be_had() -> None:
    free = saving.free_memory()
    assert 2**20 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_a_container_may_take_counts_and_pages_of_files_do_not(tmp_path: Path) -> None:
    """Also where the limit is that of a group further in or out (a batch system's job). Caught: the machine's memory alone; counting
    the cache as taken, so that a full one would end copying for ever; looking at the outermost group alone.
    """
    system, groups, own = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "own"
    free = functools.partial(saving.free_memory, system, groups, own)
    system.write_text("MemTotal:       64000000 kB\nMemAvailable:   32000000 kB\n")
    inside = groups / "job.slice" / "step"
    inside.mkdir(parents=True)
    for place, group in (("0::/\n", groups), ("0::/job.slice/step\n", inside), ("12:cpu:/\n0::/job.slice/step\n", groups / "job.slice")):
        own.write_text(place)
        assert free() == 32_000_000 * 1024
        (group / "memory.max").write_text("1000000\n")
        (group / "memory.current").write_text("900000\n")
        (group / "memory.stat").write_text("anon 100000\nfile 800000\nactive_file 300000\ninactive_file 400000\nshmem 100000\n")
        assert free() == 800_000
        (group / "memory.current").write_text("1800000\n")
        assert free() == 0
        (group / "memory.max").write_text("max\n")
        assert free() == 32_000_000 * 1024
    assert saving.free_memory(tmp_path / "none", groups, own) > 2**20


# ---- killed in the middle --------------------------------------------------------------------------------------------

IN_COMMIT = """
import os, signal, sys, threading, time
import litlora.checkpoint.commit as commit
from litlora.__main__ import main

fatal, sync, seen = int(sys.argv[1]), commit.sync, 0

def slow(path):
    global seen
    if threading.current_thread() is not threading.main_thread():
        seen += 1
        if seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if fatal < 0:
            print("writing", flush=True)
            time.sleep(60)
    sync(path)

commit.sync = slow
sys.exit(main(sys.argv[2:]))
"""


def start(fatal: int, typed: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IN_COMMIT, str(fatal), *typed]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_kill_9_inside_a_commit_beside_training_loses_that_step_alone(talker: tuple[Path, Path], tmp_path: Path) -> None:
    """F04, R01: at some fsync of the first and of the second commit; what is resumed ends with the uninterrupted run's bits."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(words(talker, whole)) == 0
    files = len(list((whole / "step-4").iterdir()))
    typed = words(talker, broken)
    for fatal, left in ((2, []), (files + 2 + 3, [4])):  # a commit syncs its files, its directory and the run
        process = start(fatal, typed)
        _, said = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, said
        assert [step.number for step in list_steps(broken) if step.is_resumable] == left
        typed = ["finetune", "lora", "--resume", "--out_dir", str(broken)]
    assert main(typed) == 0
    assert all(step.is_whole for step in list_steps(broken)) and not list(broken.glob(".tmp-*"))
    for number in (8, 12):
        assert weights_of(broken / names.step_name(number)) == weights_of(whole / names.step_name(number))
    kept = [[row[name] for name in ("step", "loss", "lr", "grad_norm")] for row in read(broken / names.METRICS)]
    assert kept == [[row[name] for name in ("step", "loss", "lr", "grad_norm")] for row in read(whole / names.METRICS)]


def test_a_second_signal_leaves_at_once_and_nothing_torn(talker: tuple[Path, Path], tmp_path: Path) -> None:
    """F10: the first waits for the commit, whose disk hangs here; the second does not."""
    out = tmp_path / "out"
    process = start(-1, words(talker, out))
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not list_steps(out)
