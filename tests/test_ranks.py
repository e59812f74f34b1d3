"""Two processes that train together (gloo, CPU): one is late, is killed, gets a signal, meets a NaN or an error, and the other knows.

YARDSTICK F06, F10, F11, F12, F16, N14, R05. The processes are real ones, forked from one that has imported what takes long; what is done to
them is patched in by rank. (Through Fabric's own launcher: test_commands.py, and the last test here.)
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from talkers import make_talker
from test_saving import weights_of, words

from litlora.checkpoint import names
from litlora.checkpoint.resolve import list_steps, read_step
from litlora.train.metrics import read
from litlora.train.ranks import over_ranks

PROCESSES = """
import json, math, os, signal, sys, time
import lightning_fabric, torch, torch.distributed, litlora.commands.finetune  # nothing was computed, so each fork is a fresh process
from litlora.__main__ import main
from litlora.train import loop, saving

torch.set_num_threads(1)

def run(rank, case):
    log = os.open(f"{case['log']}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    if case["ranks"] > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(case["port"])}
    exec(case["patches"].get(str(rank), ""), globals())
    code = main(case["words"])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    case, children, codes = json.loads(line), {}, {}
    for rank in range(case["ranks"]):
        children[rank] = os.fork()
        if children[rank] == 0:
            run(rank, case)
    if case["signal"]:
        while not os.path.getsize(f"{case['log']}-0"):
            time.sleep(0.002)
        time.sleep(case["after"])
        os.kill(children[0], case["signal"])
    began = time.monotonic()
    while len(codes) < len(children):
        for rank, child in children.items():
            pid, status = (0, 0) if rank in codes else os.waitpid(child, os.WNOHANG)
            if pid:
                codes[rank] = os.waitstatus_to_exitcode(status)
            elif rank not in codes and time.monotonic() - began > 60:
                os.kill(child, signal.SIGKILL)
                codes[rank] = "hangs"
        time.sleep(0.005)
    print(json.dumps([codes[rank] for rank in sorted(codes)]), flush=True)
"""

AT_STEP = """
taken, train_step = 0, loop.train_step
def stepped(fabric, model, optimizer, batches, **more):
    global taken
    taken += 1
    before(taken, model)
    return after(taken, train_step(fabric, model, optimizer, batches, **more))
def before(step, model): pass
def after(step, result): return result
loop.train_step = stepped
"""

AT_SAVE = """
saves, save = 0, saving.Saver.save
def saved(self, commit):
    global saves
    saves += 1
    before(saves)
    save(self, commit)
saving.Saver.save = saved
"""


@dataclass
class Ranks:
    """Runs of one or two processes on a tiny base."""

    server: "subprocess.Popen[str]"
    place: Path
    talker: tuple[Path, Path]

    def run(
        self, typed: list[str], ranks: int = 2, patches: dict[int, str] | None = None, signalled: tuple[int, float] = (0, 0)
    ) -> list[Any]:
        """The exit code of each rank; `hangs` after a minute. `signalled`: (number, seconds), of a signal to the first."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        typed = [*typed, "--devices", str(ranks), "--strategy", "ddp" if ranks > 1 else "auto"]
        case = {"words": typed, "ranks": ranks, "patches": patches or {}, "port": port, "log": str(self.log)}
        case |= {"signal": signalled[0], "after": signalled[1]}
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(case) + "\n")
        self.server.stdin.flush()
        codes: list[Any] = json.loads(self.server.stdout.readline())
        return codes

    @property
    def log(self) -> Path:
        return self.place / "log"

    def said(self, rank: int) -> str:
        return Path(f"{self.log}-{rank}").read_text()

    def train(self, out: Path, more: str = "") -> list[str]:
        return words(self.talker, out, more=f"{more} --lora.dropout 0")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    place = tmp_path_factory.mktemp("ranks")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Name a colour, {n}.", "output": "blue" * (n % 4 + 1)}) + "\n" for n in range(24)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROCESSES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        yield Ranks(server, place, make_talker_of(place, rows))
        assert server.stdin is not None
        server.stdin.close()


