"""The loss of samples that are only looked at: validation during a run, and `litlora evaluate`. Needs no Fabric."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from litlora.data.batches import Batch
from litlora.data.lanes import in_lanes
from litlora.data.samples import Sample
from litlora.model import GPT
from litlora.train.lanes import lanes_of, side_by_side

AT_ONCE = 2048  # tokens of samples that are only looked at


def loss_of_samples(model: GPT, samples: Sequence[Sample]) -> tuple[float, int]:
    """`summed_loss` of a model alone."""
    device = model.lm_head.weight.device
    return summed_loss(model, in_lanes(samples, AT_ONCE, share=model.can_share, lanes=lanes_of(device)), device)


def summed_loss(model: nn.Module, lanes: Sequence[Sequence[Batch]], device: torch.device) -> tuple[float, int]:
    """The loss summed over the graded tokens of all batches, in nats, and how many there are. The model's mode is left as it was."""
    training = model.training
    model.eval()

    @torch.no_grad()
    def compute(batches: Iterable[Batch]) -> float:
        return sum(batch.loss(model, device).item() for batch in batches)

    total = sum(side_by_side(lanes, compute))
    model.train(training)
    return total, sum(batch.graded for batches in lanes for batch in batches)
