"""`python -m extensions.reliability --trials 200`: trials of every fault, and a table of what was lost. Exit code 1: something was."""

import argparse
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue

from extensions.reliability import alterations, others, runs, writers
from extensions.reliability.place import Place, make_place, scratch
from extensions.reliability.processes import Server
from extensions.reliability.tally import KINDS, Tally, table

PARTS = 4  # in which the long rounds are done, so that one that is stopped has tried something of each
PACKAGES = ("torch", "lightning-fabric", "numpy", "safetensors")
MACHINE = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def faults(trials: int, share: int) -> list[Callable[[Place], Tally]]:
    """What is tried; `trials` is the size of the random ones, and of the exhaustive ones each `share`-th point is tried."""
    found: list[Callable[[Place], Tally]] = [
        partial(runs.signals, count=trials // 2),
        partial(runs.kills, count=trials, inside=trials // 4),
        partial(others.full_disks, count=trials // 8),
        partial(alterations.of_a_step, seeds=64),
        partial(alterations.of_a_merged_model, seeds=64),
        partial(runs.file_limits, count=trials // 4),
        alterations.by_the_commands,
        alterations.merged_by_the_commands,
        partial(others.two_trainers, count=trials // 20),
        others.closed_places,
        others.full_logs,
        others.unwritable_outputs,
        others.broken_values,
    ]
    found += [
        partial(crash_points, lose=lose, keep=keep, share=share, part=part)
        for part in range(PARTS)
        for keep in ("", "best,last,1")
        for lose in ("all", None, 1)
    ]
    for writer in writers.WRITERS:
        found += [partial(writers.crashes, writer=writer, lose=lose, share=share) for lose in (None, "all", 1)]
        found += [partial(writers.kills, writer=writer, count=trials // 8), partial(writers.file_limits, writer=writer, count=trials // 10)]
        found.append(partial(writers.read_only, writer=writer))
    return [*found, left_out_syncs]


def crash_points(place: Place, lose: int | str | None, share: int, keep: str, part: int) -> Tally:
    """One of PARTS, each spread over the whole run. `keep`: old steps are deleted on the way."""
    root, more = place.fresh("crash"), ("--train.keep", keep) if keep else ()
    calls = runs.calls_of(place, place.finetune(root / "out", runs.STEPS, *more), root)
    points = [*range(1 + part * share, calls + 1, PARTS * share)]
    tally = runs.crashes(place, lose, points if part else [0, *points], "", *more)
    tally.name += f", --train.keep {keep}" if keep else ""
    if part == 0:
        tally.notes["calls in one run"] = calls
    return tally


def left_out_syncs(place: Place) -> Tally:
    """The other way round: without any one fsync, the power-cut trial must see a loss, or it sees nothing at all."""
    tally = Tally("without one fsync, a power cut is noticed (a loss here: it was not)")
    for name, pattern in runs.SYNCED.items():
        with tally.trial():
            seen = runs.crashes(place, "all", [0], pattern).losses
            tally.expect("undetected", bool(seen), f"a run without the fsync of {name}")
    for writer in writers.WRITERS:
        for pattern in writer.synced:
            with tally.trial():
                seen = writers.crashes(place, writer, "all", [0], pattern).losses
                tally.expect("undetected", bool(seen), f"{writer.name} without the fsync of {pattern}")
    return tally


class Results:
    """The JSON and the table, written anew after each fault: a round that is stopped keeps what it has."""

    def __init__(self, directory: Path, count: int) -> None:
        self.began, self.count = time.strftime("%Y-%m-%d %H:%M:%S"), count
        self.path = directory / f"{self.began.replace(' ', '-').replace(':', '')}.json"
        self.tallies: dict[str, Tally] = {}  # by name
        self.done = 0
        self.one_at_a_time = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, tally: Tally) -> None:
        with self.one_at_a_time:
            tell(tally)
            self.done += 1
            self.tallies.setdefault(tally.name, Tally(tally.name)).add(tally)
            facts = {
                "date": self.began,
                "machine": MACHINE,
                "versions": {name: version(name) for name in PACKAGES},
                "disk": "in memory (tmpfs)" if str(scratch_parent()).startswith("/dev/shm") else "on disk",
                "faults tried": f"{self.done} of {self.count}",
                "kinds of loss": KINDS,
                "faults": [vars(tally) for tally in self.tallies.values()],
            }
            self.path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
            self.path.with_suffix(".md").write_text(self.text())

    def text(self) -> str:
        packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        where = "files in memory (tmpfs)" if str(scratch_parent()).startswith("/dev/shm") else "files on disk"
        tried = f"{self.done} of {self.count} faults tried"
        return f"{self.began}, {MACHINE}, {packages}; {where}; {tried}.\n\n{table(list(self.tallies.values()))}\n"


def job(waiting: "SimpleQueue[Callable[[Place], Tally]]", results: Results) -> None:
    """One server and one place, for as long as there is something to try."""
    path = scratch()
    try:
        with Server() as server:
            place = make_place(path, server)
            while True:
                try:
                    fault = waiting.get_nowait()
                except Empty:
                    break
                results.add(fault(place))
    finally:
        shutil.rmtree(path, ignore_errors=True)


def tell(tally: Tally) -> None:
    lost = f"LOSSES {dict(tally.losses)}" if tally.losses else "no loss"
    print(
        f"{time.strftime('%H:%M:%S')} {tally.name}: {tally.trials} trials, {lost}, {tally.seconds:.0f} s", file=sys.__stderr__, flush=True
    )
    for example in tally.examples[:5]:
        print(f"    {example}", file=sys.__stderr__, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m extensions.reliability", description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="size of the random trials (kills; the others are fractions of it)")
    parser.add_argument("--share", type=int, default=1, help="try each SHARE-th point of the exhaustive ones")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at the same time")
    parser.add_argument(
        "--only", nargs="*", default=[], help="words that a fault's code name must contain (kills, crashes, merge_lora ...)"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="where the JSON and the table go")
    options = parser.parse_args()
    chosen = [
        fault for fault in faults(options.trials, options.share) if not options.only or any(word in repr(fault) for word in options.only)
    ]
    results = Results(options.results, len(chosen))
    waiting: SimpleQueue[Callable[[Place], Tally]] = SimpleQueue()
    for fault in chosen:
        waiting.put(fault)
    with ThreadPoolExecutor(options.jobs) as pool:
        for ended in [pool.submit(job, waiting, results) for _ in range(options.jobs)]:
            ended.result()
    print(results.text())
    return int(any(tally.losses for tally in results.tallies.values()))


def scratch_parent() -> Path:
    path = scratch()
    path.rmdir()
    return path.parent


if __name__ == "__main__":
    sys.exit(main())
