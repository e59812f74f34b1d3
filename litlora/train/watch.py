"""How groups of parameters fare from step to step: LLaMA-Pro's new blocks, which in other toolkits stood still unseen."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Watch:
    """Gradient and update norms of named groups of parameters. Without a group it costs nothing."""

    def __init__(self, groups: Mapping[str, Sequence[torch.nn.Parameter]]) -> None:
        self.groups = groups
        self.earlier: dict[str, list[Tensor]] = {}

    @property
    def columns(self) -> tuple[str, ...]:
        """Of metrics.csv."""
        return tuple(f"{name}_{what}_norm" for name in self.groups for what in ("grad", "update"))

    @torch.no_grad()
    def before(self) -> None:
        """Remember the parameters as they are before an update."""
        self.earlier = {name: [parameter.detach().clone() for parameter in group] for name, group in self.groups.items()}

    @torch.no_grad()
    def after(self, unclipped: float) -> dict[str, float]:
        """By column: the norm of each group's gradient before clipping (which divided it by `unclipped`), and of its last update.

        Nothing where `before` was not asked for.
        """
        found = {}
        for name, group in self.groups.items() if self.earlier else ():
            gradients = [parameter.grad for parameter in group if parameter.grad is not None]
            updates = [parameter - earlier for parameter, earlier in zip(group, self.earlier[name], strict=True)]
            found[f"{name}_grad_norm"] = total_norm(gradients) * unclipped
            found[f"{name}_update_norm"] = total_norm(updates)
        self.earlier = {}
        return found

    def shown(self, found: Mapping[str, float]) -> dict[str, str]:
        """For the progress line: gradient / update of each group."""
        return {name: f"{found[f'{name}_grad_norm']:.1e}/{found[f'{name}_update_norm']:.1e}" for name in self.groups if found}


def total_norm(tensors: Sequence[Tensor]) -> float:
    return torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]).norm().item() if tensors else 0.0
