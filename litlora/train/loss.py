"""The loss of samples that are only looked at: validation during a run, and `litlora evaluate`. Needs no Fabric."""

from collections.abc import Iterable

import torch
from torch import nn

from litlora.data.batches import Batch


@torch.no_grad()
def summed_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> tuple[float, int]:
    """The loss summed over the graded tokens of `batches`, in nats, and how many there are. The model's mode is left as it was."""
    training = model.training
    model.eval()
    total, graded = 0.0, 0
    for batch in batches:
        total += batch.loss(model, device).item()
        graded += batch.graded
    model.train(training)
    return total, graded
