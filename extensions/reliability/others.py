"""Faults of the machine around a run: a disk that is really small, places that may not be written to, a second trainer, a full log."""

import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from extensions.reliability.place import Place, ending, temporaries
from extensions.reliability.processes import FILLER, Fault
from extensions.reliability.runs import STEPS, full_disk, go_on, judge, logged
from extensions.reliability.tally import Tally
from litlora.checkpoint import names
from litlora.checkpoint.resolve import list_steps


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path | None]:
    """A file system of so many bytes (rounded up to pages); None where this user may not mount one."""
    path.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def full_disks(place: Place, count: int, seed: int = 0, *more: str) -> Tally:
    """A third on disks of growing size, which may be refused before work; a third on one that somebody else fills up meanwhile, a third on
    one that becomes full in the middle of a commit, at each of a step's files in turn."""
    tally, rng = Tally("training: the disk is full (tmpfs)"), random.Random(seed)
    undisturbed = place.undisturbed(STEPS, *more)
    whole = sum(path.stat().st_size + 4096 for path in undisturbed.rglob("*"))
    files = sorted(path.name for path in (undisturbed / names.step_name(STEPS)).iterdir())
    for number in range(count):
        kind, turn = ("in a commit", "meanwhile", "small")[number % 3], number // 3
        with small_disk(place.path / "small", 8192 + 36 * 2**20 * number // count if kind == "small" else 2**26) as disk:
            if disk is None:
                tally.notes["left out: no right to mount"] += 1
                continue
            out = disk / "out"
            first = place.finetune(out, STEPS, *more)
            committing = rf"/\.tmp-step-{(2, 4, 6)[turn % 3]}-\d+/{re.escape(files[turn % len(files)])}$"
            with tally.trial():
                slow = 0.02 if kind == "meanwhile" else 0.0  # else it is done before the disk is full
                process = place.server.start(first, Fault(fills_at=committing) if kind == "in a commit" else Fault(slow_sync=slow))
                if kind == "meanwhile":
                    process.wait_for(lambda: logged(out) >= 1 + turn % 4)  # noqa: B023
                    process.kill(signal.SIGSTOP)  # it must not be done before the disk is full
                    fill(disk, rng.randrange(whole // 8))
                    process.kill(signal.SIGCONT)
                code, said = process.wait(), process.said
                words = f"disk {number}, {kind}{f', {committing}' if kind == 'in a commit' else ''}"
                if code == 0:
                    tally.notes["had room"] += 1
                    tally.expect("exit code", kind != "in a commit", f"{words}: it never became full: {said}")
                    judge(tally, out, STEPS, words)
                    continue
                full_disk(tally, place, out, [], code, said, words, resumable=False)
                if kind != "small":
                    tally.expect("exit code", code == 1, f"{words}: {code}: {said}")
                    tally.notes[f"full {kind}"] += 1
                    (disk / FILLER).unlink()
                subprocess.run(["mount", "-o", "remount,size=128m", disk], check=True)  # now there is room
                if (out / names.RUN_YAML).exists():
                    go_on(tally, place, out, first, STEPS, words, *more)
    return tally


def fill(disk: Path, room: int) -> None:
    """A foreign file that leaves so many bytes (and at most a page more)."""
    with suppress(OSError), open(disk / FILLER, "wb", buffering=0) as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - room)))


def closed_places(place: Place) -> Tally:
    """F08: read-only, no way in, a file in the way, a dangling link: refused before a model is loaded, with exit code 2."""
    tally = Tally("training: places that cannot be written to")
    root = place.fresh("closed")
    for name, mode in (("read-only", 0o555), ("hidden", 0o000)):
        (root / name).mkdir()
        (root / name).chmod(mode)
    (root / "file").write_text("mine")
    (root / "link").symlink_to("nowhere")
    for name in ("read-only", "read-only/out", "hidden/out", "file", "file/out", "link"):
        with tally.trial():
            code, said = place.server.run(place.finetune(root / name, STEPS), Fault(as_nobody=True))
            words = f"{name}: {code}: {said}"
            tally.expect("exit code", code == 2 and said.count("error: ") == 1 and str(root / name.split("/")[0]) in said, words)
            tally.expect("exit code", "trained " not in said, f"{words}: after the model was loaded")
            tally.expect("lost", (root / "file").read_text() == "mine", words)
    for name in ("read-only", "hidden"):
        (root / name).chmod(0o755)
    return tally


