"""Shapes of weights of which this process holds only a part, or at times nothing.

Tensor parallel weights are DTensors, ZeRO-3 weights are empty between forwards and remember their shape,
and offloaded weights lie on the meta device, which has shapes.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape in the checkpoint, all ranks together."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def local_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape that a forward pass of this rank computes with."""
    return tuple(local_slice(weight).shape) if isinstance(weight, DTensor) else whole_shape(weight)


def local_slice(weight: Tensor) -> Tensor:
    """This rank's slice of a tensor parallel weight, as a view; any other weight as it is."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def is_whole(weight: Tensor) -> bool:
    """Whether all of the weight lies in this process, outside of forward passes too."""
    return not weight.is_meta and local_shape(weight) == whole_shape(weight) == tuple(weight.shape)
