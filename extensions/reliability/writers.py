"""Faults in the commands that write something beside a run: what they make is whole or not there, and what was there before stays."""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from extensions.reliability import ROOT
from extensions.reliability.place import Place, temporaries
from extensions.reliability.processes import Fault
from extensions.reliability.runs import STEPS
from extensions.reliability.tally import Tally
from litlora.checkpoint import names

Tree = dict[str, bytes]  # a file's path below a directory, or "" for a file itself -> its bytes


@dataclass(frozen=True)
class Writer:
    """A command that makes `target`, in a directory of its own."""

    name: str
    words: Callable[[Place, Path], list[str]]
    synced: tuple[str, ...] = ()  # patterns: without any one of these fsyncs a power cut loses something
    before: Callable[[Place, Path], list[str]] | None = None  # makes what is there before, which stays until the new one is complete
    inside: str = ""  # the target, where the command chooses it: below the directory that it is given


def step_of(place: Place, number: int = STEPS) -> Path:
    return place.undisturbed(STEPS) / names.step_name(number)


def noted(place: Place, target: Path) -> Path:
    """A step to write notes about, beside nothing else."""
    if not target.parent.exists():
        shutil.copytree(step_of(place), target.parent)
    return target.parent


WEIGHTS = rf"/\.tmp-[^/]+/{names.WEIGHTS}$"
MERGE = [rf"/\.tmp-[^/]+/{name}$" for name in (names.CONFIG, names.TOKENIZER, names.CHAT_TEMPLATE, names.README, names.MERGE_REPORT)]
DIRECTORIES = (r"/\.tmp-[^/]+$", r"/made$")
WRITERS = [
    Writer(
        "merge_lora", lambda place, target: ["merge_lora", str(step_of(place)), "--out_dir", str(target)], (WEIGHTS, *MERGE, *DIRECTORIES)
    ),
    Writer(
        "merge_lora --overwrite",
        lambda place, target: ["merge_lora", str(step_of(place)), "--out_dir", str(target), "--overwrite"],
        (WEIGHTS, *MERGE),
        before=lambda place, target: ["merge_lora", str(step_of(place, 2)), "--out_dir", str(target)],
    ),
    Writer(
        "expand",
        lambda place, target: ["expand", str(place.base), "--out_dir", str(target), "--n_insert", "1"],
        (WEIGHTS, MERGE[0], MERGE[1], MERGE[3], *DIRECTORIES),
    ),
    Writer(
        "extend_vocab",
        lambda place, target: [
            *("extend_vocab", str(place.base), "--out_dir", str(target), "--vocab_size", "300"),
            *("--data", str(ROOT / "tutorials" / "tang_poems.jsonl")),
        ],
        (WEIGHTS, rf"/\.tmp-[^/]+/{names.EXTEND_REPORT}$", *DIRECTORIES),
    ),
    Writer(
        "combine",
        lambda place, target: ["combine", str(step_of(place, 2)), str(step_of(place)), "--out_dir", str(target)],
        (rf"/{names.ADAPTER_WEIGHTS}$", rf"/{names.ADAPTER_CONFIG}$", rf"/{names.COMBINE_REPORT}$", rf"/{names.MANIFEST}$", *DIRECTORIES),
    ),
    Writer(
        "combine --whole",
        lambda place, target: ["combine", str(step_of(place, 2)), str(step_of(place)), "--whole", "--out_dir", str(target)],
        (WEIGHTS, MERGE[0], MERGE[1], rf"/{names.COMBINE_REPORT}$", *DIRECTORIES),
    ),
    Writer(
        "convert to peft",
        lambda place, target: ["convert", str(step_of(place)), "--to", "peft", "--out_dir", str(target)],
        (rf"/{names.ADAPTER_WEIGHTS}$", rf"/{names.ADAPTER_CONFIG}$", rf"/{names.CONVERT_REPORT}$", *DIRECTORIES),
    ),
    Writer(
        "convert to hf",
        lambda place, target: ["convert", str(place.base), "--to", "hf", "--out_dir", str(target)],
        (WEIGHTS, MERGE[0], MERGE[1], rf"/{names.CONVERT_REPORT}$", *DIRECTORIES),
    ),
    *(  # what the extra `gguf` adds
        Writer(
            f"convert {what} to gguf",
            lambda place, target, of=of: ["convert", str(of(place)), "--to", "gguf", "--out_dir", str(target)],  # type: ignore[misc]
            (rf"/{what}-f32\.gguf$", rf"/{names.CONVERT_REPORT}$", *DIRECTORIES),
        )
        for what, of in (("model", attrgetter("base")), ("adapter", step_of))
        if find_spec("gguf")
    ),
    Writer(
        "note",
        lambda place, target: ["note", str(noted(place, target)), "new words " * 100],
        (r"/\.tmp-note\.md-", r"/made$"),
        before=lambda place, target: ["note", str(noted(place, target)), "old words"],
    ),
]


