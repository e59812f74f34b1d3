"""Methods of fine-tuning: where adapters go, what learns, and what of it is saved.

`attach` freezes a model and puts fresh adapters into the slots of its Linears; from then on the parameters that learn
are exactly the tensors that a checkpoint holds. `add_adapter` puts trained ones in, several if wanted, for use.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from litlora.errors import UserError
from litlora.model import GPT, Composed, DoRA, Linear, LoRA
from litlora.options import LoRAOptions
from litlora.peft import (
    AdapterConfig,
    adapter_config,
    check_tensors,
    copied_base_tensor,
    expected_adapter_tensors,
    rank_and_alpha,
    targets,
    to_peft_name,
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One word after `litlora finetune`."""

    options: type  # its dataclass in options.py
    attach: Callable[..., list[str]]  # (model, options, *, seed) -> names of the modules that got an adapter
    in_peft: bool  # whether a checkpoint is an adapter that PEFT loads
    merges: bool  # whether it can be folded into the base's weights


# ---- training --------------------------------------------------------------------------------------------------------


def attach(model: GPT, options: LoRAOptions, *, seed: int) -> list[str]:
    """Freeze `model` and give its target modules fresh adapters, which change nothing yet. Returns the modules' names.

    The same seed gives a module the same numbers whatever else is adapted, on every device; torch's own random state
    is left as it was. UserError where a target matches nothing, or the head that is also the embedding is one.
    """
    return attach_from(model, adapter_config(options, list(linears(model))), seed=seed)


def attach_from(model: GPT, config: AdapterConfig, *, seed: int = 0) -> list[str]:
    """As `attach`, for an adapter described by its config; follow it with `load_adapter_state` for its weights."""
    hosts = target_hosts(model, config)
    carrying = [name for name, host in linears(model).items() if host.adapter is not None]
    if carrying:
        raise UserError(f"{carrying[0]} carries an adapter already", hint="merge it first, or remove it")
    model.requires_grad_(False)
    for name, host in hosts.items():
        host.adapter = fresh_adapter(name, host, config, seed)
    return list(hosts)


def fresh_adapter(name: str, host: Linear, config: AdapterConfig, seed: int) -> LoRA:
    """An adapter for the module called `name`: A uniform as in PEFT, B zero, in fp32 whatever the host's dtype."""
    r, alpha = rank_and_alpha(config, name)
    kind = DoRA if config.use_dora else LoRA
    with torch.random.fork_rng(devices=[host.weight.device] if host.weight.is_cuda else []):
        adapter = kind(host, r, alpha, config.dropout, config.use_rslora)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    drawn = nn.init.kaiming_uniform_(torch.empty(adapter.lora_A.shape), a=math.sqrt(5), generator=generator)  # (R, in) fp32
    with torch.no_grad():
        adapter.lora_A.copy_(drawn)
    return adapter.train(host.training)


def trainable(model: GPT) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name: what the optimizer gets, and what a checkpoint holds."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- saving and loading ----------------------------------------------------------------------------------------------


def adapter_state(model: GPT) -> dict[str, Tensor]:
    """The attached adapter's tensors under PEFT's names, in the model's order; they share memory with the parameters."""
    return {to_peft_name(name): parameter.detach() for name, parameter in adapter_parameters(model).items()}


def load_adapter_state(model: GPT, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Write `tensors`, under PEFT's names, into the adapter attached to `model`; `where` is their file, for messages.

    UserError that lists every missing, unexpected and wrongly shaped tensor at once; the model is then as it was.
    """
    parameters = {to_peft_name(name): parameter for name, parameter in adapter_parameters(model).items()}
    tensors = checked(model, tensors, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, where)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def adapter_parameters(model: GPT) -> dict[str, nn.Parameter]:
    prefixes = tuple(f"{name}.adapter." for name, host in linears(model).items() if host.adapter is not None)
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(prefixes)}


def checked(model: GPT, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str | Path) -> dict[str, Tensor]:
    """`tensors` without copies of the base's own, once they are known to be the `expected` ones."""
    kept = {name: tensor for name, tensor in tensors.items() if not is_copy_of_base(model, name, tensor, where)}
    check_tensors({name: tuple(tensor.shape) for name, tensor in kept.items()}, expected, where)
    for name, tensor in kept.items():
        if not tensor.is_floating_point():
            raise UserError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, no floating-point numbers", where=where)
    return kept


def is_copy_of_base(model: GPT, name: str, tensor: Tensor, where: str | Path) -> bool:
    """Whether a tensor repeats the base's, as PEFT's files do when the head has LoRA. One that differs is refused."""
    copied = copied_base_tensor(name)
    host = linears(model).get(copied.removesuffix(".weight")) if copied else None
    if host is None:
        return False
    if tensor.shape != host.weight.shape or not torch.equal(tensor.to(host.weight), host.weight):
        raise UserError(f"{name} is not the base's {copied}: the adapter was trained on another base", where=where)
    return True


# ---- composition -----------------------------------------------------------------------------------------------------


def add_adapter(
    model: GPT, config: AdapterConfig, tensors: Mapping[str, Tensor], weight: float = 1.0, *, where: str | Path = "adapter"
) -> list[str]:
    """Add a trained adapter to whatever `model` carries, counted `weight` times. Returns the names of its modules.

    It does not learn, and nothing else changes. UserError as in `load_adapter_state`, or where DoRA would not be alone
    with weight 1; the model is then as it was.
    """
    hosts = target_hosts(model, config)
    shapes = {name: (host.out_features, host.in_features) for name, host in linears(model).items()}
    tensors = checked(model, tensors, expected_adapter_tensors(config, shapes), where)
    slots: dict[str, LoRA | Composed] = {}
    for name, host in hosts.items():
        adapter = fresh_adapter(name, host, config, seed=0).requires_grad_(False)
        for parameter_name, parameter in adapter.named_parameters():
            parameter.copy_(tensors[to_peft_name(f"{name}.adapter.{parameter_name}")])
        slots[name] = joined(host, adapter, weight)
    for name, slot in slots.items():  # only now, when nothing can fail any more
        hosts[name].adapter = slot
    return list(hosts)


def joined(host: Linear, adapter: LoRA, weight: float) -> LoRA | Composed:
    """What a slot holds once `adapter` has joined what was there. One adapter of weight 1 stays what it is."""
    held = host.adapter
    if held is None:
        return adapter if weight == 1.0 else Composed([adapter], [weight])
    earlier: list[Any] = list(held.adapters) if isinstance(held, Composed) else [held]
    weights = list(held.weights) if isinstance(held, Composed) else [1.0]
    return Composed([*earlier, adapter], [*weights, weight]).train(host.training)


def remove_adapters(model: GPT) -> None:
    """Leave the base as it was before any adapter was attached or added."""
    for host in linears(model).values():
        host.adapter = None


# ---- hosts -----------------------------------------------------------------------------------------------------------


def linears(model: GPT) -> dict[str, Linear]:
    """Every Linear by its name: the modules that can carry an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def target_hosts(model: GPT, config: AdapterConfig) -> dict[str, Linear]:
    hosts = linears(model)
    chosen = targets(config, list(hosts))
    if "lm_head" in chosen and model.config.tie_word_embeddings:
        what = "LoRA on lm_head is not possible here: it is the embedding's own matrix, which a merge would have to change as well"
        raise UserError(what, where="target_modules", hint="leave lm_head out of target_modules")
    return {name: hosts[name] for name in chosen}


METHODS = {"lora": Method(options=LoRAOptions, attach=attach, in_peft=True, merges=True)}
