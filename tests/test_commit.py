"""A commit is whole or not at all: crashes at every system call, power loss, kill -9, full disks, closed doors (YARDSTICK F)."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_samples import add_step, copy, flip, make_base, manifest_of
from crashing_disk import Disk, Everything, in_child

from litlora.checkpoint import commit, names
from litlora.checkpoint.commit import commit_directory, commit_step, make_directory, write_atomically
from litlora.checkpoint.manifest import FORMAT_VERSION, read_manifest, seal, unseal
from litlora.checkpoint.resolve import list_steps, newest_resumable, read_step, resolve
from litlora.checkpoint.run import prepare_run_directory, refuse_lost_options
from litlora.errors import UserError, WorkError

# ---- a child that saves ----------------------------------------------------------------------------------------------


def save_third(run: Path, crash_at: int | None, lose: random.Random | None) -> tuple[int, str]:
    """A child that commits step 300, and says so once it has; then, if power is to be lost, it is lost at last."""

    def work(say: Callable[[str], None]) -> None:
        disk = Disk(run.parent, crash_at, lose)
        disk.install()
        add_step(run, 300, val_loss=0.5)
        say(f"COMMITTED {len(disk.calls)}")
        if lose is not None:
            disk.die()
        os._exit(0)

    return in_child(work)


def check_run(run: Path, said: str) -> str:
    """The promise: the newest whole step is there and at least as new as what was said to be committed. What breaks it, if anything."""
    assert "Error" not in said, said
    steps = {step.number: step for step in list_steps(run)}
    torn = [f"step-{number}: {step.faults or step.state_faults}" for number, step in steps.items() if not step.is_resumable]
    if torn:
        return f"torn: {torn}"  # a directory under its final name is whole, always
    if not {100, 200} <= steps.keys():
        return f"only {sorted(steps)} are left"
    newest, _ = newest_resumable(run)
    if newest is None or (said.startswith("COMMITTED") and newest.number != 300):
        return f"COMMITTED 300 was said, but the newest is {newest and newest.number}"
    return "" if resolve(run).path == newest.path else "the run resolves to another step than its best"


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """In memory where there is such a place: these tests commit a thousand times, and a real disk takes milliseconds to sync."""
    place = Path(tempfile.mkdtemp(prefix="litlora-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield place
    subprocess.run(["chmod", "-R", "u+rwx", place], check=True)
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "out"
    add_step(run, 100, val_loss=0.9)
    add_step(run, 200, val_loss=0.7)
    return run


def crash_points(run: Path, tmp_path: Path) -> int:
    code, said = save_third(copy(run, tmp_path / "count" / "out"), None, None)
    assert code == 0
    assert said.startswith("COMMITTED")
    return int(said.split()[1])


# ---- F01, F02 --------------------------------------------------------------------------------------------------------


def test_a_crash_at_any_system_call_leaves_a_whole_newest_step_and_the_next_start_cleans_up(two_steps: Path, tmp_path: Path) -> None:
    """F01. Mutations seen to fail here: writing into the final directory at once (torn step), manifest missing (torn step)."""
    calls = crash_points(two_steps, tmp_path)
    assert calls > 30
    for k in range(1, calls + 1):
        run = copy(two_steps, tmp_path / str(k) / "out")
        code, said = save_third(run, k, None)
        assert code == 137, (k, said)
        assert check_run(run, said) == "", k
        with prepare_run_directory(run, resume=True) as ready:
            assert not [path.name for path in run.iterdir() if path.name.startswith(".tmp")], k
            assert ready.resume_from is not None
            if ready.resume_from.path.name == "step-200":
                add_step(run, 300, val_loss=0.5)
        assert check_run(run, "COMMITTED") == "", k
        shutil.rmtree(run.parent)


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_at_any_system_call_leaves_a_whole_newest_step(two_steps: Path, tmp_path: Path, seed: int) -> None:
    """F02: whatever was not fsynced is lost, all of it or part of it."""
    assert lost_power(two_steps, tmp_path, seed) == ""


def lost_power(two_steps: Path, tmp_path: Path, seed: int) -> str:
    """The first broken promise over all crash points, or nothing."""
    for k in [None, *range(1, crash_points(two_steps, tmp_path) + 1)]:
        run = copy(two_steps, tmp_path / str(k) / "out")
        code, said = save_third(run, k, random.Random(1000 * seed + (k or 0)) if seed else Everything())
        assert code == 137, (k, said)
        if broken := check_run(run, said):
            return f"call {k}: {broken}"
        shutil.rmtree(run.parent)
    return ""


SYNCED = {
    "step's files": lambda path: path.parent.name.startswith(".tmp-step") and path.name != names.MANIFEST,
    "adapter": lambda path: path.name == names.ADAPTER_WEIGHTS,
    "training state": lambda path: path.name == names.TRAINING_STATE,
    "training state's hashes": lambda path: path.name == names.TRAINING_STATE_META,
    "README": lambda path: path.name == names.README,
    "manifest": lambda path: path.name == names.MANIFEST,
    "step's own directory": lambda path: path.name.startswith(".tmp-step"),
    "run's directory": lambda path: path.name == "out",
}


@pytest.mark.parametrize("which", SYNCED)
def test_leaving_out_any_one_fsync_is_noticed(two_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """F02, must catch: the test above fails when the fsync of any file, of the step's directory or of the run's is removed."""
    real = commit.sync
    monkeypatch.setattr(commit, "sync", lambda path: None if SYNCED[which](path) else real(path))
    assert lost_power(two_steps, tmp_path, seed=0)


@pytest.mark.parametrize("synced", [True, False])
def test_a_new_run_directory_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool) -> None:
    """F02: the entries of directories that `mkdir -p` made are synced too; without (False) the whole run is lost after COMMITTED."""
    run = tmp_path / "deep" / "er" / "out"

    def work(say: Callable[[str], None]) -> None:
        disk = Disk(tmp_path, None, Everything())
        disk.install()
        if not synced:
            monkeypatch.setattr("litlora.checkpoint.run.make_directory", lambda path: path.mkdir(parents=True))
        prepare_run_directory(run)
        add_step(run, 100)
        say("COMMITTED")
        disk.die()

    code, said = in_child(work)
    assert code == 137
    assert said == "COMMITTED"
    assert (run / "step-100").exists() == synced
    if synced:
        assert [step.is_resumable for step in list_steps(run)] == [True]


def test_a_small_file_is_old_or_new_after_a_crash_or_power_cut(tmp_path: Path) -> None:
    """F01, F02 for run.yaml and note.md. Mutation: writing in place leaves half of it; without either fsync `new` is lost."""
    old, new = b"old" * 50, b"new" * 70
    seen = set()
    for lose in (None, Everything(), *map(random.Random, range(4))):
        for k in [*range(1, 8), None]:
            path = tmp_path / "run.yaml"
            path.write_bytes(old)

            def work(say: Callable[[str], None], k: int | None = k, lose: random.Random | None = lose, path: Path = path) -> None:
                disk = Disk(tmp_path, k, lose)
                disk.install()
                write_atomically(path, new)
                say("done")
                disk.die()

            _, said = in_child(work)
            assert path.read_bytes() in ((new,) if said == "done" else (old, new)), (k, said)
            seen.add(path.read_bytes())
            commit.remove_leftovers(tmp_path)
            assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]
    assert seen == {old, new}


# ---- F03 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "out"
    add_step(run, 9)
    add_step(run, 10)
    return run


EVERY_FILE = (
    names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS, names.TOKENIZER, names.CHAT_TEMPLATE, names.README, names.MANIFEST,
    names.TRAINING_STATE, names.TRAINING_STATE_META,
)  # fmt: skip


def faults_of(step: Path) -> str:
    found = read_step(step)
    return "\n".join((*found.faults, *found.state_faults))


def test_a_whole_step_has_no_faults_and_every_file_is_covered(whole: Path) -> None:
    """F03: nothing that a step holds escapes the hashes."""
    step = whole / "step-10"
    assert {path.name for path in step.iterdir()} == set(EVERY_FILE)
    assert faults_of(step) == ""
    assert newest_resumable(whole)[0].path == step  # type: ignore[union-attr]


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_cut_or_altered_or_missing_file_is_found_and_named(whole: Path, tmp_path: Path, name: str) -> None:
    """F03. Mutation: comparing sizes only lets the flipped bits through."""
    run = copy(whole, tmp_path / "out")
    path = run / "step-10" / name
    good = path.read_bytes()
    damages: list[Callable[[], object]] = [
        lambda size=size: path.write_bytes(good[:size]) for size in (0, 1, len(good) // 2, len(good) - 1)
    ]
    damages += [lambda: path.write_bytes(good + b"\n"), lambda: path.write_bytes(bytes(len(good)))]
    damages += [lambda seed=seed: flip(path, random.Random(seed).randrange(8 * len(good))) for seed in range(64)]
    if name != names.TRAINING_STATE_META:  # deleting that one is below
        damages.append(path.unlink)
    for number, damage in enumerate(damages):
        path.write_bytes(good)
        assert faults_of(run / "step-10") == ""
        damage()
        assert name in faults_of(run / "step-10"), number
        newest, passed = newest_resumable(run)
        assert newest is not None
        assert newest.number == 9
        assert [step.number for step in passed] == [10]
    if name in (names.TRAINING_STATE, names.TRAINING_STATE_META):
        return
    with pytest.raises(UserError, match="torn or was altered") as refused:
        resolve(run / "step-10")
    assert any(name in line for line in refused.value.context)
    assert "step-9" in refused.value.hint


def test_half_a_training_state_is_named_and_none_at_all_is_no_damage(whole: Path, tmp_path: Path) -> None:
    """DESIGN section 3: deleting the optimizer's state never makes a step torn; one file of two is."""
    run = copy(whole, tmp_path / "out")
    (run / "step-10" / names.TRAINING_STATE_META).unlink()
    assert names.TRAINING_STATE_META in faults_of(run / "step-10")
    assert resolve(run / "step-10").path == run / "step-10"  # the weights are whole
    (run / "step-10" / names.TRAINING_STATE).unlink()
    step = read_step(run / "step-10")
    assert step.is_whole
    assert not step.state_faults
    assert not step.is_resumable