def tree(path: Path) -> Tree | None:
    """Everything below, or None where nothing is."""
    if path.is_file():
        return {"": path.read_bytes()}
    if not path.is_dir():
        return None
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


class Bench:
    """One writer's place: `made/` with the target in it, as it was before and as the command makes it."""

    def __init__(self, place: Place, writer: Writer) -> None:
        self.place, self.writer = place, writer
        self.parent = place.path / f"writer-{re.sub(r'[^a-z]+', '-', writer.name)}" / "made"
        self.target = self.parent / (names.NOTE if writer.name == "note" else "target")
        self.reset()
        self.others = [path.name for path in self.parent.iterdir()] if self.parent.exists() else []
        self.old = tree(self.target)
        self.calls = 0
        code, said = place.server.run(self.words, Fault(root=str(self.parent.parent)))
        assert code == 0, said
        self.calls = int(said.split("CALLS ")[1])
        self.new = tree(self.target)
        assert self.new not in (None, self.old)
        self.kept = self.parent.parent.with_name(f"{self.parent.parent.name}-before")
        self.reset(first=True)

    @property
    def words(self) -> list[str]:
        return self.writer.words(self.place, self.target)

    def reset(self, first: bool = False) -> None:
        """As it was before the command."""
        kept = self.parent.parent.with_name(f"{self.parent.parent.name}-before")
        shutil.rmtree(self.parent.parent, ignore_errors=True)
        if kept.exists():
            shutil.copytree(kept, self.parent.parent)
            return
        self.parent.parent.mkdir()
        if self.writer.name != "note":
            self.parent.mkdir()
        if self.writer.before:
            code, said = self.place.server.run(self.writer.before(self.place, self.target))
            assert code == 0, said
        if self.writer.name == "note":
            noted(self.place, self.target)
        shutil.copytree(self.parent.parent, kept)

    def judge(self, tally: Tally, done: bool, words: str) -> None:
        """Old or new, never half; new, where it was said to be done."""
        found = tree(self.target)
        tally.expect("torn", found in (self.old, self.new), f"{words}: {differences(found, self.new)}")
        if done:
            tally.expect("lost", found == self.new, f"{words}: it was said to be done")
        if self.old is not None:
            tally.expect("lost", found is not None, f"{words}: what was there before is gone")

    def again(self, tally: Tally, words: str) -> None:
        """The same command afterwards: it makes the same, and clears away what the dead one left."""
        complete = tree(self.target) == self.new
        code, said = self.place.server.run(self.words)
        refused = complete and code == 2 and ("exists already" in said or "holds a merged model already" in said)
        tally.expect("exit code", code == 0 or refused, f"{words}: again: {code}: {said}")
        tally.expect("differs", tree(self.target) == self.new, f"{words}: again: {differences(tree(self.target), self.new)}")
        left = [name for name in temporaries(self.parent) if self.writer.name != "note"]  # a note's is the next run's to remove
        tally.expect("left over", refused or not left, f"{words}: {left}")

    def said_done(self, said: str) -> bool:
        place = self.parent if self.writer.name == "note" else self.target
        return f"\n{place}\n" in f"\n{said}"


