"""Safetensors files without torch: a strict reader over a memory map, a writer, and the way from stored numbers to fp32 and back.

The format (https://github.com/huggingface/safetensors): 8 bytes, the header's length N as a little-endian integer; N bytes of
JSON, `{name: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": {str: str}}`; then the tensors' bytes, which
cover the rest of the file exactly. Whatever differs from that is refused with the file's name: a header is the one part of a
model that is parsed, and the file may come from anywhere.
"""

import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from litlora.console import counted
from litlora.errors import UserError

Raw = bytes | bytearray | memoryview | npt.NDArray[Any]  # a tensor's bytes, little-endian, row-major

# Bits of one element. An unknown dtype is refused: the size of its tensors could not be checked.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
FLOAT_BYTES: dict[str, int] = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # those that can be computed with here

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what a model may be stored in, as config.json says it: as a file does

# 16 MB describe 150,000 tensors; the largest published shards hold some thousands. The format's own limit of 100 MB would cost
# a gigabyte of memory to parse.
HEADER_LIMIT = 16 * 2**20
DIMENSIONS_LIMIT = 32
LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes `start` to `end` of the file (counted from its first byte)."""

    dtype: str  # the format's name: F32, BF16, ...
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


class SafetensorsFile:
    """One file, open for reading. `tensors` is in the order of the bytes; `bytes(name)` reads nothing until it is looked at.

    Raises UserError naming the file where it is missing, no regular file, cut short, or its header is not exactly sound.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = _open_regular(self.path)
        self._map: mmap.mmap | None = None
        try:
            self.size = os.fstat(self._fd).st_size  # bytes of the whole file
            header = _read_header(self.path, self._fd, self.size)
            self.data_start = 8 + len(header)  # where the first tensor's bytes begin
            self.tensors, self.metadata = _parse_header(self.path, header, self.size)
        except BaseException:
            self.close()
            raise

    def bytes(self, name: str) -> memoryview:
        """The tensor's bytes, read-only, straight from the memory map."""
        info = self.tensors[name]
        if self._map is None:
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        return memoryview(self._map)[info.start : info.end]

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor in fp32."""
        info = self.tensors[name]
        return to_float32(self.bytes(name), info.dtype, info.shape)

    def parts(self, name: str, buffer: memoryview) -> Iterator[memoryview]:
        """The tensor's bytes in order, each part read into `buffer`: memory stays flat, whatever the tensor's size."""
        info = self.tensors[name]
        for start in range(info.start, info.end, max(1, len(buffer))):
            part = buffer[: info.end - start]
            self.read_into(start, part)
            yield part

    def header(self) -> bytearray:
        """Everything before the first tensor."""
        buffer = bytearray(self.data_start)
        self.read_into(0, memoryview(buffer))
        return buffer

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `start` on. Unlike the map, this leaves no pages in this process's memory."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], start + done)
            if count == 0:
                raise UserError("the file became shorter while it was read", where=self.path)
            done += count

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Close the file. Views that were handed out stay valid: the map lives as long as they do."""
        self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# ---- reading the header ----------------------------------------------------------------------------------------------


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file; a FIFO or a device is refused before anything waits on it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise UserError(f"cannot be opened: {error.strerror}", where=path) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError("is no regular file", where=path)
    return fd


def _read_header(path: Path, fd: int, size: int) -> bytes:
    """The JSON's bytes."""
    first = os.pread(fd, 8, 0)
    if len(first) < 8:
        raise _not_sound(path, f"{counted(size, 'byte is', 'bytes are')} too few for a safetensors file")
    (length,) = struct.unpack("<Q", first)
    if length > size - 8:
        raise _not_sound(path, f"its header claims {counted(length, 'byte')}, but the file has {size:,}")
    if length > HEADER_LIMIT:
        raise UserError(f"its header has {length:,} bytes; at most {HEADER_LIMIT:,} are read", where=path)
    header = os.pread(fd, length, 8)
    if len(header) < length or not header.startswith(b"{"):
        raise _not_sound(path, "its header is no JSON object")
    return header


