"""The files of weights: as many as the base has, written while the base streams by."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from litlora.merge.outputs import LowRank, NewModel, Output, Rows
from litlora.merge.tensors import BLOCK, GROUP, Added, Floats, Journey, Moved, Scaled, Update, Workspace, move, read_float32, write_at
from litlora.safetensors_file import SafetensorsFile, TensorInfo, header_bytes

MB = 10**6


def write_weights(model: NewModel, adapter_file: Path | None, directory: Path, progress: Callable[[int], None]) -> dict[str, Moved]:
    """Every file of the new model, several tensors at a time; what happened to each tensor, by its name there."""
    workers = min(4, os.cpu_count() or 1)
    widest = max((output.shape[-1] for output in model if output.update is not None), default=0)
    spaces: SimpleQueue[Workspace] = SimpleQueue()
    for _ in range(workers):
        spaces.put(Workspace(max(BLOCK, GROUP * widest)))
    moved: dict[str, Moved] = {}
    done = 0
    with ExitStack() as stack:
        adapter = stack.enter_context(SafetensorsFile(adapter_file)) if adapter_file else None
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        for path, outputs in model.outputs.items():
            with SafetensorsFile(path) as base, new_file(outputs, base, directory / path.name) as (sink, places):
                tasks = {output: pool.submit(move_in_turn, spaces, output, places[output.name], sink, base, adapter) for output in outputs}
                try:
                    for output, task in tasks.items():
                        moved[output.name] = task.result()
                        before, done = done, done + output.size
                        if done // MB > before // MB:  # norms are many and small
                            progress(done)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    return moved


def move_in_turn(
    spaces: SimpleQueue[Workspace], output: Output, place: TensorInfo, sink: int, base: SafetensorsFile, adapter: SafetensorsFile | None
) -> Moved:
    """`move` in whichever workspace is free."""
    space = spaces.get()
    try:
        way = Journey(
            name=output.name,
            shape=output.shape,
            place=place,
            sink=sink,
            base=base,
            source=output.source,
            own=output.own,
            fill=output.fill or 0.0,
            adapter=adapter,
            value=output.value,
            update=load_update(adapter, output.update),
        )
        return move(way, space)
    finally:
        spaces.put(space)


@contextmanager
def new_file(outputs: tuple[Output, ...], base: SafetensorsFile, path: Path) -> Iterator[tuple[int, dict[str, TensorInfo]]]:
    """A descriptor to write `path` with, its header written, and where each tensor goes in it.

    Where the tensors are the base's by name, dtype and shape, so is the header, byte for byte. While the file fills up, the system
    already carries it to the disk: the sync at the end then has little left to wait for.
    """
    stored = {output.name: (output.dtype, output.shape) for output in outputs}
    if stored == {name: (info.dtype, info.shape) for name, info in base.tensors.items()}:
        header, places = bytes(base.header()), base.tensors
    else:
        header, places = header_bytes(stored, base.metadata)
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


def load_update(adapter: SafetensorsFile | None, update: LowRank | Rows | None, dtype: npt.DTypeLike = np.float32) -> Update | None:
    """An update's tensors, in fp32 or fp64. LoRA's scale goes into b in fp64, so that it costs one rounding and no more."""
    if adapter is None or update is None:
        return None

    def read(name: str) -> Floats:
        return read_float32(adapter, name).astype(dtype, copy=False)

    if isinstance(update, Rows):
        return Scaled(read(update.scale), read(update.shift) if update.shift else None)
    b = (read_float32(adapter, update.b).astype(np.float64) * update.factor).astype(dtype)
    return Added(read(update.a), b, read(update.magnitude) if update.magnitude else None)
