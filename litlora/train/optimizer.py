"""AdamW over what learns, and the learning rate of every update in closed form."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from litlora.options import TrainOptions


def build_optimizer(trained: Mapping[str, nn.Parameter], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). Weight decay is for matrices; gains and biases are left alone."""
    assert options.lr is not None, "the command has chosen it"
    matrices = [parameter for parameter in trained.values() if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained.values() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr, betas=betas, fused=True)


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