def make_talker_of(place: Path, rows: Path) -> tuple[Path, Path]:
    return make_talker(place / "base"), rows


def steps_of(out: Path) -> list[int]:
    return [step.number for step in list_steps(out) if step.is_resumable]


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_no_commit_begins_before_all_ranks_have_reached_it(ranks: Ranks, tmp_path: Path) -> None:
    """F06: the second process is two seconds late; what it then finds in the run's directory decides. Mutation: writing before agreeing."""
    out = tmp_path / "out"
    early = f"[x for x in os.listdir({str(out)!r}) if 'step' in x]"
    late = f"{AT_SAVE}\ndef before(n):\n  if n == 1:\n    time.sleep(2)\n    if {early}: os._exit(99)"
    assert ranks.run(ranks.train(out), patches={1: late}) == [0, 0], ranks.said(0)
    assert steps_of(out) == [4, 8, 12]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_a_save_ends_the_other_and_the_earlier_checkpoint_is_good(ranks: Ranks, tmp_path: Path, victim: int) -> None:
    """F06: within a minute, with an exit code that is not 0. A resumed run goes on from there."""
    out = tmp_path / "out"
    killed = f"{AT_SAVE}\ndef before(n):\n  if n == 2: os.kill(os.getpid(), signal.SIGKILL)"
    codes = ranks.run(ranks.train(out), patches={victim: killed})
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, "hangs"), codes
    assert steps_of(out) in ([[4]] if victim else [[], [4]]) and "step-8" not in os.listdir(out)
    assert ranks.run(["finetune", "lora", "--resume", "--out_dir", str(out)]) == [0, 0], ranks.said(0)
    assert steps_of(out)[-2:] == [8, 12]


def test_a_commit_that_fails_ends_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """F05, F06: the first alone writes; the second exits 1 as it does, and says why."""
    out = tmp_path / "out"
    full = """
from litlora.train import run
from litlora.errors import WorkError
commit_step = run.commit_step
def failing(place, manifest, **more):
    if manifest.step == 8: raise WorkError("the disk is full")
    return commit_step(place, manifest, **more)
run.commit_step = failing
"""
    assert ranks.run(ranks.train(out), patches={0: full}) == [1, 1]
    assert "error: the disk is full" in ranks.said(0)
    assert "error: the first process could not commit a checkpoint" in ranks.said(1)
    assert steps_of(out) == [4]


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(ranks: Ranks, tmp_path: Path, number: int) -> None:
    """F11: it comes to the second process alone, in the sixth step, after which both stop. Who only heard of it exits 143."""
    out = tmp_path / "out"
    signalled = f"{AT_STEP}\ndef before(n, model):\n  if n == 6: os.kill(os.getpid(), {int(number)})"
    codes = ranks.run(ranks.train(out), patches={1: signalled})
    assert codes == [143, 128 + number], ranks.said(0)
    assert steps_of(out) == [4, 6]
    assert "--resume" in ranks.said(0)


