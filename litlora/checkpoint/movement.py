"""How far a step moved its base, read from the files of both: the proof that what was to be trained was trained."""

import torch
from torch import Tensor

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.weights import adapter_tensors, base_tensors, safe_open_checked
from litlora.config import Config
from litlora.families import learns
from litlora.methods.tuning import EMBEDDING, BottleneckSlot, LoRASlot, PromptSlot, Slot, Tuning
from litlora.peft import check_tensors, copied_base_tensor, scale

# The projection that a bottleneck stands beside; of experts, the first one's.
LAST = {"self_attn": ("o_proj.weight",), "mlp": ("down_proj.weight", "experts.0.down_proj.weight", "experts.down_proj")}


@torch.no_grad()
def movement(step: Checkpoint, before: Checkpoint) -> dict[str, float]:
    """By module or parameter, what changed as a share of what was there; 0 where nothing did. `before` is the base, or the model that
    a step of `full` started from.

    A weight: ||W' - W|| / ||W||. Of a new block: against the one it is a copy of, what writes last in it against what it
    began as. A scale and shift: the root mean square of scale - 1. A bottleneck: ||scale up|| over the norm of the projection it
    stands beside. A learnt prompt: its gate.
    """
    base = base_tensors(before)
    if step.is_model:
        config, own = step.config(), base_tensors(step)
        return {name: relative(name, tensor, old(base, name), config) for name, tensor in own.items() if learns(name)}
    tuning, tensors, config = step.tuning(), adapter_tensors(step), step.config()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if copied_base_tensor(name) is None}
    check_tensors(found, tuning.file_shapes(config), step.adapter_file())
    own = {name: tensors[stored] for stored, name in tuning.file_names(config).items()}
    inside: dict[str, dict[str, Tensor]] = {slot: {} for slot in tuning.slots}
    whole = []
    for name, tensor in own.items():
        if (slot := slot_of(name, tuning)) is None:
            whole.append(name)
        else:
            inside[slot][name.removeprefix(f"{slot}.")] = tensor.float()
    moved = {slot: slot_movement(slot, kind, inside[slot], base) for slot, kind in tuning.slots.items()}
    return moved | {name: relative(name, own[name], old(base, name), config) for name in whole if learns(name)}


@torch.no_grad()
def lost_to_rounding(step: Checkpoint, before: Checkpoint) -> float | None:
    """Of a step of `full` that is stored narrower than it was trained: which share of what training changed is not in its weights."""
    path = step.path / names.TRAINING_STATE
    if not step.is_model or not path.exists():
        return None
    with safe_open_checked(path) as file:
        exact = {name.removeprefix("exact/"): file.get_tensor(name) for name in file.keys() if name.startswith("exact/")}  # noqa: SIM118
    if not exact:
        return None
    base, stored = base_tensors(before), base_tensors(step)
    lost = sum((stored[name].double() - tensor.double()).square().sum().item() for name, tensor in exact.items())
    change = sum((tensor.double() - old(base, name).double()).square().sum().item() for name, tensor in exact.items())
    return min(1.0, (lost / change) ** 0.5) if change else 0.0


def slot_of(name: str, tuning: Tuning) -> str | None:
    """The slot whose adapter a parameter belongs to."""
    parts = name.split(".")
    return next((slot for end in range(1, len(parts)) if (slot := ".".join(parts[:end])) in tuning.slots), None)


def old(base: dict[str, Tensor], name: str) -> Tensor:
    """What a tensor was: a separated head was the embedding, a new block's the one it follows."""
    return base.get(name.replace(".inserted.", "."), base[EMBEDDING])


def relative(name: str, new: Tensor, before: Tensor, config: Config) -> float:
    silent = config.silence(name) if ".inserted." in name else None
    change = new.float() - (before.float() if silent is None else silent)
    return ratio(change.norm(), before.float().norm())


def ratio(change: Tensor, size: Tensor) -> float:
    return (change / size).item() if size > 0 else float(change.item() > 0)


def slot_movement(slot: str, kind: Slot, parts: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    host = slot.rpartition(".")[0]
    if isinstance(kind, PromptSlot):
        return parts["adaption_gate"].abs().item()
    if isinstance(kind, BottleneckSlot):
        beside_it = [f"{host}.{last}" for last in LAST[host.rpartition(".")[2]]]
        beside = next(base[name] for name in beside_it if name in base).float()
        return ratio(kind.scale * parts["up.weight"].norm(), beside.norm())
    if not isinstance(kind, LoRASlot):
        return (parts["scale"] - 1).square().mean().sqrt().item()
    weight = old(base, f"{host}.weight").float()
    a, b = parts["lora_A"], parts["lora_B"] * scale(kind.alpha, kind.r, kind.use_rslora)
    if "magnitude" in parts:  # DoRA: arXiv:2402.09353, equation 5
        turned = weight + b @ a
        return ratio((turned * (parts["magnitude"] / turned.norm(dim=1))[:, None] - weight).norm(), weight.norm())
    small = torch.linalg.qr(b).R @ a  # as long as B A, and never (out, in)
    return ratio(small.norm(), weight.norm())
