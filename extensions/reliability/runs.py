"""Faults while training: the whole run, from the first file to the last commit, and what `--resume` makes of what is left."""

import io
import random
import re
import shutil
import signal
import time
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path

from extensions.reliability.place import Place, ending, temporaries
from extensions.reliability.processes import Fault, Process
from extensions.reliability.tally import Tally
from litlora.checkpoint import names
from litlora.checkpoint.resolve import list_steps, newest_resumable, resolve
from litlora.errors import UserError

STEPS = 6  # of a run that crashes at each of its calls
SYNCED = {  # what must be synced in a run; without any one of them a power cut after COMMITTED loses something
    "the run's directory": r"/out$",
    "its parent": r"/crash$",
    "a step's directory": r"/\.tmp-step-\d+-\d+$",
    "the adapter": names.ADAPTER_WEIGHTS,
    "the adapter's config": names.ADAPTER_CONFIG,
    "the manifest": rf"/{names.MANIFEST}$",
    "the training state": names.TRAINING_STATE,
    "the training state's hashes": names.TRAINING_STATE_META,
    "the tokenizer": rf"/{names.TOKENIZER}$",
    "the tokenizer's config": names.TOKENIZER_CONFIG,
    "the chat template": names.CHAT_TEMPLATE,
    "the card": names.README,
    "run.yaml": names.RUN_YAML,
}


def judge(tally: Tally, out: Path, committed: int, words: str) -> None:
    """The promise of F01, after whatever came: every step is whole, and the newest is at least as new as was said."""
    for step in list_steps(out):
        tally.expect("torn", not step.faults and not step.state_faults, f"{words}: {step.path.name}: {step.faults or step.state_faults}")
    newest = newest_resumable(out)[0]
    reached = newest.number if newest else 0
    if tally.expect("lost", reached >= committed, f"{words}: COMMITTED {committed} was said, {reached} is there") and newest:
        try:
            with redirect_stderr(io.StringIO()):  # which step it takes
                tally.expect("lost", resolve(out).kind == "step", f"{words}: the run resolves to nothing")
        except UserError as error:
            tally.loss("lost", f"{words}: {error}")


def go_on(tally: Tally, place: Place, out: Path, first: list[str], steps: int, words: str, *more: str) -> None:
    """`--resume`, as a user types it, then the same bits as a run that nobody disturbed (R01), and nothing left over (F04)."""
    begun = (out / names.RUN_YAML).exists()
    code, said = place.server.run(["finetune", "lora", "--resume", "--out_dir", str(out)] if begun else first)
    if not begun and code == 2 and not list_steps(out):  # it died before it had written down what it was to do
        code, said = place.server.run([*first, "--overwrite"])
    if tally.expect("exit code", code == 0, f"{words}: the resumed run ends with {code}: {said}"):
        found, wanted = ending(out, steps), place.reference(steps, *more)
        different = [name for name in wanted if found.get(name) != wanted[name]]
        tally.expect("differs", not different, f"{words}: {different} differ from the undisturbed run's")
    tally.expect("left over", not temporaries(out), f"{words}: {temporaries(out)}")


# ---- F01, F02: crashes at every call, power cuts ----------------------------------------------------------------------


def calls_of(place: Place, words: list[str], root: Path) -> int:
    """How many calls to the disk a command makes."""
    code, said = place.server.run(words, Fault(root=str(root)))
    assert code == 0, said
    return int(said.split("CALLS ")[1])


