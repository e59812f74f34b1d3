"""AdamW over what learns, and the learning rate of every update in closed form."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from litlora.options import TrainOptions


def build_optimizer(trained: Mapping[str, nn.Parameter], options: TrainOptions, lr_ratio: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). Weight decay is for matrices; gains and biases are left alone.

    `lr_ratio`: by how much LoRA's B learns faster than all else (LoRA+: Hayou et al. 2024, arXiv:2402.12354).
    """
    assert options.lr is not None, "the command has chosen it"
    faster = {name for name in trained if name.endswith(".lora_B")} if lr_ratio != 1 else set()
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trained.items() if p.dim() >= 2 and n not in faster], "weight_decay": options.weight_decay, "ratio": 1.0},
        {"params": [p for n, p in trained.items() if p.dim() < 2], "weight_decay": 0.0, "ratio": 1.0},
        {"params": [trained[n] for n in trained if n in faster], "weight_decay": options.weight_decay, "ratio": lr_ratio},
    ]
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("ratio", 1.0)


def learning_rate(options: TrainOptions, t: int, steps: int) -> float:
    """The learning rate of update `t` (from 1) of `steps`: warm-up lr t / w, then the schedule over (t - w) / (steps - w + 1)."""
    assert options.lr is not None, "the command has chosen it"
    w = min(options.lr_warmup_steps, steps)
    if t <= w:
        return options.lr * t / w
    done = min(1.0, (t - w) / (steps - w + 1))  # in (0, 1): the last update still moves
    if options.lr_schedule == "constant":
        return options.lr
    if options.lr_schedule == "linear":
        return options.lr * (1 - done)
    return options.lr * 0.5 * (1 + math.cos(math.pi * done))
