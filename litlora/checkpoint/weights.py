"""From files to a model that computes: torch's side of a checkpoint.

The base is mapped, not read: a weight in its stored dtype takes no memory of this process until it is changed, and two processes
share it. (The map is private, so the file never changes; do not overwrite a base in place while a model of it lives.)
Everything is strict: a tensor too many, too few or of another shape is listed and nothing is loaded.
"""

import ctypes
import mmap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from litlora import cpu
from litlora.checkpoint import names
from litlora.checkpoint.base import check_fingerprint
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import Tensors
from litlora.config import Config
from litlora.console import counted
from litlora.errors import UserError
from litlora.families import expected_tensors, is_beyond, is_derived, learns, stored_name, tensor_name
from litlora.methods.attach import add, widen
from litlora.methods.tuning import EMBEDDING, HEAD
from litlora.model import GPT, Linear
from litlora.quantized import KINDS, hold, is_read_as_stored, quantized
from litlora.safetensors_file import SafetensorsFile

STORED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # torch's dtype: the file's


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    adapters: Sequence[tuple[Checkpoint, float]] = (),
    device: str | torch.device = "cpu",
    quantize: str = "none",
    as_stored: bool = False,
) -> GPT:
    """The model that a checkpoint means: a base as it is, a step or PEFT adapter added to its base.

    `dtype` of the base's weights (None: as stored), and of weights that were trained whole; what sits in slots is fp32. `adapters`:
    more of them, with the weights they are added with; each must belong to the same base. Of what is added nothing learns.
    `quantize`, `as_stored`: see `load_base`; `quantize_meant` and `for_answers` make them of what the user said.
    UserError where anything is missing, too much, of the wrong shape, or of another base.
    """
    base = checkpoint.base()
    for other, _ in adapters:
        check_same_base(other, base)
    on = [*([] if checkpoint.is_model else [(checkpoint, 1.0)]), *adapters]
    tunings = [other.tuning() for other, _ in on] if as_stored or quantize != "none" else []
    wide = {name for tuning in tunings for name in tuning.whole}
    model = load_base(base, dtype, device, quantize=quantize, wide=wide, as_stored=as_stored)
    if as_stored and quantize == "none":
        widen(model, [name for tuning in tunings for name in tuning.looked_at])
    for other, weight in on:
        put_on(model, other, weight)
    return model


def put_on(model: GPT, adapter: Checkpoint, weight: float = 1.0) -> None:
    """Add a step or PEFT adapter to the model of its base, counted `weight` times. UserError as `add`: the model is then as it was."""
    add(model, adapter.tuning(), adapter_tensors(adapter), weight, where=adapter.adapter_file())


def load_base(
    base: Checkpoint,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    quantize: str = "none",
    wide: Collection[str] = (),
    looked_up: bool = False,
    as_stored: bool = False,
) -> GPT:
    """A whole model, every parameter of it from the files, requiring gradients as a new one does.

    `quantize` bf16, int8, nf4 or nf4-dq: the Linears of the blocks hold their weights in few bits, which do not learn, all but those named
    in `wide`. It is done tensor by tensor, and none is kept wide. UserError where a weight that gets scales holds numbers that are
    not finite.
    `looked_up`: an embedding that is no head and not in `wide` stays as its file has it, in its map; its rows are made `dtype` when they
    are looked up. `as_stored`: so do head and embedding that are in bf16 there, and, with `quantize` none, Linears; nothing is rounded.
    """
    config, tensors = base.config(), base_tensors(base)
    as_it_is = {EMBEDDING} if looked_up and not config.tie_word_embeddings else set()
    if as_stored:
        as_it_is = {name for name in (EMBEDDING, HEAD) if name in tensors and is_read_as_stored(tensors[name])}
    as_it_is -= set(wide)
    with torch.device("meta"), NothingDrawn():
        model = GPT(config)
    with torch.no_grad():
        for name, tensor in tensors.items():
            module, _, attribute = name.rpartition(".")
            host = model.get_submodule(module)
            kind = "bf16" if as_stored and quantize == "none" and is_read_as_stored(tensor) else quantize
            if kind != "none" and isinstance(host, Linear) and attribute == "weight" and module != "lm_head" and name not in wide:
                hold(host, quantized(kind, tensor.to(device), f"{base.path}: {name}"))
                forget(tensor)
                continue
            value = tensor.to(device=device, dtype=dtype if learns(name) and name not in as_it_is else None)
            setattr(host, attribute, nn.Parameter(value, requires_grad=learns(name)))
            if value.data_ptr() != tensor.data_ptr():
                forget(tensor)
    model.tie()
    if as_it_is:
        model.model.dtype = dtype
    unset = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    assert not unset, f"no file fills {unset}"
    return model


def for_answers(word: str, dtype: torch.dtype, device: str) -> bool:
    """Whether a model that is to answer is loaded `as_stored`, where --quantize said `word`: unless that is none, on a CPU of which kernels
    of ours read bf16. The same numbers, in half the memory for them."""
    return word != "none" and dtype == torch.float32 and device == "cpu" and cpu.working() is not None


