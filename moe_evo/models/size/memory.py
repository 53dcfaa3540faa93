"""How much of a model each rank of a gang holds, for each way of sharding; in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from moe_evo.config.model import Offload, Sharding
from moe_evo.config.recover import Stage
from moe_evo.models.size.size import ModelSize, Weight
from moe_evo.models.zero3 import BUCKET

NVME_BUFFERS = 5
"""DeepSpeed's default: so many buffers, each as large as the largest weight, between disk and device."""


@dataclass(frozen=True)
class RankMemory:
    """What the fullest rank holds permanently: on its device, in the host's memory, on disk.

    gathered: the most that is on the device beside that for a moment, while modules are fetched one by one.
    """

    device: int
    gathered: int = 0
    host: int = 0
    disk: int = 0


def slice_shape(weight: Weight, ranks: int, rank: int = 0) -> tuple[int, ...]:
    """Shape of the slice that `rank` of `ranks` holds under tensor parallelism; rank 0 has the longest."""
    sharded = _sharded_dimension(weight)
    if sharded is None:
        return weight.shape
    dimension, pieces = sharded
    length = pieces * _share(weight.shape[dimension] // pieces, ranks, rank)
    return (*weight.shape[:dimension], length, *weight.shape[dimension + 1 :])


def _sharded_dimension(weight: Weight) -> tuple[int, int] | None:
    """The dimension that the weight's style splits, and in how many pieces that are each shared out."""
    style, ndim = weight.style or "", len(weight.shape)
    if not weight.is_parameter:
        return None
    if style.startswith("colwise"):
        return (max(ndim - 2, 0), 1)
    if style == "packed_colwise":
        return (ndim - 2, 2) if ndim > 1 else (0, 1)
    if style.startswith("rowwise"):
        return None if weight.name == "bias" else (ndim - 1, 1)
    if style == "packed_rowwise":
        return (ndim - 1, 2) if ndim > 1 else None
    return {"embedding_rowwise": (0, 1), "embedding_colwise": (1, 1)}.get(style)


def _share(length: int, ranks: int, rank: int) -> int:
    """The part of `length` that `rank` gets; all but the last get equal parts, rounded up."""
    chunk = -(-length // ranks)
    return min(max(length - rank * chunk, 0), chunk)


def tensor_parallel_bytes(size: ModelSize, rank: int = 0) -> int:
    """Bytes of weights that `rank` holds under tensor parallelism."""
    return sum(prod(slice_shape(weight, size.ranks, rank)) * weight.itemsize for weight in size.weights)


def memory_per_rank(size: ModelSize, sharding: Sharding, offload: Offload = "none") -> RankMemory:
    """What the fullest rank of the gang holds; under device_map the fullest of as many devices, at most."""
    ranks = size.ranks
    if sharding == "single" or (ranks == 1 and sharding != "zero3"):
        return RankMemory(size.size)
    if sharding == "device_map":  # blocks are whole, so one device may hold one more than its share
        return RankMemory(min(size.size, -(-size.size // ranks) + largest_block(size)))
    if sharding == "tensor_parallel":
        return RankMemory(tensor_parallel_bytes(size))
    parameters = [weight for weight in size.weights if weight.is_parameter]
    slices = sum(-(-weight.numel // ranks) * weight.itemsize for weight in parameters)
    buffers = sum(weight.size for weight in size.weights if not weight.is_parameter)
    gathered = min(2 * _largest_module(size), size.size)  # the module that runs, and the next one meanwhile
    if offload == "none":
        return RankMemory(buffers + slices, gathered)
    if offload == "cpu":
        return RankMemory(buffers, gathered, host=slices)
    on_the_way = NVME_BUFFERS * max(weight.size for weight in parameters)
    return RankMemory(buffers, gathered, host=on_the_way, disk=slices)


def training_per_rank(
    size: ModelSize, num_kept: Sequence[int], ranks: int, stage: Stage, offload: Offload
) -> RankMemory:
    """What the fullest rank holds while the whole pruned model is trained under ZeRO, beside activations.

    num_kept: K of each MoE layer. A number that is trained takes itself and its gradient, twice while the optimizer
    works (the second time in float32), a float32 copy and two moments in float32.
    """
    parameters, weights = exported_size(size, num_kept)
    share, bucket = -(-parameters // ranks), min(BUCKET, parameters) * size.itemsize
    gradients, float32 = share * size.itemsize, share * (4 + 4 + 8)
    layer = _largest_module(size, num_kept)
    passing = (2 * layer if stage == 3 else 0) + layer + bucket  # the module that runs, the next, a gradient
    slices = -(-weights // ranks)
    if offload == "none":
        return RankMemory((slices if stage == 3 else weights) + gradients + float32, passing)
    if stage == 2:
        return RankMemory(weights, passing, host=float32)
    if offload == "cpu":
        return RankMemory(0, passing, host=slices + float32)
    return RankMemory(0, passing, host=NVME_BUFFERS * layer, disk=slices + float32)


def largest_block(size: ModelSize) -> int:
    """Bytes of the largest part that a device map never splits: a decoder layer or an embedding."""
    sizes: dict[str, int] = {}
    for weight in size.weights:
        parents = (block for block in size.blocks if f"{weight.module}.".startswith(f"{block}."))
        part = next(parents, weight.module)
        sizes[part] = sizes.get(part, 0) + weight.size
    return max(sizes.values())


def _largest_module(size: ModelSize, num_kept: Sequence[int] | None = None) -> int:
    """Bytes of the module whose own parameters are the largest: the experts of a layer, or an embedding.

    num_kept: K of each MoE layer, where it is of a pruned model.
    """
    sizes: dict[str, int] = {}
    for weight in size.weights:
        if weight.is_parameter:
            sizes[weight.module] = sizes.get(weight.module, 0) + _kept_numel(weight, num_kept) * weight.itemsize
    return max(sizes.values())


def _kept_numel(weight: Weight, num_kept: Sequence[int] | None) -> int:
    if weight.moe_layer is None or num_kept is None:
        return weight.numel
    return weight.numel // weight.shape[0] * num_kept[weight.moe_layer]


def merged_bytes(size: ModelSize, num_kept: Sequence[int], sharding: Sharding) -> int:
    """Bytes a rank of all merged layers of one genome: K / E of its experts (of its slices of them).

    num_kept: K of each MoE layer.
    """
    sliced = size.ranks if sharding == "tensor_parallel" else 1
    return sum(
        prod(slice_shape(weight, sliced)[1:]) * num_kept[weight.moe_layer] * weight.itemsize
        for weight in size.weights
        if weight.is_expert and weight.moe_layer is not None
    )


def exported_size(size: ModelSize, num_kept: Sequence[int]) -> tuple[int, int]:
    """Parameters and bytes of a checkpoint that keeps `num_kept` experts in each MoE layer."""
    parameters = total = 0
    for weight in size.weights:
        numel = _kept_numel(weight, num_kept)
        parameters += numel
        total += numel * weight.itemsize
    return parameters, total
