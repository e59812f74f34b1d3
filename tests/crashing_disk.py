"""A disk that crashes: any call that changes it may be the last, and a power cut takes what was not synced."""

import builtins
import io
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Disk:
    """Counts every call that changes a disk below `root`, dies at the `crash_at`-th, and knows what a power cut would take.

    `lose`: None: the process dies (what was written stays). Else a random.Random: the machine dies. Files written since
    their last fsync are cut to nothing or to a random prefix (what was only appended to, not below what was synced), and entries of
    directories that were not fsynced since (new files, new directories, renames) are undone, from the newest back: all of them, or
    up to a random one. A deletion is taken as lasting at once: what it must not come before is then lost.
    """

    def __init__(self, root: Path, crash_at: int | None = None, lose: random.Random | None = None) -> None:
        self.root, self.crash_at, self.lose = os.path.realpath(root), crash_at, lose
        self.calls: list[str] = []
        self.dirty: dict[int, int] = {}  # inodes of files with unsynced contents, and how many of their bytes are safe
        self.pending: list[tuple[Any, ...]] = []  # unsynced entries, oldest first
        self.real = {name: getattr(os, name) for name in CALLS if hasattr(os, name)}
        self.real_open = io.open
        self.one_at_a_time = threading.RLock()  # a thread that dies holds it for ever: nobody else goes on

    def install(self) -> None:
        for name in self.real:
            setattr(os, name, getattr(self, f"os_{name}"))
        builtins.open = io.open = self.open_file  # type: ignore[assignment]

    def step(self, what: str, half: Callable[[], object] | None = None) -> None:
        """One more call; here the machine may die, half of a write done."""
        with self.one_at_a_time:
            self.calls.append(what)
            if len(self.calls) == self.crash_at:
                if half:
                    half()
                self.die()

    def die(self) -> None:
        self.one_at_a_time.acquire()
        if self.lose is not None:
            self.cut_power(self.lose)
        os._exit(137)

    # ---- what a power cut takes

    def cut_power(self, rng: random.Random) -> None:
        everything = rng.random() < 0.5
        for path in self.files():
            safe = self.dirty.get(os.stat(path).st_ino)
            if safe is not None and (everything or rng.random() < 0.5):
                safe = min(safe, os.path.getsize(path))
                os.truncate(path, safe if everything else rng.randint(safe, os.path.getsize(path)))
        keep = 0 if everything else rng.randint(0, len(self.pending))
        for kind, *entry in reversed(self.pending[keep:]):
            self.undo(kind, *entry)

    def undo(self, kind: str, directory: int, name: str, old: tuple[str, bytes | None] | None = None) -> None:
        place = self.find(directory)
        if place is None:
            return  # its directory is gone with everything in it
        path = os.path.join(place, name)
        if kind == "exchange":
            assert old is not None
            swap(path, os.path.join(place, old[0]))
        elif kind == "rename":
            assert old is not None
            self.real["rename"](path, os.path.join(place, old[0]))
            if old[1] is not None:
                with self.real_open(path, "wb") as file:
                    file.write(old[1])
        elif os.path.isdir(path):
            subprocess.run(["rm", "-r", path], check=True)
        elif os.path.exists(path):
            self.real["unlink"](path)

    def find(self, inode: int) -> str | None:
        return next((here for here, _, _ in os.walk(self.root) if os.stat(here).st_ino == inode), None)

    def files(self) -> Iterator[str]:
        for here, _, found in os.walk(self.root):
            yield from (os.path.join(here, name) for name in found)

    # ---- the calls

    def mine(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.realpath(os.path.dirname(path) or ".").startswith(self.root)

    def entry(self, path: str | os.PathLike[str]) -> tuple[int, str]:
        return os.stat(os.path.dirname(path)).st_ino, os.path.basename(path)

    def os_open(self, path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT and self.mine(path):
            self.step(f"open {os.path.basename(path)}")
            if not os.path.exists(path):
                self.pending.append(("create", *self.entry(path)))
        return self.real["open"](path, flags, *more, **named)

    def open_file(self, path: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or not self.mine(path):
            return self.real_open(path, mode, buffering, *more, **named)
        self.step(f"open {os.path.basename(path)}")
        if not os.path.exists(path):
            self.pending.append(("create", *self.entry(path)))
        if "b" not in mode:  # a text is encoded here, and written as one piece or in halves
            return Text(Written(self, self.real_open(path, f"{mode}b", buffering=0)), named.get("encoding") or "utf-8")
        return Written(self, self.real_open(path, mode, buffering=0))

    def spoil(self, fd: int, start: int) -> None:
        """What lies in the file from byte `start` on is no longer safe."""
        inode = os.fstat(fd).st_ino
        with self.one_at_a_time:
            self.dirty[inode] = min(start, self.dirty.get(inode, start))

    def inside(self, fd: int) -> str:
        """The name of an open file below the root, else nothing."""
        path = os.readlink(f"/proc/self/fd/{fd}")
        return os.path.basename(path) if path.startswith(self.root) else ""

    def os_write(self, fd: int, data: Any) -> int:
        if name := self.inside(fd):
            self.step(f"write {name}", lambda: self.real["write"](fd, bytes(data)[: len(data) // 2]))
            self.spoil(fd, os.lseek(fd, 0, os.SEEK_CUR))
        return int(self.real["write"](fd, data))

    def os_pwrite(self, fd: int, data: Any, start: int) -> int:
        if name := self.inside(fd):
            self.step(f"pwrite {name}", lambda: self.real["pwrite"](fd, bytes(data)[: len(data) // 2], start))
            self.spoil(fd, start)
        return int(self.real["pwrite"](fd, data, start))

    def os_copy_file_range(self, source: int, sink: int, count: int, start: int, place: int) -> int:
        if name := self.inside(sink):
            self.step(f"copy {name}", lambda: self.real["copy_file_range"](source, sink, count // 2, start, place))
            self.spoil(sink, place)
        return int(self.real["copy_file_range"](source, sink, count, start, place))

    def os_posix_fallocate(self, fd: int, start: int, size: int) -> None:
        if name := self.inside(fd):
            self.step(f"fallocate {name}")
            self.spoil(fd, start)
        self.real["posix_fallocate"](fd, start, size)

    def os_ftruncate(self, fd: int, size: int) -> None:
        if name := self.inside(fd):
            self.step(f"ftruncate {name}")
            self.spoil(fd, size)
        self.real["ftruncate"](fd, size)

    def os_fdatasync(self, fd: int) -> None:
        """Counts for nothing here: how often a helper thread calls it is a matter of time, and what matters is the last fsync."""

    def os_fsync(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        self.step(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}")
        with self.one_at_a_time:
            self.dirty.pop(inode, None)
            self.pending = [one for one in self.pending if one[1] != inode]

    def os_rename(self, old: Any, new: Any, call: str = "rename") -> None:
        if not self.mine(new):
            return self.real[call](old, new)
        self.step(f"{call} {os.path.basename(old)} {os.path.basename(new)}")
        replaced = Path(new).read_bytes() if os.path.isfile(new) else None
        self.real[call](old, new)
        assert os.path.dirname(old) == os.path.dirname(new)
        self.pending.append(("rename", *self.entry(new), (os.path.basename(old), replaced)))
        return None

    def os_replace(self, old: Any, new: Any) -> None:
        self.os_rename(old, new, "replace")

    def exchange(self, new: Any, old: Any) -> None:
        """For `litlora.merge.exchange`, which calls the kernel past Python."""
        self.step(f"exchange {os.path.basename(new)} {os.path.basename(old)}")
        swap(new, old)
        self.pending.append(("exchange", *self.entry(old), (os.path.basename(new), None)))

    def os_unlink(self, path: Any, **named: Any) -> None:
        self.step(f"unlink {path}")
        self.real["unlink"](path, **named)

    def os_rmdir(self, path: Any, **named: Any) -> None:
        self.step(f"rmdir {path}")
        self.real["rmdir"](path, **named)

    def os_mkdir(self, path: Any, *more: Any, **named: Any) -> None:
        self.step(f"mkdir {os.path.basename(path)}")
        self.real["mkdir"](path, *more, **named)
        self.pending.append(("create", *self.entry(path)))


CALLS = (
    "open", "write", "pwrite", "copy_file_range", "posix_fallocate", "ftruncate", "fsync", "fdatasync", "rename", "replace", "unlink",
    "rmdir", "mkdir",
)  # fmt: skip


def swap(first: str, second: str) -> None:
    """The names of two directories, as one step: nobody watches in between."""
    aside = f"{first}.aside"
    for old, new in ((first, aside), (second, first), (aside, second)):
        subprocess.run(["mv", "-T", old, new], check=True)


class Everything(random.Random):
    """A power cut that takes all that it can."""

    def random(self) -> float:
        return 0.0


class Written:
    """A file open for writing, each write of which may be the last."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self.disk, self.file = disk, file
        if "w" in file.mode:
            disk.spoil(file.fileno(), 0)

    def write(self, data: Any) -> int:
        raw = bytes(data)
        self.disk.step(f"write {os.path.basename(self.file.name)}", lambda: self.file.write(raw[: len(raw) // 2]))
        start = os.fstat(self.file.fileno()).st_size if "a" in self.file.mode else self.file.tell()
        self.disk.spoil(self.file.fileno(), start)
        return int(self.file.write(raw))

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Text(Written):
    """The same for texts."""

    def __init__(self, file: Written, encoding: str) -> None:
        self.disk, self.file, self.encoding = file.disk, file, encoding

    def write(self, data: Any) -> int:
        self.file.write(data.encode(self.encoding))
        return len(data)


def in_child(work: Callable[[Callable[[str], None]], object]) -> tuple[int, str]:
    """Run `work(say)` in a forked process; its exit code and all that it said (each word arrives before the next call)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            work(lambda text: os.write(writer, text.encode()) and None)
            os._exit(0)
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
            os._exit(99)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said