def _parse_header(path: Path, header: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise _not_sound(path, f"its header names {twice!r} twice")
        return found

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise _not_sound(path, f"its header cannot be read as JSON ({error})") from error
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _not_sound(path, "its header's __metadata__ is no map from text to text")
    data_start = 8 + len(header)
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position, before = data_start, "the header"
    for name, info in tensors.items():
        if info.start != position:
            raise _not_sound(path, f"tensor {name!r} {'overlaps' if info.start < position else 'leaves a hole after'} {before!r}")
        position, before = info.end, name
    if position > size:
        raise UserError(
            f"the file is cut short: it has {counted(size, 'byte')}, its header needs {position:,}",
            where=path,
            hint="copy or download this file again",
        )
    if position < size:
        raise _not_sound(
            path, f"{counted(size - position, 'byte after the last tensor belongs', 'bytes after the last tensor belong')} to none"
        )
    return tensors, metadata


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _not_sound(path, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _not_sound(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _whole_numbers(shape) or len(shape) > DIMENSIONS_LIMIT:
        raise _not_sound(path, f"tensor {name!r} has a shape that is no list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _not_sound(path, f"tensor {name!r} has data_offsets that are no range")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        needed = counted(-(-bits // 8), "byte")
        raise _not_sound(path, f"tensor {name!r} of {dtype} {shape} needs {needed}, its range has {offsets[1] - offsets[0]:,}")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(value: object) -> bool:
    """Whether it is a list of integers from 0 on (JSON's `true` is none, though Python takes it for 1)."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= LARGEST for number in value)


def _not_sound(path: Path, what: str) -> UserError:
    return UserError(f"no sound safetensors file: {what}", where=path, hint="copy or download this file again")


# ---- writing ---------------------------------------------------------------------------------------------------------


def header_bytes(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None, *, keep_order: bool = False
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file (length and JSON) and where each tensor (name -> dtype, shape) goes.

    Wide dtypes first, then by name, so that every tensor is aligned to its element and equal tensors give equal files;
    `keep_order` leaves the order as given. The header is padded with spaces to a multiple of 8.
    """
    order = list(tensors) if keep_order else sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name][0]], name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    infos = {
        name: TensorInfo(tensors[name][0], tuple(tensors[name][1]), *(data_start + offset for offset in entries[name]["data_offsets"]))
        for name in order
    }
    return struct.pack("<Q", len(text)) + text, infos


def write_safetensors(
    path: str | Path, tensors: Mapping[str, tuple[str, Sequence[int], Raw]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write name -> (dtype, shape, bytes) as one file. Equal input gives equal bytes. Syncing is the committer's work."""
    with open(path, "wb") as file:
        for part in safetensors_parts(tensors, metadata):
            file.write(part)


def safetensors_parts(
    tensors: Mapping[str, tuple[str, Sequence[int], Raw]], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of such a file, in order: its header, then a part for each tensor, none of them copied."""
    header, infos = header_bytes({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}, metadata)
    yield header
    for name, info in infos.items():
        raw = _flat(tensors[name][2])
        assert raw.nbytes == info.size, f"{name}: {raw.nbytes} bytes for {info.dtype} {info.shape}"
        yield raw.data


def _flat(raw: Raw) -> npt.NDArray[np.uint8]:
    """The same memory as a row of bytes."""
    if isinstance(raw, np.ndarray):
        return np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    return np.frombuffer(raw, dtype=np.uint8)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def to_float32(raw: Raw, dtype: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Stored numbers (F16, BF16, F32, F64) as a new fp32 array; exact, except F64, which is rounded."""
    flat = _flat(raw)
    if dtype == "BF16":
        wide = flat.view(np.uint16).astype(np.uint32)
        wide <<= 16  # a bf16 is the upper half of an fp32
        return wide.view(np.float32).reshape(shape)
    return flat.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(np.float32).reshape(shape)


def from_float32(array: npt.NDArray[np.floating[Any]], dtype: str) -> bytes:
    """fp32 (or fp64) numbers as stored ones of `dtype` (F16, BF16, F32, F64), rounded once to the nearest, ties to even.

    What is too large becomes infinite; NaN stays NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return array.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).tobytes()
        assert array.dtype == np.float32, "bf16 is rounded from fp32: from fp64 it would be rounded twice"
        bits = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
        rounded = (bits >> 16) & 1  # 1 where the kept half is odd: then a tie goes up
        rounded += 0x7FFF
        rounded += bits
        halves = np.ascontiguousarray((rounded >> 16).astype(np.uint16))
        nan = np.isnan(array).reshape(-1)
        if nan.any():  # the carry would have made infinities or zeros of them
            halves[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x0040
        return halves.tobytes()