def test_swapped_files_are_found(whole: Path, tmp_path: Path) -> None:
    """F03: two files of a step, one file of two steps, and the state of another step."""
    for first, second in (
        (f"step-10/{names.README}", f"step-10/{names.TOKENIZER}"),
        (f"step-9/{names.ADAPTER_WEIGHTS}", f"step-10/{names.ADAPTER_WEIGHTS}"),
        (f"step-9/{names.MANIFEST}", f"step-10/{names.MANIFEST}"),
        (f"step-9/{names.TRAINING_STATE}", f"step-10/{names.TRAINING_STATE}"),
    ):
        run = copy(whole, tmp_path / first.replace("/", "-") / "out")
        swap(run / first, run / second)
        assert Path(second).name in faults_of(run / "step-10"), (first, second)
    run = copy(whole, tmp_path / "pair" / "out")
    for name in (names.TRAINING_STATE, names.TRAINING_STATE_META):  # consistent in itself, but of another checkpoint
        swap(run / "step-9" / name, run / "step-10" / name)
    assert "another checkpoint" in faults_of(run / "step-10")
    swap(run / "step-9", run / "step-10")
    assert "renamed" in faults_of(run / "step-10")
    assert "renamed" in faults_of(run / "step-9")


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_a_run_falls_back_to_the_next_whole_step_with_a_warning(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F03: what any command does with a run whose best step is torn."""
    run = copy(whole, tmp_path / "out")
    flip(run / "step-10" / names.ADAPTER_WEIGHTS, 4000)
    assert resolve(run).path == run / "step-9"
    warning = capsys.readouterr().err
    assert "step-10" in warning
    assert names.ADAPTER_WEIGHTS in warning


def test_a_manifest_of_a_newer_litlora_says_so(tmp_path: Path) -> None:
    """R06: forward."""
    step = add_step(tmp_path / "out", 1)
    (step / names.MANIFEST).write_bytes(manifest_of(1, format_version=FORMAT_VERSION + 1).encode())
    with pytest.raises(UserError, match="torn or was altered") as refused:
        resolve(step)
    assert f"format {FORMAT_VERSION + 1}, newer than this litlora's {FORMAT_VERSION}" in refused.value.context[0]


def test_a_step_of_format_1_is_read(tmp_path: Path) -> None:
    """R06: backward. Format 1 had no lineage; its training state carries the same number."""
    step = add_step(tmp_path / "out", 1)
    for name in (names.TRAINING_STATE_META, names.MANIFEST):
        values = unseal((step / name).read_bytes(), step / name)
        values.pop("lineage", None)
        (step / name).write_bytes(seal({**values, "format_version": 1}))
    assert read_step(step).is_resumable
    assert read_manifest(step).lineage == ()


# ---- F04 -------------------------------------------------------------------------------------------------------------


def test_kill_9_at_random_times_never_leaves_an_unusable_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F04: 50 kills of a child that saves in a loop; leftovers are gone at the next start, and nothing goes to TMPDIR."""
    run, elsewhere = tmp_path / "out", Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    rng = random.Random(7)
    committed, leftovers = 0, 0
    for _ in range(50):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            save_in_a_loop(run, writer, resume=committed > 0 or run.exists())
        os.close(writer)
        first = os.read(reader, 8)  # it has begun
        assert first == b"begin\n  "
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open(reader, "rb") as file:
            said = file.read().split()
        assert all(word.isdigit() for word in said), said
        committed = max([committed, *map(int, said)])
        leftovers += any(path.name.startswith(".tmp-step") for path in run.iterdir())
        steps = list_steps(run)
        assert all(step.is_resumable for step in steps)
        assert committed == 0 or steps[-1].number >= committed
        for step in steps[:-2]:
            shutil.rmtree(step.path)
    assert committed >= 5, "hardly anything was committed: nothing was tried"
    assert leftovers > 0, "no kill ever hit a commit: nothing was tried"
    prepare_run_directory(run, resume=True).close()
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert not list(elsewhere.iterdir())
    elsewhere.rmdir()


def save_in_a_loop(run: Path, writer: int, resume: bool) -> None:
    try:
        ready = prepare_run_directory(run, resume=resume)
        if resume:
            assert not [path for path in run.iterdir() if path.name.startswith(".tmp")]
        (run / names.RUN_YAML).touch()
        number = ready.resume_from.manifest.step if ready.resume_from else 0  # type: ignore[union-attr]
        os.write(writer, b"begin\n  ")
        while True:
            number += 1
            add_step(run, number)
            os.write(writer, f"{number}\n".encode())
    except BaseException as error:
        os.write(writer, f"failed:{error!r}\n".encode())
        os._exit(1)


# ---- F07 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 700, 3_000, 20_000, 100_000])
def test_a_file_size_limit_fails_the_commit_and_nothing_else(two_steps: Path, tmp_path: Path, limit: int) -> None:
    """F07: RLIMIT_FSIZE, hit in another file each time. Mutation: leaving the temporary directory is seen."""
    run = copy(two_steps, tmp_path / "out")

    def work(say: Callable[[str], None]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            add_step(run, 300, size=200_000)
        except WorkError as error:
            say(f"{error.exit_code} {error.report()}")

    code, said = in_child(work)
    assert (code, said[:9]) == (0, "1 error: "), said
    assert "bytes needed" in said
    assert "free" in said
    assert "hint: " in said
    assert sorted(path.name for path in run.iterdir()) == ["step-100", "step-200"]
    assert all(step.is_resumable for step in list_steps(run))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_keeps_what_was_committed(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F07: seen before the first byte, and (with that look taken away) while writing."""
    run = small_disk / "out"
    add_step(run, 100)
    with pytest.raises(WorkError, match=r"the disk is full: [\d,]+ bytes needed, [\d,]+ free"):
        add_step(run, 200, size=600_000)
    monkeypatch.setattr(commit, "check_free_space", lambda *_: None)
    with pytest.raises(WorkError, match=r"the disk is full: [\d,]+ bytes needed, [\d,]+ free"):
        add_step(run, 200, size=600_000)
    assert [path.name for path in run.iterdir()] == ["step-100"]
    assert [step.is_resumable for step in list_steps(run)] == [True]
    add_step(run, 200, size=1000)  # the space came back
    with pytest.raises(WorkError, match="the disk is full"):
        write_atomically(run / names.RUN_YAML, bytes(600_000))
    assert sorted(path.name for path in run.iterdir()) == ["step-100", "step-200"]


def test_too_little_space_is_refused_before_work(tmp_path: Path) -> None:
    """F07: exit 2 when it is seen before work; the directory is not even made."""
    with pytest.raises(UserError, match=r"the disk is full: [\d,]+ bytes needed, [\d,]+ free") as refused:
        prepare_run_directory(tmp_path / "out", needed_bytes=1 << 60)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()


# ---- F08 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that everybody may reach (pytest's own are closed to others)."""
    place = Path(tempfile.mkdtemp(prefix="litlora-"))
    place.chmod(0o755)
    yield place
    subprocess.run(["chmod", "-R", "u+rwx", place], check=True)
    shutil.rmtree(place)


def as_nobody(work: Callable[[], object]) -> str:
    """What `work` raises in a process without root's privileges, which ignore modes."""

    def child(say: Callable[[str], None]) -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            work()
            say("went well")
        except (UserError, WorkError) as error:
            say(f"{error.exit_code} {error.report()}")

    code, said = in_child(child)
    assert code == 0, said
    return said


def test_a_directory_that_cannot_be_written_is_refused_before_work(open_place: Path) -> None:
    """F08. Mutation: without the probe file the read-only directory passes."""
    closed = open_place / "closed"
    closed.mkdir(mode=0o555)
    for path in (closed, closed / "out", closed / "deeper" / "out"):
        said = as_nobody(lambda path=path: prepare_run_directory(path))
        assert said.startswith(f"2 error: {closed}"), said
        assert "cannot be written to: Permission denied" in said
    hidden = open_place / "hidden"
    (hidden / "out").mkdir(parents=True)
    hidden.chmod(0o000)
    said = as_nobody(lambda: prepare_run_directory(hidden / "out"))
    assert said.startswith("2 error: "), said
    assert "Permission denied" in said
    left = open_place / "left"  # with the lock of a killed run in it, which can be opened without writing to the directory
    left.mkdir()
    (left / names.LOCK).touch()
    (left / names.LOCK).chmod(0o666)
    left.chmod(0o555)
    assert as_nobody(lambda: prepare_run_directory(left)).startswith(f"2 error: {left}")
    allowed = open_place / "allowed"
    allowed.mkdir()
    allowed.chmod(0o777)
    assert as_nobody(lambda: prepare_run_directory(allowed / "out")) == "went well"


def test_a_read_only_run_fails_the_commit_loudly(open_place: Path) -> None:
    """F08: never reports success where no file is (Lightning #21800)."""
    run = open_place / "out"
    add_step(run, 100)
    run.chmod(0o555)
    said = as_nobody(lambda: add_step(run, 200))
    assert said.startswith(f"1 error: {run / 'step-200'}: could not be written: Permission denied"), said
    assert [path.name for path in run.iterdir()] == ["step-100"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    """F08."""
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match="a directory is needed here") as refused:
            prepare_run_directory(path)
        assert refused.value.where == str(tmp_path / "file")
        assert refused.value.exit_code == 2
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="a directory is needed here"):
        prepare_run_directory(tmp_path / "dangling")


# ---- a run's directory -----------------------------------------------------------------------------------------------


def test_a_directory_with_a_run_needs_resume_or_overwrite(tmp_path: Path) -> None:
    """DESIGN section 3: nothing is overwritten."""
    run = tmp_path / "out"
    add_step(run, 100)
    with pytest.raises(UserError, match="holds a run already") as refused:
        prepare_run_directory(run)
    assert refused.value.exit_code == 2
    assert "--resume" in refused.value.hint
    assert "--overwrite" in refused.value.hint
    with pytest.raises(UserError, match="exclude each other"):
        prepare_run_directory(run, resume=True, overwrite=True)
    with pytest.raises(UserError, match="no run to go on with"):
        prepare_run_directory(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    base = make_base(tmp_path / "base")
    with pytest.raises(UserError, match="holds a model"):
        prepare_run_directory(base, overwrite=True)


@pytest.mark.parametrize("name", [names.METRICS, names.SKIPPED_ROWS])
def test_what_is_left_of_a_run_is_offered_what_helps_alone(tmp_path: Path, name: str) -> None:
    """Neither --resume where there is nothing to go on with, nor leaving it out, which is refused in turn. Caught: either."""
    (tmp_path / name).write_text("step\n")
    with pytest.raises(UserError, match="holds a run already") as refused:
        prepare_run_directory(tmp_path)
    assert refused.value.hint == "--overwrite deletes it; or choose another --out_dir"
    with pytest.raises(UserError, match="no run to go on with") as refused:
        refuse_lost_options(tmp_path)
    assert refused.value.hint == "--overwrite in its place deletes what is left of one, and begins anew"
    (tmp_path / names.RUN_YAML).write_text("seed: 1\n")
    assert prepare_run_directory(tmp_path, resume=True).resume_from is None


def test_overwrite_deletes_what_litlora_wrote_and_nothing_else(tmp_path: Path) -> None:
    """F09: foreign files are untouched."""
    run = tmp_path / "out"
    for number in (1, 2, 10):
        add_step(run, number)
    (run / "step-2").rename(run / "step-2.torn")
    (run / "step-10" / names.NOTE).write_text("mine")
    merged = run / "step-10" / names.MERGED
    merged.mkdir()
    for name in (names.CONFIG, names.WEIGHTS, names.MERGE_REPORT, "LICENSE"):
        (merged / name).write_text("{}")
    (run / names.RUN_YAML).write_text("a: 1")
    (run / names.METRICS).write_text("step")
    foreign = [run / "thesis.tex", run / "step-x" / "data.txt", run / "step-7b" / "data.txt"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    prepare_run_directory(run, overwrite=True).close()
    assert sorted(path.name for path in run.iterdir()) == ["step-7b", "step-x", "thesis.tex"]
    assert all(path.read_text() == "mine" for path in foreign)


@pytest.mark.parametrize("place", ["thesis.tex", "merged/model.gguf", "merged/sub/x.json", "directory/x"])
def test_overwrite_refuses_a_step_that_holds_something_foreign(tmp_path: Path, place: str) -> None:
    """F09: then nothing at all is deleted."""
    run = tmp_path / "out"
    add_step(run, 1)
    add_step(run, 2)
    path = run / "step-1" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    if place.startswith("merged"):
        (run / "step-1" / names.MERGED / names.MERGE_REPORT).write_text("{}")
    with pytest.raises(UserError, match="which litlora did not write"):
        prepare_run_directory(run, overwrite=True)
    assert path.read_text() == "mine"
    assert all(step.is_resumable for step in list_steps(run))
    assert not (run / names.LOCK).exists()


def test_a_crash_while_overwriting_leaves_no_torn_step(two_steps: Path, tmp_path: Path) -> None:
    """F01 for the deletion of a run: whole steps and leftovers at every point."""
    for k in range(1, 60):
        run = copy(two_steps, tmp_path / str(k) / "out")

        def work(say: Callable[[str], None], k: int = k, run: Path = run) -> None:
            disk = Disk(run.parent, k, random.Random(k))
            disk.install()
            prepare_run_directory(run, overwrite=True)
            os._exit(0)

        code, said = in_child(work)
        assert code in (0, 137), said
        assert all(step.is_resumable for step in list_steps(run)), k
        prepare_run_directory(run, overwrite=True).close()
        assert not list(run.iterdir())
        if code == 0:
            break
    else:
        pytest.fail("it never came to an end")


def test_resume_takes_the_newest_by_number_and_sets_torn_ones_aside(tmp_path: Path) -> None:
    """F03, F09: step-10 is newer than step-9; a torn step-11 keeps its bytes under another name, because 11 will be written again."""
    run = tmp_path / "out"
    for number in (9, 10, 11):
        add_step(run, number)
    flip(run / "step-11" / names.TRAINING_STATE, 999)
    with prepare_run_directory(run, resume=True) as ready:
        assert ready.resume_from is not None
        assert ready.resume_from.path == run / "step-10"
        assert len(ready.messages) == 1
        assert "step-11" in ready.messages[0]
        assert names.TRAINING_STATE in ready.messages[0]
        add_step(run, 11)
    assert sorted(path.name for path in run.iterdir()) == ["step-10", "step-11", "step-11.torn", "step-9"]
    assert [step.number for step in list_steps(run)] == [9, 10, 11]


def test_resume_never_goes_behind_whole_work_in_silence(tmp_path: Path) -> None:
    """A newest step whose training state was deleted on purpose is not written again."""
    run = tmp_path / "out"
    add_step(run, 1)
    add_step(run, 2, state=False)
    with pytest.raises(UserError, match="its training state was deleted") as refused:
        prepare_run_directory(run, resume=True)
    assert refused.value.where == str(run / "step-2")
    assert "step-1" in refused.value.what
    shutil.rmtree(run / "step-2")
    flip(run / "step-1" / names.MANIFEST, 99)
    with pytest.raises(UserError, match="no checkpoint in it is whole") as refused:
        prepare_run_directory(run, resume=True)
    assert names.MANIFEST in refused.value.context[0]


def test_resume_of_a_run_that_never_committed_begins_at_the_start(tmp_path: Path) -> None:
    (tmp_path / names.RUN_YAML).write_text("a: 1")
    with prepare_run_directory(tmp_path, resume=True) as ready:
        assert ready.resume_from is None
        assert "step 0" in ready.messages[0]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    prepare_run_directory(tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    add_step(tmp_path / "out", 1)
    before = sorted(tmp_path.rglob("*"))
    assert prepare_run_directory(tmp_path / "out", resume=True, dry_run=True).resume_from is not None
    prepare_run_directory(tmp_path / "out", overwrite=True, dry_run=True)
    with pytest.raises(UserError, match="holds a run already"):
        prepare_run_directory(tmp_path / "out", dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before


# ---- F17, leftovers --------------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path: Path) -> None:
    """F17. Mutation: without the lock both write."""
    run = tmp_path / "out"
    first = prepare_run_directory(run)
    (run / names.RUN_YAML).write_text("a: 1")
    code, said = in_child(lambda say: prepare_run_directory(run, resume=True))
    assert code == 99
    assert f"another trainer (process {os.getpid()})" in said
    first.close()
    assert not (run / names.LOCK).exists()
    code, said = in_child(lambda say: (prepare_run_directory(run, resume=True), os.kill(os.getpid(), signal.SIGKILL)))
    assert code == -signal.SIGKILL
    assert (run / names.LOCK).exists()
    with prepare_run_directory(run, resume=True):
        assert (run / names.LOCK).read_text().strip() == str(os.getpid())
    (run / names.LOCK).write_text("999999999\n")
    prepare_run_directory(run, resume=True).close()


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    """F04: another living process may be in the middle of its commit."""
    dead = int(in_child(lambda say: say(str(os.getpid())))[1])
    living = os.getppid()
    for name in (f".tmp-step-3-{dead}", f".tmp-step-4-{os.getpid()}", f".tmp-step-5-{living}", f".tmp-mine-{dead}x", "tmp-step-6-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / f".tmp-run.yaml-{dead}").write_text("half")
    prepare_run_directory(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f".tmp-step-5-{living}", f".tmp-mine-{dead}x", "tmp-step-6-1"])


# ---- commit_directory ------------------------------------------------------------------------------------------------


def test_a_commit_refuses_an_existing_target(tmp_path: Path) -> None:
    for make in (lambda path: path.mkdir(), lambda path: path.write_text("x"), lambda path: path.symlink_to("nowhere")):
        target = tmp_path / "target"
        make(target)
        with pytest.raises(UserError, match="exists already"), commit_directory(target):
            pass
        commit.remove(target)
    step = add_step(tmp_path / "out", 1)
    with pytest.raises(UserError, match="exists already"):
        commit_step(tmp_path / "out", manifest_of(1), tensors={}, files={})
    assert faults_of(step) == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.EIO, "Input/output error")])
def test_an_error_while_filling_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fill() -> None:
        with commit_directory(tmp_path / "target") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").write_text("x")
            raise error

    with pytest.raises((KeyboardInterrupt, ValueError, WorkError)) as raised:
        fill()
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert isinstance(raised.value, WorkError)
        assert "Input/output error" in str(raised.value)


def test_a_committed_directory_keeps_its_subdirectories(tmp_path: Path) -> None:
    with commit_directory(tmp_path / "target", needed_bytes=10) as temporary:
        assert temporary.parent == tmp_path
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
    assert (tmp_path / "target" / "sub" / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    make_directory(tmp_path / "a" / "b" / "c")
    make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_committing_the_same_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """N17's half on disk: no time, no path, no order in a step's files."""
    first, second = add_step(tmp_path / "a", 5), add_step(tmp_path / "b", 5)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in EVERY_FILE)
    assert list(json.loads((first / names.MANIFEST).read_text()))[-1] == "sha256"
