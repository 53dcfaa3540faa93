"""Sums over the experts' weights, for criteria that need no data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from moe_evo.criteria.sums import LayerWeights, Observation
from moe_evo.models.experts.outputs import see_expert_weights
from moe_evo.models.view import MoEModel
from moe_evo.models.weight_shapes import whole_shape


def expert_weights(moe: MoEModel) -> Observation[LayerWeights]:
    """The sums of each MoE layer; all ranks of a gang call this together and get the same."""
    sums = [np.zeros((2, number)) for number in moe.shape.num_experts]

    def see(layer: int, weights: Mapping[str, Tensor]) -> None:
        for weight in weights.values():
            for expert, one in enumerate(weight):  # one at a time: as float64 a layer may not fit
                wide = one.to(torch.promote_types(one.dtype, torch.float32))
                sums[layer][0, expert] += wide.abs().sum(dtype=torch.float64).item()
                sums[layer][1, expert] += wide.square().sum(dtype=torch.float64).item()

    see_expert_weights(moe, see)
    # ranks of a tensor parallel model hold slices, other ranks the same whole weights
    is_sliced = moe.ranks.size > 1 and not moe.splits_examples
    of_ranks = moe.ranks.gather(sums) if is_sliced else [sums]
    found = []
    for layer, parts in zip(moe.layers, zip(*of_ranks, strict=True), strict=True):
        shapes = [whole_shape(weight) for weight in layer.expert_tensors().values()]
        num_weights = sum(math.prod(shape[1:]) for shape in shapes if len(shape) == 3)
        absolute, squared = np.sum(parts, axis=0)
        found.append(LayerWeights(absolute, squared, np.array(num_weights)))
    return Observation(tuple(found))
