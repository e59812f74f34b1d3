"""What goes wrong silently elsewhere, and is said here before the first step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from litlora.console import warn
from litlora.model import GPT
from litlora.tokenizer import Tokenizer

ALIKE = 0.999  # cosine above which two rows of the head count as the same
MANY = 8  # so many rows alike were never trained: they still are as they were initialised


@torch.no_grad()
def untrained_ends(head: Tensor, ids: Iterable[int]) -> dict[int, int]:  # head (V, C)
    """Which of `ids` have a row in the head that is one of many near-equal ones, and of how many.

    A model cannot prefer one of them over the others: LoRA on the blocks moves them all alike, so it never learns to stop there.
    """
    rows = head.float()
    lengths = torch.linalg.vector_norm(rows, dim=1).clamp_min(1e-12)
    found = {}
    for number in sorted(set(ids)):
        cosines = (rows @ rows[number]) / (lengths * lengths[number])
        alike = int((cosines > ALIKE).sum())
        if alike >= MANY:
            found[number] = alike
    return found


def warn_of_untrained_end(model: GPT, graded_ends: Iterable[int], tokenizer: Tokenizer) -> None:
    """Say so when the token that ends every answer was never trained in the base."""
    for number, alike in untrained_ends(model.lm_head.weight, graded_ends).items():
        warn(
            f"the base never trained its end token {tokenizer.token_of(number)!r}: its row in the head is one of {alike} near-equal ones, "
            "and LoRA cannot tell them apart, so the model may not learn to stop",
            hint="use a base whose end token is trained, an instruction-tuned one for example",
        )
