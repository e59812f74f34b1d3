"""Doing what a Tuning says: attach it to learn, save and load what was learnt, put trained ones on for use, take all off again.

`attach` freezes a model and adds a fresh tuning; from then on the parameters that learn are exactly the tensors that a checkpoint
holds. `add` puts a trained one on, several if wanted, which does not learn. `remove` gives the base back.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from litlora.config import Config, expanded_config
from litlora.errors import UserError
from litlora.families import learns, tensor_name, with_biases
from litlora.methods.tuning import EMBEDDING, HEAD, BottleneckSlot, LoRASlot, PromptSlot, ScaleShiftSlot, Slot, Tuning
from litlora.model import (
    GPT,
    MLP,
    SLOTS,
    Adapter,
    Attention,
    Block,
    Bottleneck,
    Composed,
    DoRA,
    Experts,
    Linear,
    LoRA,
    PiSSA,
    Prompt,
    ScaleShift,
    silent_copy,
    wider,
)
from litlora.peft import check_tensors, copied_base_tensor
from litlora.quantized import Quantized, hold

NOT_KEPT = "this model is being trained whole, and what its weights were is not kept"

# ---- training --------------------------------------------------------------------------------------------------------


def attach(model: GPT, tuning: Tuning, *, seed: int | None, stored: Mapping[str, Tensor] | None = None) -> None:
    """Freeze `model` and give it a fresh `tuning`, which changes nothing yet and is all that learns; it is kept in at least fp32.

    `stored`: the base's tensors as its files hold them, where `model` is computed in a narrower dtype: what is trained starts from them.
    `seed` None: shapes are all that counts (the meta device), and nothing is drawn.

    The same seed gives a slot the same numbers whatever else is adapted, on every device; torch's own random state is
    left as it was. UserError where the model carries something already.
    """
    carrying = [f"{name}.{slot}".lstrip(".") for name, module, slot in slots_in(model) if getattr(module, slot) is not None]
    if carrying:
        raise UserError(f"{carrying[0]} holds something already", hint="merge it first, or remove it")
    refuse_few_bits(model, tuning.whole)
    model.plain = NOT_KEPT if tuning.whole else snapshot(model)
    model.requires_grad_(False)
    computed = model.model.dtype or model.model.embed_tokens.weight.dtype
    if tuning.untied:
        untie(model)
    for layer in tuning.inserted:
        block = blocks(model)[layer]
        block.inserted = silent_copy(block)
        for name, parameter in list(block.inserted.named_parameters()):
            silent = model.config.silence(name) is not None
            exact = parameter.detach() if silent else as_stored(f"model.layers.{layer}.{name}", parameter, stored)
            set_parameter(block.inserted, name, nn.Parameter(widened(exact), requires_grad=learns(name)))
    for slot, kind in tuning.slots.items():
        host = model.get_submodule(slot.rpartition(".")[0])
        put_in(model, slot, made(host, kind) if seed is None else fresh(model, slot, kind, seed))
    for name in tuning.whole:
        set_parameter(model, name, nn.Parameter(widened(as_stored(name, model.get_parameter(name), stored)), requires_grad=learns(name)))
    if tuning.whole:
        model.tie()
    if model.model.embed_tokens.weight.dtype != computed:
        model.model.dtype = computed


def refuse_few_bits(model: GPT, whole: Sequence[str]) -> None:
    """A weight in few bits cannot be trained, nor be replaced by one that was; one that is to be stays wide when it is loaded."""
    for name in whole:
        host = model.get_submodule(name.rpartition(".")[0])
        if isinstance(host, Linear) and host.quantized is not None and name.endswith(".weight"):
            what = f"is held in {host.quantized.kind}, and here it is trained whole"
            raise UserError(what, where=name, hint="load the model with --quantize none")


def as_stored(name: str, parameter: Tensor, stored: Mapping[str, Tensor] | None) -> Tensor:
    """A parameter of the base in the precision of its file; a separated head is the embedding there."""
    return parameter.detach() if stored is None else stored.get(name, stored[EMBEDDING]).to(parameter.device)


def widened(tensor: Tensor) -> Tensor:
    """A copy in at least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def fresh(model: GPT, slot: str, kind: Slot, seed: int) -> Adapter:
    """What sits in `slot` before training: it says the same as its host."""
    host = model.get_submodule(slot.rpartition(".")[0])
    device = next(host.parameters()).device
    digest = hashlib.sha256(f"{seed}:{slot.removesuffix('.adapter')}".encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        if isinstance(kind, LoRASlot) and kind.init == "pissa":
            torch.manual_seed(number % 2**63)  # for torch's approximate SVD; what others draw when they are made is written over here
        adapter = made(host, kind)
        generator = torch.Generator().manual_seed(number)
        if isinstance(kind, LoRASlot):
            refuse_zero_rows(slot, host, kind)
            start_lora(adapter, kind, generator)
        elif isinstance(adapter, Bottleneck):
            adapter.down.weight.copy_(uniform(adapter.down.weight, generator))
        elif isinstance(adapter, Prompt):
            adapter.adaption_prompt.copy_(torch.empty(adapter.adaption_prompt.shape).normal_(generator=generator))
    return adapter.train(host.training)


def refuse_zero_rows(slot: str, host: nn.Module, kind: LoRASlot) -> None:
    if kind.use_dora and isinstance(host, Linear) and bool((torch.linalg.vector_norm(host.wide(), dim=1) == 0).any()):
        what = "has rows of zeros, whose direction DoRA cannot learn"
        raise UserError(what, where=slot.rpartition(".")[0], hint="LoRA can: leave use_dora out, or leave this module out of the targets")


def made(host: nn.Module, kind: Slot) -> Adapter:
    """The module that computes what `kind` describes."""
    if isinstance(kind, LoRASlot):
        assert isinstance(host, Linear)
        of = DoRA if kind.use_dora else PiSSA if kind.init == "pissa" else LoRA
        return of(host, kind.r, kind.alpha, kind.dropout, kind.use_rslora)
    if isinstance(kind, ScaleShiftSlot):
        assert isinstance(host, Linear)
        return ScaleShift(host)
    if isinstance(kind, PromptSlot):
        assert isinstance(host, Attention)
        return Prompt(host, kind.length)
    assert isinstance(kind, BottleneckSlot) and isinstance(host, Attention | MLP | Experts)
    return Bottleneck(host, kind.width, kind.scale, kind.activation, kind.parallel)


def start_lora(adapter: Adapter, kind: LoRASlot, generator: torch.Generator) -> None:
    """A uniform as in PEFT and B zero; orthogonal: rows of A and columns of B from two halves of one orthogonal basis."""
    assert isinstance(adapter, LoRA)
    if kind.init == "orthogonal":
        r = kind.r
        basis = torch.linalg.qr(torch.empty(r, r).normal_(generator=generator)).Q  # (R, R)
        for_a = torch.empty(adapter.lora_A.size(1), r // 2).normal_(generator=generator)  # (in, R / 2)
        for_b = torch.empty(adapter.lora_B.size(0), r // 2).normal_(generator=generator)  # (out, R / 2)
        adapter.lora_A.copy_((for_a @ basis[0::2]).t() / 10)  # a tenth: as PEFT
        adapter.lora_B.copy_(for_b @ basis[1::2] / 10)
    elif kind.init == "default":
        adapter.lora_A.copy_(uniform(adapter.lora_A, generator))


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(like.shape), a=math.sqrt(5), generator=generator)


def trainable(model: GPT) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name: what the optimizer gets, and what a checkpoint holds."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- saving and loading ----------------------------------------------------------------------------------------------


def tuned_state(model: GPT, tuning: Tuning, base: Config) -> dict[str, Tensor]:
    """The tensors of the tuning's file, in the model's order; those that are stored as they are share memory with the parameters."""
    return {stored: stored_form(model, name).detach() for stored, name in tuning.file_names(base).items()}


def stored_form(model: GPT, name: str) -> Tensor:
    module, _, part = name.rpartition(".")
    host = model.get_submodule(module)
    if isinstance(host, LoRA) and part in ("lora_A", "lora_B"):
        return host.matrices()[part == "lora_B"]
    return model.get_parameter(name)


def load_tuned_state(model: GPT, tuning: Tuning, tensors: Mapping[str, Tensor], where: str | Path, base: Config) -> None:
    """Write a file's `tensors` into the tuning attached to `model`; `where` is that file, for messages.

    UserError that lists every missing, unexpected and wrongly shaped tensor at once; the model is then as it was.
    """
    values = by_parameter(model, tuning, tensors, where, base)
    with torch.no_grad():
        for name, tensor in values.items():
            module, _, part = name.rpartition(".")
            host = model.get_submodule(module)
            if isinstance(host, PiSSA) and part in ("lora_A", "lora_B"):
                load_pissa(host, part, tensor)
            else:
                model.get_parameter(name).copy_(tensor)


def load_pissa(adapter: PiSSA, part: str, tensor: Tensor) -> None:
    """Undo `PiSSA.matrices`: A0 and dA, dB and B0 + dB. What B0 loses to rounding the training state restores (`frozen_state`)."""
    r = len(adapter.start_A)
    if part == "lora_A":
        adapter.start_A.copy_(tensor[:r])
        adapter.lora_A.copy_(tensor[r:])
    else:
        adapter.lora_B.copy_(tensor[:, :r])
        adapter.start_B.copy_(tensor[:, r:] - tensor[:, :r])


def frozen_state(model: GPT) -> dict[str, Tensor]:
    """What goes with the trained parameters and is not among them, nor exactly in their file: where PiSSA started."""
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in model.named_modules()
        if isinstance(module, PiSSA)
        for part in ("start_A", "start_B")
    }


def by_parameter(model: GPT, tuning: Tuning, tensors: Mapping[str, Tensor], where: str | Path, base: Config) -> dict[str, Tensor]:
    """A file's tensors by the parameter they are for, once they are known to be exactly the tuning's. A matrix under two names must
    be the same under both."""
    kept = {name: tensor for name, tensor in tensors.items() if not (tuning.in_peft and is_copy_of_base(model, name, tensor, where))}
    check_tensors({name: tuple(tensor.shape) for name, tensor in kept.items()}, tuning.file_shapes(base), where)
    values: dict[str, Tensor] = {}
    for stored, name in tuning.file_names(base).items():
        tensor = kept[stored]
        if not tensor.is_floating_point():
            raise UserError(f"{stored} holds {str(tensor.dtype).removeprefix('torch.')}, no floating-point numbers", where=where)
        if name in values and not torch.equal(values[name], tensor):
            raise UserError(f"{stored} differs from the embedding, which it is to share a matrix with", where=where)
        values[name] = tensor
    return values


def is_copy_of_base(model: GPT, name: str, tensor: Tensor, where: str | Path) -> bool:
    """Whether a tensor repeats the base's, as PEFT's files do when the head has LoRA. One that differs is refused."""
    copied = copied_base_tensor(name)
    copied = tensor_name(copied, model.config) if copied else None
    host = linears(model).get(copied.removesuffix(".weight")) if copied else None
    if host is None:
        return False
    if host.quantized is not None:
        raise UserError(f"{name} repeats the base's {copied}, which is held in {host.quantized.kind}", where=where, hint="--quantize none")
    plain = host.weight if model.plain in (None, NOT_KEPT) else model.plain.parameters.get(copied, model.plain.head)
    if tensor.shape != plain.shape or not torch.equal(tensor.to(plain), plain):
        raise UserError(f"{name} is not the base's {copied}: the adapter was trained on another base", where=where)
    return True


# ---- composition -----------------------------------------------------------------------------------------------------


def add(model: GPT, tuning: Tuning, tensors: Mapping[str, Tensor], weight: float = 1.0, *, where: str | Path = "adapter") -> None:
    """Add a trained tuning to whatever `model` carries, counted `weight` times.

    In a slot w_i (adapter_i(host, x, y) - y) adds up; of a parameter that was trained whole, w_i (W_i - W). Nothing of it learns, and
    trained weights take the dtype of the model's. UserError as in `load_tuned_state`, or where what was trained cannot be weighted
    or combined (DoRA, inserted blocks); the model is then as it was.
    """
    if model.plain is None:
        model.plain = snapshot(model)
    refuse_lost_base(model)
    before = snapshot(model)
    base: Config = model.plain.config
    try:
        refuse_few_bits(model, tuning.whole)
        values = by_parameter(model, tuning, tensors, where, base)
        if tuning.inserted and (weight != 1.0 or any(block.inserted is not None for block in blocks(model))):
            raise UserError("inserted blocks cannot be weighted or combined with others", where=where, hint="merge them into a base first")
        if tuning.untied and model.config.tie_word_embeddings:
            untie(model)
        for layer in tuning.inserted:
            block = blocks(model)[layer]
            block.inserted = silent_copy(block).requires_grad_(False)
        for slot, kind in tuning.slots.items():
            join(model, slot, kind, values, weight)
        if EMBEDDING in tuning.whole and base.tie_word_embeddings and not tuning.untied and not model.config.tie_word_embeddings:
            values[HEAD] = values[EMBEDDING]  # an earlier one separated what this one trained as a single matrix
        for name, tensor in values.items():
            if name in (*tuning.whole, HEAD):
                tensor = combined(model, name, tensor, weight)
            elif ".inserted." not in name:
                continue
            dtype = model.get_parameter(name).dtype
            dtype = torch.promote_types(dtype, model.model.dtype or dtype)  # narrower may be what is stored, not what was trained
            set_parameter(model, name, nn.Parameter(tensor.to(device=model.lm_head.weight.device, dtype=dtype), requires_grad=False))
        model.tie()
        refuse_mixtures(model, where)
    except BaseException:
        put_back(model, before)
        raise


def join(model: GPT, slot: str, kind: Slot, values: Mapping[str, Tensor], weight: float) -> None:
    """Put a trained adapter into its slot, beside what is there. One adapter of weight 1 stays what it is."""
    host = model.get_submodule(slot.rpartition(".")[0])
    adapter: Adapter = fresh(model, slot, kind, seed=0).requires_grad_(False)
    for name, parameter in adapter.named_parameters():
        parameter.copy_(values[f"{slot}.{name}"])
    held = getattr(host, slot.rpartition(".")[2])
    if held is not None or weight != 1.0:
        earlier = [] if held is None else parts_of(held)
        weights = [] if held is None else list(held.weights) if isinstance(held, Composed) else [1.0]
        adapter = Composed([*earlier, adapter], [*weights, weight]).train(host.training)
    put_in(model, slot, adapter)


def parts_of(held: Adapter) -> list[Adapter]:
    """The adapters in a slot."""
    return [cast(Adapter, part) for part in held.adapters] if isinstance(held, Composed) else [held]


def combined(model: GPT, name: str, tensor: Tensor, weight: float) -> Tensor:
    """A parameter of the base with `weight` times what its training changed, on top of what others changed already."""
    now, plain = model.get_parameter(name), model.plain.parameters.get(name, model.plain.head)  # a shared head has no name there
    if weight == 1.0 and now.data_ptr() == plain.data_ptr():
        return tensor
    return wider(now) + weight * (tensor.to(now.device) - wider(plain))


def refuse_mixtures(model: GPT, where: str | Path) -> None:
    """What is added to a Linear must not depend on weights that something else replaced: only LoRA's update does not."""
    for name, host in linears(model).items():
        parts = [] if host.adapter is None else parts_of(host.adapter)
        plain = model.plain.parameters.get(f"{name}.weight")
        replaced = plain is not None and plain.data_ptr() != host.weight.data_ptr()
        if replaced and any(type(part) is not LoRA for part in parts):
            raise UserError(f"{name} was trained whole, so {type(parts[-1]).__name__} on it cannot be combined with that", where=where)


# ---- as it was -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """What a model is made of at one moment. It holds references, so it takes no memory of its own."""

    config: Config
    dtype: torch.dtype | None
    slots: Sequence[tuple[nn.Module, str, nn.Module | None]]
    parameters: Mapping[str, nn.Parameter]  # of the base, each under its first name
    few: Mapping[str, Quantized]  # which Linears of the base hold instead of a weight
    head: nn.Parameter


def snapshot(model: GPT) -> Snapshot:
    """For `put_back`."""
    held = [(module, slot, getattr(module, slot)) for _, module, slot in slots_in(model)]
    inside = (*(f".{slot}." for slot in SLOTS), ".quantized.")  # few bits never change
    own = {name: parameter for name, parameter in model.named_parameters() if not any(part in f".{name}" for part in inside)}
    few = {name: host.quantized for name, host in linears(model).items() if host.quantized is not None}
    return Snapshot(model.config, model.model.dtype, held, own, few, cast(nn.Parameter, model.lm_head.weight))


def put_back(model: GPT, before: Snapshot) -> None:
    """Whatever was attached, added or replaced since: as it was then."""
    for module, slot, held in before.slots:
        setattr(module, slot, held)
    model.config, model.model.dtype = before.config, before.dtype
    for name, host in linears(model).items():
        few = before.few.get(name)
        if few is not None and few is not host.quantized:
            hold(host, few)
        host.quantized = few  # a weight comes back with the other parameters
    for name, parameter in before.parameters.items():
        set_parameter(model, name, parameter)
    model.lm_head.weight = before.head


def remove(model: GPT) -> None:
    """Leave the base as it was before anything was added to it. UserError where its weights were replaced to be trained whole."""
    refuse_lost_base(model)
    if model.plain is not None:
        put_back(model, model.plain)


def widen(model: GPT, names: Iterable[str]) -> None:
    """Weights of a plain model that are held in bf16, wide, so that what was trained whole can take their place, and DoRA measure them. To
    be put back as any other change."""
    for name in names:
        host = model.get_submodule(name.rpartition(".")[0])
        if isinstance(host, Linear) and host.quantized is not None and host.quantized.kind == "bf16":
            hold(host, None)
            host.requires_grad_(False)
        elif host is model.lm_head and model.model.dtype is not None:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(model.model.dtype), requires_grad=False)


