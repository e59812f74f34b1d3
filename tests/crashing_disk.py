"""A disk that crashes: any call that changes it may be the last, and a power cut takes what was not synced."""

import builtins
import io
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Disk:
    """Counts every call that changes a disk below `root`, dies at the `crash_at`-th, and knows what a power cut would take.

    `lose`: None: the process dies (what was written stays). Else a random.Random: the machine dies. Files written since
    their last fsync are cut to nothing or to a random prefix, and entries of directories that were not fsynced since
    (new files, new directories, renames) are undone, from the newest back: all of them, or up to a random one.
    """

    def __init__(self, root: Path, crash_at: int | None = None, lose: random.Random | None = None) -> None:
        self.root, self.crash_at, self.lose = os.path.realpath(root), crash_at, lose
        self.calls: list[str] = []
        self.dirty: set[int] = set()  # inodes of files with unsynced contents
        self.pending: list[tuple[Any, ...]] = []  # unsynced entries, oldest first
        self.real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")}
        self.real_open = io.open

    def install(self) -> None:
        for name in self.real:
            setattr(os, name, getattr(self, f"os_{name}"))
        builtins.open = io.open = self.open_file  # type: ignore[assignment]

    def step(self, what: str, half: Callable[[], object] | None = None) -> None:
        """One more call; here the machine may die, half of a write done."""
        self.calls.append(what)
        if len(self.calls) == self.crash_at:
            if half:
                half()
            self.die()

    def die(self) -> None:
        if self.lose is not None:
            self.cut_power(self.lose)
        os._exit(137)

    # ---- what a power cut takes

    def cut_power(self, rng: random.Random) -> None:
        everything = rng.random() < 0.5
        for path in self.files():
            if os.stat(path).st_ino in self.dirty and (everything or rng.random() < 0.5):
                os.truncate(path, 0 if everything else rng.randint(0, os.path.getsize(path)))
        keep = 0 if everything else rng.randint(0, len(self.pending))
        for kind, *entry in reversed(self.pending[keep:]):
            self.undo(kind, *entry)

    def undo(self, kind: str, directory: int, name: str, old: tuple[str, bytes | None] | None = None) -> None:
        place = self.find(directory)
        if place is None:
            return  # its directory is gone with everything in it
        path = os.path.join(place, name)
        if kind == "rename":
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

    def open_file(self, path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if "w" not in mode or not self.mine(path):
            return self.real_open(path, mode, *more, **named)
        self.step(f"open {os.path.basename(path)}")
        if not os.path.exists(path):
            self.pending.append(("create", *self.entry(path)))
        file = self.real_open(path, mode, buffering=0)
        self.dirty.add(os.fstat(file.fileno()).st_ino)
        return Written(self, file)

    def os_fsync(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        self.step(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}")
        self.dirty.discard(inode)
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


class Everything(random.Random):
    """A power cut that takes all that it can."""

    def random(self) -> float:
        return 0.0


class Written:
    """A file open for writing, each write of which may be the last."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self.disk, self.file = disk, file

    def write(self, data: Any) -> int:
        raw = bytes(data)
        self.disk.step(f"write {os.path.basename(self.file.name)}", lambda: self.file.write(raw[: len(raw) // 2]))
        self.disk.dirty.add(os.fstat(self.file.fileno()).st_ino)
        return int(self.file.write(raw))

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


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
