"""Commands in processes of their own, each begun in a hundredth of a second, with a fault that is waiting for it.

`Server` imports once what takes seconds to import and computes nothing; each command runs in a fork of it: a process that differs
from `python -m litlora ...` in nothing but how it began. Linux only (`/proc`).
"""

import contextlib
import gc
import json
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extensions.reliability import ROOT

FILLER = "filler"  # the foreign file on a full disk
LATEST = 120  # seconds after which a command counts as hanging


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a command's process. Nothing, by default."""

    crash_at: int | None = None  # the call to the disk that is the last
    lose: int | str | None = None  # "all" or a seed: power goes with it, and with it what was not synced. None: only the process
    root: str = ""  # the disk of these two: everything below this directory
    without_sync: str = ""  # files and directories whose path matches are not synced at all
    slow_sync: float = 0.0  # seconds that each fsync takes: a disk that is one
    largest_file: int | None = None  # RLIMIT_FSIZE, bytes
    as_nobody: bool = False  # without root's privileges, which ignore modes
    file_full: str = ""  # writing to the files whose path matches fails: the disk is full
    closed: tuple[int, ...] = ()  # of the outputs 1 and 2, those that are closed when it begins
    full: tuple[int, ...] = ()  # those that go to a full disk
    unheard_after: str = ""  # whoever reads the outputs is gone once he has heard this
    terminal: bool = False  # the outputs are a terminal
    fills_at: str = ""  # somebody else fills the disk in the moment in which a file whose path matches is opened to be written


