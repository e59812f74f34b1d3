"""The files of weights: as many as the base has, written while the base streams by."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from litlora.merge.plan import Plan, Target
from litlora.merge.tensors import BLOCK, GROUP, Moved, Update, Workspace, move, read_float32, write_at
from litlora.safetensors_file import SafetensorsFile, TensorInfo, header_bytes


def write_weights(plan: Plan, directory: Path, progress: Callable[[int], None]) -> dict[str, Moved]:
    """Every file of the base with the adapter in it, several tensors at a time."""
    workers = min(4, os.cpu_count() or 1)
    widest = max(info.shape[-1] for tensors in plan.files.values() for name, info in tensors.items() if name in plan.targets)
    spaces: SimpleQueue[Workspace] = SimpleQueue()
    for _ in range(workers):
        spaces.put(Workspace(max(BLOCK, GROUP * widest)))
    moved: dict[str, Moved] = {}
    done = 0
    with SafetensorsFile(plan.adapter) as adapter, ThreadPoolExecutor(workers) as pool:
        for path in plan.files:
            with SafetensorsFile(path) as source, new_file(plan, source, directory / path.name) as (sink, places):
                tasks = {
                    name: pool.submit(move_in_turn, spaces, name, source, sink, places[name], adapter, plan.targets.get(name))
                    for name in source.tensors
                }
                try:
                    for name, task in tasks.items():
                        moved[name] = task.result()
                        done += source.tensors[name].size
                        progress(done)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    return moved


def move_in_turn(
    spaces: SimpleQueue[Workspace],
    name: str,
    source: SafetensorsFile,
    sink: int,
    place: TensorInfo,
    adapter: SafetensorsFile,
    target: Target | None,
) -> Moved:
    """`move` in whichever workspace is free."""
    space = spaces.get()
    try:
        return move(name, source, sink, place, load_update(adapter, target), space)
    finally:
        spaces.put(space)


@contextmanager
def new_file(plan: Plan, source: SafetensorsFile, path: Path) -> Iterator[tuple[int, dict[str, TensorInfo]]]:
    """A descriptor to write `path` with, its header written, and where each tensor goes in it.

    Without a change of dtype the header is the base's, byte for byte. While the file fills up, the system already carries it to
    the disk: the sync at the end then has little left to wait for.
    """
    if plan.dtype is None:
        header, places = bytes(source.header()), source.tensors
    else:
        stored = {name: (plan.stored_dtype(name, info), info.shape) for name, info in source.tensors.items()}
        header, places = header_bytes(stored, source.metadata, keep_order=True)
    size = max((info.end for info in places.values()), default=len(header))
    sink = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    finished, sync = threading.Event(), getattr(os, "fdatasync", os.fsync)

    def carry() -> None:
        while not finished.wait(0.05):
            with suppress(OSError):  # the sync of the commit reports it
                sync(sink)

    carrier = threading.Thread(target=carry, daemon=True)
    try:
        reserve(sink, size)
        write_at(sink, header, 0)
        carrier.start()
        yield sink, places
    finally:
        finished.set()
        if carrier.ident is not None:
            carrier.join()
        os.close(sink)


def reserve(sink: int, size: int) -> None:
    """Take the whole space at once: a full disk shows before the work, and the file lies in one piece."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(sink, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # this file system has no such call
                raise
    os.ftruncate(sink, size)


def load_update(adapter: SafetensorsFile, target: Target | None) -> Update | None:
    """A target's tensors in fp32. The scale goes into b in fp64, so that it costs one rounding and no more."""
    if target is None:
        return None
    b = (read_float32(adapter, target.b).astype(np.float64) * target.scale).astype(np.float32)
    return Update(read_float32(adapter, target.a), b, read_float32(adapter, target.magnitude) if target.magnitude else None)