def two_trainers(place: Place, count: int, seed: int = 0) -> Tally:
    """F17: the second one is refused, also while the first is in its last moments; the lock of a killed one is taken over."""
    tally, rng = Tally("training: two trainers on one directory"), random.Random(seed)
    out = place.path / "shared"
    steps = 24
    for number in range(count):
        with tally.trial():
            shutil.rmtree(out, ignore_errors=True)
            first = place.server.start(place.finetune(out, steps), Fault(slow_sync=0.1))  # it is not done before they come
            first.wait_for(lambda: len(list_steps(out)) > 0 if out.exists() else False)
            words = f"{number}"
            for second in (["finetune", "lora", "--resume", "--out_dir", str(out)], place.finetune(out, steps, "--overwrite")):
                if first.ended:
                    break
                code, said = place.server.run(second)
                refused = code == 2 and f"another trainer (process {first.pid})" in said
                if first.ended and not refused:
                    tally.notes["the first ended meanwhile"] += 1
                    break
                tally.expect("exit code", refused, f"{words}: {code}: {said}")
                tally.notes["refused beside the first"] += refused
            time.sleep(rng.uniform(0, 0.05))
            first.kill()
            first.wait()
            judge(tally, out, first.committed, words)
            go_on(tally, place, out, place.finetune(out, steps), steps, words)
            tally.expect("left over", not (out / names.LOCK).exists(), f"{words}: the lock")
    with tally.trial():  # both at the same moment
        shutil.rmtree(out, ignore_errors=True)
        both = [place.server.start(place.finetune(out, STEPS)) for _ in range(2)]
        codes = sorted(process.wait() for process in both)
        tally.expect("exit code", codes == [0, 2], f"at once: {codes}: {[process.said for process in both]}")
        judge(tally, out, STEPS, "at once")
    return tally


def full_logs(place: Place) -> Tally:
    """F07: no room for the metrics costs one warning, and the run goes on."""
    tally = Tally("training: the disk of the metrics is full")
    out = place.path / "unlogged"
    shutil.rmtree(out, ignore_errors=True)
    with tally.trial():
        code, said = place.server.run(place.finetune(out, STEPS), Fault(file_full=rf"/{names.METRICS}$"))
        tally.expect("exit code", code == 0 and said.count("warning") == 1 and names.METRICS in said, f"{code}: {said}")
        judge(tally, out, STEPS, said)
    return tally


def unwritable_outputs(place: Place) -> Tally:
    """What is said is not the work: outputs that are closed, go to a full disk, or have nobody who reads them any more. The run is taken to
    its end all the same; only where its result cannot be printed (a full disk, a terminal that is gone) it then ends with exit code 1."""
    tally = Tally("training: outputs that are closed, full or unheard")
    gone = [Fault(unheard_after=word, terminal=terminal) for terminal in (False, True) for word in ("model", "COMMITTED step=2")]
    found = [Fault(closed=(1,)), Fault(closed=(2,)), Fault(closed=(1, 2)), Fault(full=(1,)), Fault(full=(2,)), Fault(full=(1, 2)), *gone]
    out = place.path / "unheard"
    for fault in found:
        shutil.rmtree(out, ignore_errors=True)
        with tally.trial():
            code, said = place.server.run(place.finetune(out, STEPS), fault)
            words = f"{fault}: {code}: {said}"
            tally.expect("exit code", code == (1 if 1 in fault.full or fault.terminal else 0), words)
            tally.expect("exit code", fault.full != (1,) or "No space left" in said, words)
            judge(tally, out, STEPS, words)
            tally.expect("differs", ending(out, STEPS) == place.reference(STEPS), words)
    return tally


def broken_values(place: Place) -> Tally:
    """F16 from outside: a rate that makes the loss infinite stops the run with exit code 1, and nothing that is not finite is committed."""
    tally = Tally("training: a loss that is not finite")
    out = place.path / "infinite"
    for optimizer_rate in ("1e30", "1e38"):
        shutil.rmtree(out, ignore_errors=True)
        with tally.trial():
            first = [*place.finetune(out, STEPS), "--train.lr", optimizer_rate, "--train.max_norm", "0", "--train.save_interval", "1"]
            code, said = place.server.run(first)
            tally.expect("exit code", code == 1 and re.search(r"at step \d+|not finite", said) is not None, f"{code}: {said}")
            judge(tally, out, max(map(int, re.findall(r"COMMITTED step=(\d+)", said)), default=0), said)
            tally.expect("left over", not temporaries(out), f"{temporaries(out)}")
            tally.notes[f"last step logged {logged(out)}"] += 1
            for step in list_steps(out):
                checked, told = place.server.run(["verify", str(step.path)])
                tally.expect("torn", checked == 0, f"{step.path.name}: {told}")
    return tally
