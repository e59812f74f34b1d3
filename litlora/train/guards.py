"""What goes wrong silently elsewhere, and is said here before the first step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.movement import lost_to_rounding, movement
from litlora.console import header, warn
from litlora.model import GPT
from litlora.tokenizer import Tokenizer

ALIKE = 0.999  # cosine above which two rows of the head count as the same
ROWS = 8192  # of the head that are looked at together
MANY = 8  # so many rows alike were never trained: they still are as they were initialised


@torch.no_grad()
def untrained_ends(head: Tensor, ids: Iterable[int]) -> dict[int, int]:  # head (V, C)
    """Which of `ids` have a row in the head that is one of many near-equal ones, and of how many.

    A model cannot prefer one of them over the others: LoRA on the blocks moves them all alike, so it never learns to stop there.
    """
    found = {}
    for number in sorted(set(ids)):
        row = head[number].float()
        alike = sum(int((torch.cosine_similarity(rows.float(), row, dim=1) > ALIKE).sum()) for rows in head.split(ROWS))
        if alike >= MANY:
            found[number] = alike
    return found


def say_what_moved(step: Checkpoint, base: Checkpoint) -> None:
    """The end of a run: how far what was saved lies from the base, read from the files. Warns of what did not move."""
    moved = movement(step, base)
    still = [name for name, far in moved.items() if far == 0]
    if len(moved) <= 6:
        shown = ", ".join(f"{name.removesuffix('.weight').removesuffix('.adapter')} {far:.2%}" for name, far in moved.items())
    else:
        least, most = (pick(moved, key=lambda name: moved[name]) for pick in (min, max))
        shown = f"{len(moved)} modules and tensors, from {moved[least]:.2%} ({least}) to {moved[most]:.2%} ({most})"
    header([("moved", shown)])
    lost = lost_to_rounding(step, base)
    if lost is not None and lost > 0.5:
        what = f"{lost:.0%} of what training changed is smaller than the base's dtype can hold, and so not in the saved weights"
        warn(f"{what}; the losses were measured with it", "--full.dtype float32 stores all of it")
    if still:
        hint = "in 16 bits a small change rounds to none; train longer, or with a higher --train.lr" if step.is_model else ""
        more = f" and {len(still) - 3} more" if len(still) > 3 else ""
        warn(f"{', '.join(still[:3])}{more}: trained, but what was saved is what it was before", hint)


def warn_of_untrained_end(model: GPT, graded_ends: Iterable[int], tokenizer: Tokenizer) -> None:
    """Say so when the token that ends every answer was never trained in the base."""
    for number, alike in untrained_ends(model.lm_head.weight, graded_ends).items():
        warn(
            f"the base never trained its end token {tokenizer.token_of(number)!r}: its row in the head is one of {alike} near-equal ones, "
            "and what is trained here cannot tell them apart, so the model may not learn to stop",
            hint="train the head as well (modules_to_save lm_head, or freeze's extra_modules), or use a base whose end token is trained",
        )