def random_signals(ranks: Ranks, tmp_path: Path, count: int, seed: int) -> None:
    whole = tmp_path / "whole"
    more = "--train.max_steps 40 --eval.interval 3"
    assert ranks.run(ranks.train(whole, more), ranks=1) == [0], ranks.said(0)
    rng, interrupted = random.Random(seed), 0
    for turn in range(count):
        out, number = tmp_path / str(turn), rng.choice([signal.SIGTERM, signal.SIGINT])
        code = ranks.run(ranks.train(out, more), ranks=1, signalled=(number, rng.uniform(0, 1.2)))[0]
        early = code == -number and not (out / names.RUN_YAML).exists()  # it came before there was anything to obey it
        assert code in (0, 128 + number) or early, ranks.said(0)
        interrupted += code != 0
        assert all(step.is_resumable for step in list_steps(out)) and (early or not list(out.glob(".tmp-*")))
        if code:
            begun = (out / names.RUN_YAML).exists()
            again = ["finetune", "lora", "--resume", "--out_dir", str(out)] if begun else ranks.train(out, more)
            assert ranks.run(again, ranks=1) == [0], ranks.said(0)
        assert not list(out.glob(".tmp-*")), "what a run left that was killed before it could obey"
        assert weights_of(out / "step-40") == weights_of(whole / "step-40")
        rows = [[(row["step"], row["loss"], row["lr"], row["val_loss"]) for row in read(each / names.METRICS)] for each in (out, whole)]
        assert rows[0] == rows[1]
    assert interrupted >= count // 3, "hardly any signal came in time: nothing was tried"


def test_a_signal_at_any_time_leaves_what_can_be_resumed_to_the_same_bits(ranks: Ranks, tmp_path: Path) -> None:
    """F10, R01: during data load, step, validation, save; exit code 143 or 130."""
    random_signals(ranks, tmp_path, 5, seed=3)


@pytest.mark.slow
def test_a_hundred_signals_at_any_time(ranks: Ranks, tmp_path: Path) -> None:
    """F10, in the number that the yardstick asks for."""
    random_signals(ranks, tmp_path, 100, seed=4)


# ---- death and errors ------------------------------------------------------------------------------------------------