class Process:
    """A command under way."""

    def __init__(self, server: "Server", words: list[str], fault: Fault) -> None:
        self.server, self.words, self.fault = server, words, fault
        self.heard = bytearray()
        self.held = -1  # the terminal's other end: without it there is no terminal before the command has opened it
        ear: int | str
        if fault.terminal:
            ear, self.held = pty.openpty()
            pipe = os.ttyname(self.held)
        else:
            ear = pipe = f"{server.place.name}/{server.started}.pipe"
            os.mkfifo(pipe)
        self.ears = threading.Thread(target=self._listen, args=(ear,), daemon=True)
        self.ears.start()
        self.pid = int(server.ask({"words": words, "fault": asdict(fault), "pipe": pipe}))

    def _listen(self, ear: int | str) -> None:
        with open(ear, "rb", buffering=0) as file, contextlib.suppress(OSError):  # a terminal's word for: the other end is closed
            while piece := file.read(65536):
                self.heard += piece
                if self.fault.unheard_after and self.fault.unheard_after in self.said:
                    break
        if isinstance(ear, str):
            os.unlink(ear)

    @property
    def said(self) -> str:
        """Both outputs, so far."""
        return self.heard.decode("utf-8", "replace")

    @property
    def committed(self) -> int:
        """The last step that it said was committed; 0 where it said none."""
        return max(map(int, re.findall(r"COMMITTED step=(\d+)", self.said)), default=0)

    @property
    def ended(self) -> bool:
        """Ended, and not yet waited for: its number is still its own."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def wait_for(self, reached: Callable[[], bool], seconds: float = LATEST, every: float = 0.001) -> bool:
        """Until `reached`, or until it ended: which of the two."""
        end = time.monotonic() + seconds
        while not reached():
            if self.ended or time.monotonic() > end:
                return reached()
            time.sleep(every)
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = LATEST) -> int:
        """Its exit code (a signal's number negative). A command that hangs is killed, and that is its exit code: -9."""
        if not self.wait_for(lambda: self.ended, seconds, every=0.005):
            self.kill()
        code = int(self.server.ask({"wait": self.pid}))
        if self.held >= 0:
            os.close(self.held)
        self.ears.join(5)
        return code


class Server:
    """Begins processes. A context."""

    def __init__(self) -> None:
        self.place = tempfile.TemporaryDirectory(prefix="litlora-server-")
        self.started = 0
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": f"{self.place.name}/cache", "NO_COLOR": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "extensions.reliability.processes"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.place.cleanup()

    def ask(self, question: dict[str, Any]) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def start(self, words: list[str], fault: Fault | None = None) -> Process:
        self.started += 1
        return Process(self, words, fault or Fault())

    def run(self, words: list[str], fault: Fault | None = None) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        process = self.start(words, fault)
        code = process.wait()
        return code, process.said


# ---- in the server's process -----------------------------------------------------------------------------------------


def serve() -> None:
    """Fork for each command; wait for one when asked to, so that until then its number is nobody else's."""
    import jsonargparse  # noqa: F401  what takes long
    import lightning_fabric.fabric  # noqa: F401
    import torch

    import litlora.commands.finetune
    import litlora.commands.generate
    import litlora.merge
    import litlora.parsing  # noqa: F401

    with contextlib.suppress(ImportError):  # an extra
        import gguf  # noqa: F401
    torch.set_num_threads(1)
    gc.freeze()  # what is here stays, in every fork
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        elif not (answer := os.fork()):
            child(question["words"], Fault(**question["fault"]), question["pipe"])
        answers.write(f"{answer}\n")
        answers.flush()


def child(words: list[str], fault: Fault, pipe: str) -> None:
    """Become the command. Never returns."""
    code = 99
    try:
        out = os.open(pipe, os.O_WRONLY | os.O_NOCTTY)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out, 1), os.dup2(out, 2), os.close(out)
        for number in fault.full:
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        for number in fault.closed:  # as Python finds them when it begins
            os.close(number)
            setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
        if fault.terminal:
            os.environ["TERM"] = "xterm"
        sys.argv = ["litlora", *words]
        disk = prepare(fault)
        from litlora.__main__ import main

        code = main(words)
        sys.stdout.flush()
        if disk is not None:
            os.write(1, f"\nCALLS {len(disk.calls)}\n".encode())
            if disk.lose is not None:
                disk.die()  # later, when nobody thinks of it any more, the power fails after all
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:
        os.write(2, f"the harness: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def prepare(fault: Fault) -> Any:
    """Put the fault in its place; the disk that crashes, if one does."""
    disk = None
    if fault.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest_file, fault.largest_file))
    if fault.as_nobody and os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if fault.root:
        from crashing_disk import Disk, Everything

        import litlora.merge

        lose = None if fault.lose is None else Everything() if fault.lose == "all" else random.Random(fault.lose)
        disk = Disk(Path(fault.root), fault.crash_at, lose)
        litlora.merge.exchange = disk.exchange  # type: ignore[assignment]
        disk.install()
    if fault.without_sync:
        skip_syncs(re.compile(fault.without_sync))
    if fault.file_full:
        watch_opened(re.compile(fault.file_full), lambda path: "/dev/full")  # stands in for a disk without room
    if fault.fills_at:
        watch_opened(re.compile(fault.fills_at), fill_its_disk)
    if fault.slow_sync:
        slow_down(fault.slow_sync)
    return disk


def slow_down(seconds: float) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        time.sleep(seconds)
        real(fd)

    os.fsync = fsync  # type: ignore[assignment]


def skip_syncs(left_out: re.Pattern[str]) -> None:
    """Without `fsync` for these."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if not left_out.search(os.readlink(f"/proc/self/fd/{fd}")):
            real(fd)

    os.fsync = fsync  # type: ignore[assignment]


def watch_opened(watched: re.Pattern[str], instead: Callable[[str], str]) -> None:
    """Where a file whose path matches is opened to be written, it is `instead` of it that is opened."""
    import builtins

    real = builtins.open

    def opened(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if set(mode) & set("wax+") and isinstance(path, str | os.PathLike) and watched.search(os.fspath(path)):
            path = instead(os.fspath(path))
        return real(path, mode, *more, **named)

    builtins.open = opened  # type: ignore[assignment]


def fill_its_disk(path: str) -> str:
    """A foreign file takes all the room there is on the disk of `path`; the path itself stays."""
    top = Path(path).parent
    while not top.is_mount():
        top = top.parent
    filler = os.open(top / FILLER, os.O_WRONLY | os.O_CREAT, 0o644)
    with contextlib.suppress(OSError):  # the disk is full
        while os.write(filler, bytes(2**20)):
            pass
    os.close(filler)
    return path


if __name__ == "__main__":
    serve()