def crashes(place: Place, lose: int | str | None, points: Iterable[int] | None = None, without_sync: str = "", *more: str) -> Tally:
    """The machine (or, with `lose` None, the process) dies at each of the calls of a short run (or at those of `points`); 0: after it."""
    kind = "the process dies" if lose is None else f"the power fails ({'all' if lose == 'all' else 'part'} of what was not synced is lost)"
    tally = Tally(f"training: {kind} at each call to the disk")
    root = place.path / "crash"
    first = place.finetune(root / "out", STEPS, *more)
    if points is None:
        place.fresh("crash")
        points = [0, *range(1, calls_of(place, first, root) + 1)]
        tally.notes["calls in a run"] = len(points) - 1
    for point in points:
        with tally.trial():
            place.fresh("crash")
            seed = lose * 10_000 + point if isinstance(lose, int) else lose
            fault = Fault(crash_at=point or None, lose=seed, root=str(root), without_sync=without_sync)
            process = place.server.start(first, fault)
            code = process.wait()
            words = f"call {point}"
            if point and "CALLS" in process.said:
                continue  # there is no such call in this run: threads take turns
            if not tally.expect("exit code", code in (0, 137), f"{words}: {code}: {process.said}"):
                continue
            judge(tally, root / "out", process.committed, words)
            if not tally.losses or not without_sync:
                go_on(tally, place, root / "out", first, STEPS, words, *more)
    return tally


# ---- F04: kill -9 ------------------------------------------------------------------------------------------------------


def kills(place: Place, count: int, inside: int = 0, steps: int = 120, seed: int = 0, *more: str) -> Tally:
    """Kill -9 at random times, run after run, each taken up until it is killed again or done; `inside` of them and more while a commit
    is under way (seen: its temporary directory is left)."""
    tally, rng = Tally("training: kill -9"), random.Random(seed)
    out = place.path / "killed"
    first = place.finetune(out, steps, *more)
    shutil.rmtree(out, ignore_errors=True)
    committed = 0
    while tally.trials < count or tally.notes["inside a commit"] < inside:
        if tally.trials > 20 * count:
            tally.loss("exit code", "hardly any kill hits a commit: nothing was tried")
            break
        with tally.trial():
            resume = ["finetune", "lora", "--resume", "--out_dir", str(out)]
            process = place.server.start(resume if (out / names.RUN_YAML).exists() else [*first, "--overwrite"], Fault(slow_sync=0.002))
            if rng.random() < 0.75:  # a commit is seen to begin
                skipped = rng.randrange(3)
                process.wait_for(lambda: in_commit(out, process, skipped))  # noqa: B023
                time.sleep(rng.uniform(0, 0.04))
            else:
                time.sleep(rng.uniform(0, 1.2))
            process.kill()
            code, said = process.wait(), process.said
            tally.expect("exit code", code in (0, -signal.SIGKILL), f"{code}: {said}")
            tally.notes["inside a commit"] += any(name.startswith(".tmp-step") for name in temporaries(out))
            tally.notes["ended before they were killed"] += code == 0
            committed = max(committed, process.committed)
            judge(tally, out, committed, f"kill {tally.trials}")
            if (out / names.step_name(steps)).exists():
                go_on(tally, place, out, first, steps, f"kill {tally.trials}", *more)
                tally.notes["runs taken to their end"] += 1
                shutil.rmtree(out)
                committed = 0
    if out.exists():
        go_on(tally, place, out, first, steps, "after the last kill", *more)
    return tally


def in_commit(out: Path, process: Process, skipped: int) -> bool:
    """Whether it writes a step right now, after it has committed `skipped` of them."""
    if process.said.count("COMMITTED step=") < skipped:
        return False
    try:
        return any(name.startswith(".tmp-step") for name in temporaries(out))
    except FileNotFoundError:  # it was renamed while we looked
        return False


# ---- F10: signals ------------------------------------------------------------------------------------------------------