def bench_of(place: Place, writer: Writer) -> Bench:
    """Made once in a place."""
    if writer.name not in place.benches:
        place.benches[writer.name] = Bench(place, writer)
    bench: Bench = place.benches[writer.name]
    return bench


def differences(found: Tree | None, wanted: Tree | None) -> str:
    if found is None or wanted is None:
        return "nothing is there"
    return f"{sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))} differ"


def crashes(
    place: Place, writer: Writer, lose: int | str | None, points: Iterable[int] | None = None, without_sync: str = "", share: int = 1
) -> Tally:
    """It dies at each of its calls (or at every `share`-th, or at those of `points`); 0: after it."""
    kind = "the process dies" if lose is None else "the power fails"
    tally = Tally(f"{writer.name}: {kind} at each call to the disk")
    bench = bench_of(place, writer)
    for point in points if points is not None else [0, *range(1, bench.calls + 1, share)]:
        with tally.trial():
            bench.reset()
            seed = lose * 10_000 + point if isinstance(lose, int) else lose
            fault = Fault(crash_at=point or None, lose=seed, root=str(bench.parent.parent), without_sync=without_sync)
            code, said = place.server.run(bench.words, fault)
            if point and "CALLS" in said:
                continue
            if tally.expect("exit code", code in (0, 137), f"call {point}: {code}: {said}"):
                bench.judge(tally, bench.said_done(said), f"call {point}")
                if not without_sync:
                    bench.again(tally, f"call {point}")
    return tally


def kills(place: Place, writer: Writer, count: int, seed: int = 0) -> Tally:
    """Kill -9 at a random time."""
    tally, rng = Tally(f"{writer.name}: kill -9"), random.Random(seed)
    bench = bench_of(place, writer)
    for number in range(count):
        with tally.trial():
            bench.reset()
            process = place.server.start(bench.words, Fault(slow_sync=0.05))
            if number % 4:
                process.wait_for(lambda: bool(temporaries(bench.parent)))
                time.sleep(rng.uniform(0, 0.15))
            else:
                time.sleep(rng.uniform(0, 0.4))
            process.kill()
            code = process.wait()
            tally.notes["inside the writing"] += bool(temporaries(bench.parent))
            tally.expect("exit code", code in (0, -signal.SIGKILL), f"kill {number}: {code}: {process.said}")
            bench.judge(tally, bench.said_done(process.said), f"kill {number}")
            bench.again(tally, f"kill {number}")
    return tally


def file_limits(place: Place, writer: Writer, count: int) -> Tally:
    """RLIMIT_FSIZE: no file may become larger than so many bytes."""
    tally = Tally(f"{writer.name}: a file may not grow (RLIMIT_FSIZE)")
    bench = bench_of(place, writer)
    assert bench.new is not None
    largest = max(map(len, bench.new.values()))
    for number in range(count):
        with tally.trial():
            bench.reset()
            limit = largest * number // count
            code, said = place.server.run(bench.words, Fault(largest_file=limit))
            words = f"limit {limit}: {code}: {said}"
            tally.expect("exit code", code == 1 and re.search(r"[\d,]+ bytes needed, [\d,]+ free", said) is not None, words)
            tally.expect("torn", tree(bench.target) == bench.old, f"{words}: {differences(tree(bench.target), bench.old)}")
            tally.expect("left over", not temporaries(bench.parent), f"{words}: {temporaries(bench.parent)}")
            bench.again(tally, words)
    return tally


def read_only(place: Place, writer: Writer) -> Tally:
    """The place may not be written to (F08): refused with its name, never a success without a file."""
    tally = Tally(f"{writer.name}: read-only")
    bench = bench_of(place, writer)
    with tally.trial():
        bench.reset()
        bench.parent.chmod(0o555)
        code, said = place.server.run(bench.words, Fault(as_nobody=True))
        bench.parent.chmod(0o755)
        words = f"{code}: {said}"
        tally.expect("exit code", code in (1, 2) and said.count("error: ") == 1 and str(bench.parent) in said, words)
        tally.notes[f"exit code {code}"] += 1
        tally.expect("torn", tree(bench.target) == bench.old, words)
        tally.expect("left over", not temporaries(bench.parent), words)
    return tally