ENDS = {  # of the second process, in the sixth step
    "killed in forward": (
        "def before(n, model):\n  if n == 6: model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))",
        -signal.SIGKILL,
    ),
    "killed between forward and all-reduce": (
        "def before(n, model):\n  if n == 6: model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))",
        -signal.SIGKILL,
    ),
    "an error in its data": ("def before(n, model):\n  if n == 6: raise ValueError('row 17 is gone')", 1),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_rank_that_dies_ends_the_other(ranks: Ranks, tmp_path: Path, how: str) -> None:
    """F12: the first process exits with another code than 0 within a minute, and what was committed is good."""
    patch, code = ENDS[how]
    out = tmp_path / "out"
    codes = ranks.run(ranks.train(out), patches={1: f"{AT_STEP}\n{patch}"})
    assert codes[1] == code and codes[0] not in (0, "hangs"), codes
    assert steps_of(out) == [4]


NAN = {  # on the second process alone, in the sixth step
    "weight": "first(model).data.view(-1)[0] = math.nan",
    "gradient": "first(model).register_hook(lambda g: g * math.inf)",
    "loss": "model.register_forward_hook(lambda m, i, o: o * math.nan)",
}


@pytest.mark.parametrize("where", NAN)
def test_a_value_that_is_not_finite_on_one_rank_stops_all_at_that_step(ranks: Ranks, tmp_path: Path, where: str) -> None:
    """F16: exit code 1, the step named by both, logged, and nothing that is not finite committed; the last good one is kept."""
    out = tmp_path / "out"
    spoilt = f"{AT_STEP}\ndef first(model): return next(p for p in model.parameters() if p.requires_grad)\n"
    spoilt += f"def before(n, model):\n  if n == 6: {NAN[where]}"
    assert ranks.run(ranks.train(out), patches={1: spoilt}) == [1, 1], ranks.said(0)
    for rank in (0, 1):
        assert "at step 6; the last good checkpoint is step-4" in ranks.said(rank)
    assert steps_of(out) == [4]
    last = read(out / names.METRICS)[-1]
    assert last["step"] == "6" and not {last["loss"], last["grad_norm"]}.isdisjoint({"nan", "inf"})
    with safe_open(out / "step-4" / names.ADAPTER_WEIGHTS, framework="np") as file:
        assert all(abs(file.get_tensor(name)).max() < 1e9 for name in file.keys())  # noqa: SIM118, it is no dict


def test_patience_ends_all_ranks_at_the_same_step(ranks: Ranks, tmp_path: Path) -> None:
    """N14: the loss that both see is the one over all rows. An odd number of rows, a save and validations in between."""
    out = tmp_path / "out"
    worse = "n, evaluate = 0, loop.evaluate\ndef found(*a):\n  global n\n  n += 1\n  return evaluate(*a)[0] + n, 1\nloop.evaluate = found"
    more = "--train.patience 2 --eval.interval 3 --train.lr 1e-6"
    assert ranks.run(ranks.train(out, more), patches={0: worse, 1: worse}) == [0, 0], ranks.said(0)
    assert "stopped: 2 validations" in ranks.said(0) and "stopped" not in ranks.said(1)
    assert steps_of(out) == [3, 4, 8, 9]


# ---- other numbers of processes --------------------------------------------------------------------------------------


def test_a_run_goes_on_with_another_number_of_processes(ranks: Ranks, tmp_path: Path) -> None:
    """R05: two processes, then one, then two. Every step sees the samples that it sees in one process; the loss is the same to 1e-5."""
    seen = """
share = loop.share_of_rank
def shared(window, rank, size):
    mine = share(window, rank, size)
    with open(SEEN, "a") as file:
        file.write("".join(f"{sample.where}\\n" for sample in mine))
    return mine
loop.share_of_rank = shared
"""

    def run(out: Path, typed: list[str], count: int) -> None:
        patches = dict.fromkeys(range(count), f"SEEN = {f'{out}.seen'!r}\n{seen}")
        assert ranks.run(typed, count, patches) == [0] * count, ranks.said(0)

    same, mixed = tmp_path / "same", tmp_path / "mixed"
    more = "--train.lr_schedule constant --train.lr_warmup_steps 0 --eval.interval 4"  # so that a run's length changes nothing else
    run(same, ranks.train(same, more), 1)
    for last, count in ((4, 2), (8, 1), (12, 2)):
        again = ["finetune", "lora", "--resume", "--out_dir", str(mixed)] if mixed.exists() else ranks.train(mixed, more)
        run(mixed, [*again, "--train.max_steps", str(last)], count)
    assert steps_of(mixed) == [4, 8, 12]
    one, other = (read(out / names.METRICS) for out in (same, mixed))
    assert [row["step"] for row in other] == [row["step"] for row in one]
    for ours, theirs in zip(other, one, strict=True):
        assert ours["graded"] == theirs["graded"]
        assert float(ours["loss"] or 0) == pytest.approx(float(theirs["loss"] or 0), rel=1e-5)
    trained = [sorted(line for line in Path(f"{out}.seen").read_text().splitlines()) for out in (same, mixed)]
    assert len(trained[0]) > 24 and trained[0] == trained[1]


def test_the_launcher_leaves_no_process_behind(ranks: Ranks, tmp_path: Path) -> None:
    """F12: as a user types it, `--devices 2`; the second process, which Fabric started, is killed (-9). Nothing of it is left."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "litlora", *ranks.train(out, "--train.max_steps 100000 --devices 2 --strategy ddp")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    end = time.monotonic() + 120
    while not list(out.glob("step-*")):
        assert process.poll() is None and time.monotonic() < end, "it ended, or hangs, before that"
        time.sleep(0.05)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    left = Path(f"/proc/{child}/stat")
    assert not left.exists() or left.read_text().rpartition(")")[2].split()[0] == "Z"  # dead; whoever runs this machine reaps it
    newest = max(out.glob("step-*"), key=lambda path: names.step_number(path) or 0)
    assert read_step(newest).is_resumable


def test_one_rank_alone_asks_nobody() -> None:
    """Nothing is carried to the device and back: Apple's GPUs have no fp64, in which it counts. Caught: Fabric asked by one."""
    one = SimpleNamespace(world_size=1)  # it has no all_reduce
    told = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert over_ranks(cast("Any", one), told) is told
