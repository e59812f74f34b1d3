"""Commits beside training: what is saved is copied, and one thread writes the copy while training goes on.

The ranks agree at every turn, for one that waits alone waits for ever: no commit begins before all of them have reached it, and an error
of the first, which alone writes, ends all of them.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from litlora.console import warn
from litlora.errors import WorkError
from litlora.train.plan import Position
from litlora.train.ranks import over_ranks

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What `fit` hands over when a checkpoint is due: where training stands and what it measured there."""

    position: Position
    loss: float
    val_loss: float | None  # None: not measured at this step


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A commit ready to be written."""

    write: Callable[[], object]  # durable once it returns
    after: Callable[[], object] = lambda: None  # what is done in the background once that is said: older steps go
    in_background: bool = True  # it writes from copies, so training may go on meanwhile


class Saver:
    """One commit at a time. A context: at its end, whatever the reason, the commit in flight is waited for, and none is lost unsaid.

    `prepare` is called on the first rank. It looks at what is to be saved and copies it; what it raises ends all ranks.
    """

    def __init__(self, fabric: "Fabric", prepare: Callable[[Commit], Prepared], durable: int, say: Callable[[str], None]) -> None:
        self.fabric, self.prepare, self.say = fabric, prepare, say
        self.durable = durable  # the newest step known to be on the disk; on other ranks, the newest they heard of
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self.flight: tuple[Commit, Prepared, Future[object]] | None = None
        self.tidying: Future[object] | None = None  # what comes after the newest durable commit

    def save(self, commit: Commit) -> None:
        """Begin to commit, once the earlier commit is done. Called on every rank; WorkError and the like on every rank."""
        prepared, failure = None, None
        if self.fabric.is_global_zero:
            try:
                self._settle()
                prepared = self.prepare(commit)
            except Exception as error:  # whatever it is, the other ranks must not wait for what will not come
                failure = error
        wait = prepared is not None and not prepared.in_background
        waits = self._agree(failure, wait)
        if prepared is not None:
            self.flight = commit, prepared, self.thread.submit(self._write, prepared)
        if waits:
            self.finish()

    def look(self) -> bool:
        """Whether the commit in flight has failed. One that has succeeded is said. Waits for nothing."""
        if self.flight is None or not self.flight[2].done():
            return False
        if self.flight[2].exception() is not None:
            return True
        self._settle()
        return False

    def finish(self) -> None:
        """Wait for the commit in flight and what comes after it. Called on every rank; its error is raised on every rank."""
        failure = None
        try:
            self._end()
        except Exception as error:
            failure = error
        self._agree(failure)

    def newest(self) -> int:
        """The newest step that is on the disk, once the commit in flight is done; 0: none. Called on every rank; raises nothing."""
        if self.flight is not None and self.flight[2].exception() is None:
            self._settle()
        here = self.durable if self.fabric.is_global_zero else 0
        return int(over_ranks(self.fabric, torch.tensor(here)).item())

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.finish()
            else:
                self._end()
        except Exception as failure:
            if error is None:
                raise
            warn(f"the checkpoint on its way was not committed either: {failure}")  # the first error is the one to report
        finally:
            self.thread.shutdown()

    def _write(self, prepared: Prepared) -> None:
        """In the thread: what came after the earlier commit is done by now, and must have gone well."""
        if self.tidying is not None:
            self.tidying.result()
        prepared.write()

    def _settle(self) -> None:
        """Wait for the commit in flight, say that it is durable, and begin what comes after it. Raises its error, once."""
        if self.flight is None:
            return
        (commit, prepared, future), self.flight = self.flight, None
        future.result()
        self.durable = commit.position.step
        self.say(f"COMMITTED step={self.durable}" + ("" if commit.val_loss is None else f" val_loss={commit.val_loss:.4f}"))
        self.tidying = self.thread.submit(prepared.after)

    def _end(self) -> None:
        """Wait for all that was begun. Raises its error, once."""
        self._settle()
        tidying, self.tidying = self.tidying, None
        if tidying is not None:
            tidying.result()

    def _agree(self, failure: Exception | None, wait: bool = False) -> bool:
        """Whether the first rank wants all to wait. Raises on every rank where it failed."""
        failed, waiting = over_ranks(self.fabric, torch.tensor([float(failure is not None), float(wait)])).tolist()
        if failure is not None:
            raise failure
        if failed:
            raise WorkError("the first process could not commit a checkpoint")
        return bool(waiting)


def free_memory(system: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may still take without harm, roughly: what Linux and every control group (v2) around it have left.

    `own` says in which group below `groups` it is. Elsewhere a quarter of what the machine has.
    """
    if not system.exists():
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    free = 1024 * numbers(system.read_text())["MemAvailable:"]
    lines = own.read_text().splitlines() if own.exists() else []
    place = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    for group in (groups / place, *(groups / place).parents):
        if group == groups.parent:
            break
        if (group / "memory.max").exists():
            limit = (group / "memory.max").read_text().strip()
            cached = numbers((group / "memory.stat").read_text())  # pages of files, which the system gives back when they are wanted
            used = int((group / "memory.current").read_text()) - cached["active_file"] - cached["inactive_file"]
            free = free if limit == "max" else min(free, max(0, int(limit) - used))
    return free


def numbers(text: str) -> dict[str, int]:
    """`name number` lines."""
    return {words[0]: int(words[1]) for line in text.splitlines() if len(words := line.split()) > 1}
