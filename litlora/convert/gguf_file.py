"""One GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): written tensor by tensor, and read again.

Numbers are laid out by the gguf package, which is the format's own reference in Python; which numbers, under which names, is decided
in gguf_model.py and gguf_adapter.py, and what the text's ids are in gguf_tokens.py.
"""

import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from litlora.convert.parts import ROUNDING, Floats, Part, beyond
from litlora.errors import UserError, WorkError
from litlora.safetensors_file import DTYPES

Q8_0 = "Q8_0"
BLOCK = 32  # numbers that share one scale in q8_0
WORDS = {**DTYPES, "q8_0": Q8_0}  # the option's word: GGML's type
ALIGNMENT = 32  # of the tensors' bytes, where general.alignment says nothing else
TEXT, LIST = 8, 9  # kinds of metadata: a string, an array
WIDTHS = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)  # of the other kinds, in bytes, by their numbers
Kept = Mapping[str, tuple[Part, str]]  # GGUF's name -> the tensor and the type it is stored as


def open_package() -> Any:
    """The gguf package. UserError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the gguf package, which is not installed", hint="pip install 'litlora[gguf]'") from error
    return gguf


def type_of(part: Part, dtype: str) -> str:
    """The GGML type to store a tensor as. Norms and biases stay fp32, as llama.cpp needs them; `keep`: as it is.

    q8_0 takes rows of whole blocks of 32; a matrix with other rows becomes float16.
    """
    if len(part.shape) < 2:
        return "F32"
    if dtype == "keep":
        return part.dtype if part.dtype in DTYPES.values() else "F32"
    return "F16" if dtype == "q8_0" and part.shape[-1] % BLOCK else WORDS[dtype]


def stored(part: Part, kind: str, name: str) -> "np.ndarray[Any, Any]":
    """The numbers as the file has them. WorkError where one is too large for its type, or none at all."""
    gguf = open_package()
    if kind == part.dtype and kind != "BF16":
        return part.bytes().view({"F32": np.float32, "F16": np.float16}[kind]).reshape(part.shape)
    if kind == part.dtype:
        return part.bytes().reshape(*part.shape[:-1], 2 * part.shape[-1])
    wide = part.float32()
    if not np.isfinite(wide).all():
        raise WorkError(f"{name} holds values that are not finite", hint="convert another copy, or an earlier step")
    if kind in ("F16", Q8_0) and (largest := float(np.abs(wide).max(initial=0))) > (limit := 65504.0 * (127 if kind == Q8_0 else 1)):
        raise WorkError(f"{name} reaches {largest:.4g}, and {kind.lower()} holds at most {limit:.4g}", hint="--dtype float32 or bfloat16")
    numbers: np.ndarray[Any, Any] = gguf.quants.quantize(wide, gguf.GGMLQuantizationType[kind])
    return numbers


def write_gguf(
    path: Path, arch: str, metadata: Callable[[Any], None], tensors: Kept, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Write `path`. `metadata` puts the keys into the package's writer; one tensor at a time is in memory.

    The tensors' bytes are written here: numpy's `tofile`, with which the package does it, says nothing where the disk is full.
    """
    gguf = open_package()
    writer = gguf.GGUFWriter(path, arch)
    try:
        metadata(writer)
        for name, (part, kind) in tensors.items():
            ggml = gguf.GGMLQuantizationType[kind]
            block, width = gguf.GGML_QUANT_SIZES[ggml]
            size = math.prod(part.shape) // block * width
            writer.add_tensor_info(name, part.shape, np.dtype(np.float32), size, raw_dtype=ggml)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with open(path, "ab") as file:
        file.write(bytes(-file.tell() % ALIGNMENT))
        for name, (part, kind) in tensors.items():
            numbers = np.ascontiguousarray(stored(part, kind, name))
            file.write(numbers.data)
            file.write(bytes(-numbers.nbytes % ALIGNMENT))
            progress(numbers.nbytes)


def file_bytes(tensors: Kept) -> int:
    """What the tensors take, roughly."""
    width = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, Q8_0: 34 / 32}
    return int(sum(math.prod(part.shape) * width[kind] + 64 for part, kind in tensors.values()))


def read_again(path: Path, tensors: Kept) -> dict[str, Any]:
    """The proof: every tensor of the file against its source. WorkError with the names of those that are further off than rounding."""
    gguf = open_package()
    found = tensors_in(path)
    faults = [f"{name} is missing" for name in tensors if name not in found]
    faults += [f"{name} was not asked for" for name in found if name not in tensors]
    equal = 0
    for name, (part, kind) in tensors.items():
        if name not in found:
            continue
        number, shape, data = found[name]
        if number != gguf.GGMLQuantizationType[kind] or shape != part.shape:
            faults.append(f"{name} is of type {number}, {shape}, not {kind} {part.shape}")
            continue
        before = part.float32()
        after = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(part.shape)
        why = beyond_q8_0(before, after) if kind == Q8_0 else beyond(before, after, *ROUNDING[kind])
        faults += [f"{name} {why}"] if why else []
        equal += bool(np.array_equal(before, after))
    if faults:
        raise WorkError("\n  ".join(["the file is not what it was made from:", *faults]), where=path, hint="report this")
    types = Counter(kind for _, kind in tensors.values())
    return {"tensors": len(found), "equal": equal, "rounded_once": len(found) - equal, "types": dict(sorted(types.items()))}


def tensors_in(path: Path) -> dict[str, tuple[int, tuple[int, ...], "np.ndarray[Any, Any]"]]:
    """Name -> (GGML's number for the type, shape, bytes) of a file that was just written. The metadata is walked over: the package's
    own reader takes half a minute for the strings of a large vocabulary."""
    whole = np.memmap(path, np.uint8, "r")
    view, place = whole.data, 0

    def take(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", view, place)
        place += struct.calcsize(form)
        return int(value)

    def text() -> str:
        nonlocal place
        length = take("Q")
        place += length
        return bytes(view[place - length : place]).decode()

    def step_over(kind: int, count: int = 1) -> None:
        nonlocal place
        if kind == TEXT:
            for _ in range(count):
                place += 8 + struct.unpack_from("<Q", view, place)[0]
        elif kind == LIST:
            step_over(take("I"), take("Q"))
        else:
            place += WIDTHS[kind] * count

    assert view[:4] == b"GGUF", path
    place = 8
    count, keys = take("Q"), take("Q")
    for _ in range(keys):
        text()
        step_over(take("I"))
    infos = []
    for _ in range(count):
        name, rank = text(), take("I")
        shape = tuple(take("Q") for _ in range(rank))[::-1]
        infos.append((name, shape, take("I"), take("Q")))
    start = place + -place % ALIGNMENT
    gguf, found = open_package(), {}
    for name, shape, kind, offset in infos:
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        rows = (*shape[:-1], shape[-1] // block * width)
        begin = start + offset
        found[name] = kind, shape, np.asarray(whole[begin : begin + math.prod(rows)]).reshape(rows)
    return found


def beyond_q8_0(before: Floats, after: Floats) -> str:
    """q8_0 stores 32 numbers as whole multiples of (their largest / 127), a scale that is rounded to fp16 itself."""
    blocks, found = before.reshape(-1, BLOCK), after.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1, keepdims=True).astype(np.float64)
    half_step, scale_error = largest / 254, largest * 2.0**-11 + 127 * 2.0**-25
    far = np.abs(blocks.astype(np.float64) - found) > (half_step + scale_error) * (1 + 2.0**-20)
    return f"is further from its source than q8_0 rounds, at {int(far.sum()):,} of {far.size:,} numbers" if far.any() else ""
