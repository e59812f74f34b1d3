"""Weights out of pickled files: the one place that opens such a file, and it runs no code of it.

torch's reader for weights alone knows how to rebuild tensors and plain containers; whatever else a file asks for is refused before
it is called (https://docs.pytorch.org/docs/stable/generated/torch.load.html, `weights_only`). Nothing else in litlora reads
pickles, and a test holds it.
"""

from pathlib import Path
from typing import Any

import torch

from litlora.checkpoint.weights import STORED, raw_bytes
from litlora.convert.parts import Part
from litlora.errors import UserError

ZIP = b"PK\x03\x04"  # what torch has written since 1.6; its older form cannot be mapped, and is read as a whole


def read_pickled(path: Path, *, inside: str = "") -> dict[str, Part]:
    """The tensors of one .bin, .pt or .pth file, by name. `inside`: the key of the dict that holds them, where the file has it.

    UserError where the file is damaged, asks for code to be run, or holds anything else than tensors.
    """
    with open(path, "rb") as file:
        zipped = file.read(len(ZIP)) == ZIP
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # of many kinds: what a damaged or hostile file makes its reader raise is not documented
        why = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        raise UserError(
            f"is no file of plain weights: {why.strip()[:160] or type(error).__name__}",
            where=path,
            hint="a file that asks for anything but tensors is not opened; use a copy in safetensors format from its author",
        ) from error
    if inside and isinstance(found, dict) and isinstance(found.get(inside), dict):
        found = found[inside]
    if not isinstance(found, dict) or not found:
        raise UserError(f"holds {type(found).__name__ if found else 'nothing'}, not tensors by name", where=path)
    return {checked_name(name, path): part_of(name, tensor, path) for name, tensor in found.items()}


def checked_name(name: Any, path: Path) -> str:
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"{name!r} is no name of a tensor", where=path)
    return name


def part_of(name: str, tensor: Any, path: Path) -> Part:
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{name} is no tensor but {type(tensor).__name__}", where=path, hint="convert the file of the weights alone")
    if tensor.layout != torch.strided or tensor.dtype not in STORED or tensor.is_quantized or tensor.is_meta:
        kind = f"{str(tensor.dtype).removeprefix('torch.')} {str(tensor.layout).removeprefix('torch.')}"
        raise UserError(f"{name} is stored as {kind}, which is not supported", where=path)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{name} claims to be larger than what is stored of it", where=path)
    return Part(dtype=STORED[tensor.dtype], shape=tuple(tensor.shape), load=lambda: raw_bytes(tensor))