def signals(place: Place, count: int, seed: int = 0, steps: int = 24, within: float = 10, *more: str) -> Tally:
    """SIGTERM and SIGINT at random times: before training, in a step, in a validation, in a commit; every fifth comes twice.

    `within`: seconds from the signal to the end; on a machine with much else to do they say little.
    """
    tally, rng = Tally("training: SIGTERM, SIGINT"), random.Random(seed)
    out = place.path / "asked"
    first = place.finetune(out, steps, *more)
    for number in range(count):
        with tally.trial():
            shutil.rmtree(out, ignore_errors=True)
            asked, twice = rng.choice((signal.SIGTERM, signal.SIGINT)), number % 5 == 4
            process = place.server.start(first, Fault(slow_sync=0.001))
            if not process.wait_for(lambda: "model " in process.said):  # noqa: B023  until then signals are Python's own
                tally.loss("exit code", process.said)
            when = rng.choice(("before", "step", "step", "commit"))
            reached = rng.randrange(1, int(steps * 0.7))
            if when == "before":
                time.sleep(rng.uniform(0, 0.15))
            elif when == "step":  # every fourth is validated
                process.wait_for(lambda: logged(out) >= reached)  # noqa: B023
                time.sleep(rng.uniform(0, 0.02))
            else:
                process.wait_for(lambda: in_commit(out, process, reached // 2))  # noqa: B023
            done = process.ended
            process.kill(asked)
            sent = time.monotonic()
            if twice:
                time.sleep(rng.uniform(0, 0.01))
                process.kill(asked)
            code, said = process.wait(), process.said
            words = f"signal {number} ({asked.name}{' twice' if twice else ''}, {when}): {code}: {said}"
            if done or code == 0:
                tally.notes["after the end"] += 1
                tally.expect("exit code", code == 0 and (out / names.step_name(steps)).exists(), words)
                continue
            tally.notes["in a commit" if when == "commit" else "in a step" if logged(out) > 0 else "before training"] += 1
            tally.notes["twice"] += twice
            tally.expect("exit code", code == 128 + asked, words)
            tally.expect("exit code", time.monotonic() - sent < within, f"{words}: it took longer than {within:g} s")
            tally.expect("exit code", twice or not list_steps(out) or f"--resume --out_dir {out}" in said, f"{words}: not how to go on")
            judge(tally, out, process.committed, words)
            if out.exists():
                go_on(tally, place, out, first, steps, words, *more)
    return tally


def logged(out: Path) -> int:
    """The last step in the metrics."""
    from litlora.train.metrics import read

    rows = read(out / names.METRICS)
    return int(rows[-1]["step"]) if rows else -1


# ---- F07: full disks ---------------------------------------------------------------------------------------------------


def file_limits(place: Place, count: int, *more: str) -> Tally:
    """RLIMIT_FSIZE: no file may become larger than so many bytes."""
    tally = Tally("training: a file may not grow (RLIMIT_FSIZE)")
    whole = place.undisturbed(STEPS, *more)
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    out = place.path / "limited"
    first = place.finetune(out, STEPS, *more)
    for number in range(count):
        with tally.trial():
            shutil.rmtree(out, ignore_errors=True)
            limit = largest * number // count
            code, said = place.server.run(first, Fault(largest_file=limit))
            full_disk(tally, place, out, first, code, said, f"limit {limit}", *more)
    return tally


def full_disk(
    tally: Tally, place: Place, out: Path, first: list[str], code: int, said: str, words: str, *more: str, resumable: bool = True
) -> None:
    """F07: a typed error with the bytes, no temporary file, whole steps; and the run goes on when there is room again (`resumable`)."""
    if not tally.expect("exit code", code in (1, 2) and said.count("error: ") == 1, f"{words}: {code}: {said}"):
        return
    tally.notes[f"exit code {code}"] += 1
    if code == 1:
        tally.expect("exit code", re.search(r"[\d,]+ bytes needed, [\d,]+ free", said) is not None, f"{words}: no bytes: {said}")
    tally.expect("left over", not temporaries(out), f"{words}: {temporaries(out)}")
    committed = max(map(int, re.findall(r"COMMITTED step=(\d+)", said)), default=0)
    judge(tally, out, committed, words)
    if resumable and (out / names.RUN_YAML).exists():
        go_on(tally, place, out, first, STEPS, words, *more)