def refuse_lost_base(model: GPT) -> None:
    if model.plain == NOT_KEPT:
        raise UserError(NOT_KEPT, hint="load the step that was saved of it: its base is beside it then")


@contextmanager
def restored(model: GPT) -> Iterator[None]:
    """Whatever is added or removed inside, afterwards the model is as it was, also after an exception."""
    before = snapshot(model)
    try:
        yield
    finally:
        put_back(model, before)


@contextmanager
def as_base(model: GPT) -> Iterator[None]:
    """The base alone for a while, with the same weights in memory."""
    with restored(model):
        remove(model)
        yield


# ---- folding, in memory ----------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """The same model, plain: every adapter folded into its host in fp32, rounded once to the host's dtype, and inserted blocks in line.

    UserError, before anything changes, where an adapter computes more than a weight can hold, or its family's config.json
    cannot say what came of it.
    """
    held = [(name, module, slot) for name, module, slot in slots_in(model) if slot != "inserted" and getattr(module, slot) is not None]
    hosts = [(name, module) for name, module, slot in held if isinstance(module, Linear)]
    few = next((name for name, host in linears(model).items() if host.quantized is not None), None)
    if few is not None:
        raise UserError(
            "holds its weight in few bits; merging goes into the original weights", where=few, hint="load it with quantize none"
        )
    for name, module, slot in held:
        parts = parts_of(getattr(module, slot))
        if not isinstance(module, Linear) or any(type(part).folded is Adapter.folded for part in parts):
            raise UserError(f"{type(parts[0]).__name__} computes more than a weight can hold, so it cannot be merged", where=name)
    folded = {name: host.adapter.folded(host) for name, host in hosts if host.adapter is not None}
    shifted = [name for name, host in hosts if host.bias is None and folded[name][1] is not None]
    config = with_biases(model.config, shifted) if shifted else model.config
    if config is None:
        raise UserError(f"a {model.config.model_type} model has no place for the shifts, so it cannot be merged", where=shifted[0])
    for name, host in hosts:
        weight, bias = folded[name]
        host.weight = nn.Parameter(weight.to(host.weight.dtype), requires_grad=False)
        host.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(host.weight.dtype), requires_grad=False))
        host.adapter = None
    for name, host in linears(model).items() if shifted else ():
        if host.bias is None and name != "lm_head" and with_biases(config, [name]) == config:
            host.register_parameter("bias", nn.Parameter(host.weight.new_zeros(host.out_features), requires_grad=False))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    model.config = replace(expanded_config(config, in_line(model)), tie_word_embeddings=tied)
    model.plain = None
    return model


def in_line(model: GPT) -> list[int]:
    """Make inserted blocks layers of their own; after which layers they stood."""
    inserted, line = [], list[Block]()
    for layer, block in enumerate(blocks(model)):
        line.append(block)
        if block.inserted is not None:
            inserted.append(layer)
            line.append(block.inserted)
            block.inserted = None
    model.model.layers = nn.ModuleList(line)
    return inserted


# ---- modules ---------------------------------------------------------------------------------------------------------


def linears(model: GPT) -> dict[str, Linear]:
    """Every Linear by its name: the modules that can carry LoRA."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def numbers_in(model: GPT) -> int:
    """How many numbers its parameters are; those of a weight in few bits count as the weight's."""
    small = sum(host.in_features * host.out_features for host in linears(model).values() if host.quantized is not None)
    return small + sum(parameter.numel() for name, parameter in model.named_parameters() if ".quantized." not in name)


def slots_in(model: GPT) -> Iterator[tuple[str, Any, str]]:
    """Every slot of the base: its module's name, the module, and the slot's own."""
    for name, module in model.named_modules():
        if not any(f".{slot}." in f"{name}." for slot in SLOTS):
            yield from ((name, module, slot) for slot in SLOTS if slot in module._modules)


def blocks(model: GPT) -> list[Block]:
    return [cast(Block, block) for block in model.model.layers]


def put_in(model: GPT, slot: str, adapter: Adapter) -> None:
    host, _, place = slot.rpartition(".")
    setattr(model.get_submodule(host), place, adapter)


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, parameter)


def untie(model: GPT) -> None:
    """Make the head a parameter of its own. It shares the embedding's memory until one of them is replaced."""
    if model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach(), requires_grad=False)
    model.config = replace(model.config, tie_word_embeddings=False)