def quantize_meant(word: str, on: Sequence[Checkpoint]) -> str:
    """What --quantize means: itself, or (auto) what the first of the adapters was trained on. UserError of one that is not known here."""
    meant = next((adapter.quantize for adapter in on), "none") if word == "auto" else word
    if meant not in ("none", *KINDS):
        hint = "--quantize none, or a newer litlora, which may know it"
        raise UserError(f"was trained on a base in {meant}, which this litlora does not know", where=on[0].path if on else "", hint=hint)
    return meant


def base_tensors(base: Checkpoint) -> dict[str, Tensor]:
    """Every parameter of a whole model under the model's own names, mapped from its files. UserError listing what does not fit."""
    config = base.config()
    expected = expected_tensors(config)
    stored = mapped(base.shards())
    tensors = {tensor_name(name, config): tensor for name, tensor in stored.items() if not is_derived(name, config)}
    if len(tensors) < sum(not is_derived(name, config) for name in stored):
        raise UserError("a tensor is there twice, with and without the prefix model.", where=base.path)
    if config.tie_word_embeddings and HEAD in tensors:
        head, embedding = tensors.pop(HEAD), tensors.get(EMBEDDING)
        if embedding is not None and (head.shape != embedding.shape or not torch.equal(head, embedding)):
            what = f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings says that they are one"
            raise UserError(what, where=base.path / names.CONFIG, hint="set tie_word_embeddings to false if the head is right")
    faults = shape_faults({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    faults += [
        f"of dtype {tensor.dtype}: {name}" for name, tensor in tensors.items() if not tensor.is_floating_point() or tensor.itemsize < 2
    ]
    if faults:
        what = "\n".join([f"{counted(len(faults), 'tensor')} at fault; nothing was loaded", *(f"  {fault}" for fault in faults)])
        hint = f"the weights and {names.CONFIG} must belong together; download the model again"
        if any(is_beyond(name, config) for name in tensors):
            hint = "layers that predict further tokens are not read: litlora convert DIR --to hf --out_dir NEW leaves them out"
        raise UserError(what, where=base.path, hint=hint)
    return tensors


def adapter_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What a step or PEFT adapter holds, under the names of its file, mapped from it. Who uses them checks them (`by_parameter`)."""
    with safe_open_checked(checkpoint.adapter_file()) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict


def check_same_base(adapter: Checkpoint, base: Checkpoint) -> None:
    """UserError where an adapter is none, or was trained on another base. A PEFT adapter does not say what it was trained on."""
    if adapter.is_model:
        raise UserError("is a whole model; only adapters can be added", where=adapter.path)
    if adapter.manifest and adapter.manifest.base:
        check_fingerprint(base, adapter.manifest.base, adapter.path)


def as_files_name(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A whole model's parameters under the names of its family."""
    return {stored_name(name, config): tensor for name, tensor in tensors.items()}


def raw_tensors(tensors: Mapping[str, Tensor], *, copy: bool = False) -> Tensors:
    """For writing: name -> (dtype, shape, bytes). Tensors on the CPU are not copied unless asked, so write them before they change."""
    return {name: (STORED[tensor.dtype], tuple(tensor.shape), raw_bytes(tensor, copy)) for name, tensor in tensors.items()}


class NothingDrawn(TorchFunctionMode):
    """Modules made inside skip their initialisation: their numbers come from files. (On the meta device torch's own would import
    its compiler to draw nothing: three seconds and 66 MB at every start.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def forget(tensor: Tensor) -> None:
    """The pages of a mapped tensor that was copied leave this process's memory; looked at again, they come from the file."""
    page, start, end = mmap.PAGESIZE, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // page) * page, end // page * page  # whole pages: its neighbours' stay
    if tensor.device.type == "cpu" and hasattr(mmap, "MADV_DONTNEED") and first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


# ---- details ---------------------------------------------------------------------------------------------------------


def raw_bytes(tensor: Tensor, copy: bool = False) -> memoryview:
    flat = tensor.detach().to("cpu", copy=copy).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def mapped(shards: Mapping[str, Path]) -> dict[str, Tensor]:
    """Tensor name -> tensor over the map of its file."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(set(shards.values())):
        with safe_open_checked(path) as file:
            tensors |= {name: file.get_tensor(name) for name, home in shards.items() if home == path}
    return tensors


def safe_open_checked(path: Path) -> safe_open:
    """The file, whose header was checked before (`SafetensorsFile` refuses more, and names the file)."""
    with SafetensorsFile(path):
        return safe_open(path, framework="pt")


def shape_faults(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for each tensor that is missing, unexpected or of the wrong shape."""
    faults = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    faults += [f"unexpected: {name} {found[name]}" for name in found if name not in expected]
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    return faults + [f"wrong shape: {name} {found[name]}, needed {expected[name]}" for name in wrong]
