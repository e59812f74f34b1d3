"""What all ranks must learn together."""

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:  # Fabric takes seconds to import: a run imports it once its input is known to be good
    from lightning_fabric import Fabric


def over_ranks(fabric: "Fabric", tensor: Tensor) -> Tensor:
    """The sum over all ranks, the same on each. Where there is one it stays where it is: Fabric would carry it to the device and back, and
    Apple's GPUs have no fp64."""
    if fabric.world_size == 1:
        return tensor
    total: Any = fabric.all_reduce(tensor, reduce_op="sum")
    return cast(Tensor, total)
