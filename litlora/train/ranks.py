"""What all ranks must learn together."""

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:  # Fabric takes seconds to import: a run imports it once its input is known to be good
    from lightning_fabric import Fabric


def over_ranks(fabric: "Fabric", tensor: Tensor) -> Tensor:
    """The sum over all ranks, the same on each."""
    total: Any = fabric.all_reduce(tensor, reduce_op="sum")
    return cast(Tensor, total)
