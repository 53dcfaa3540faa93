"""Alignment: reorder the neurons of experts so that those of experts that are merged match.

A permutation of an expert's neurons (rows of gate and up, columns of down) does not change what the expert computes.
It changes what the mean of its weights and another expert's computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_evo.errors import ModelError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import check_fits
from moe_evo.models.experts.matrices import expert_matrices
from moe_evo.models.layer import MoELayer
from moe_evo.models.view import MoEModel
from moe_evo.models.weight_shapes import is_whole

Permutations = tuple[npt.NDArray[np.int32], ...]
"""One (E, I) a MoE layer: neuron i of expert j was its neuron [j, i]."""


def alignment_of(moe: MoEModel, genome: Genome, done: Callable[[int], None] = lambda layer: None) -> Permutations:
    """The permutations that match each expert's neurons with those of its group's dominant expert in `genome`.

    The dominant expert is the one whose router row the slot has. An expert in several slots follows the slot in which
    it has the largest weight. An assignment maximises the sum of the inner products of all weights of matched neurons
    (Li et al. 2024, arXiv 2310.01334). done: called with the number of each finished layer. Takes I x I
    numbers for one pair of experts at a time, and time of about I^3. Raises GenomeError and ModelError.
    """
    check_fits(genome, moe.shape)
    permutations = []
    with torch.no_grad():
        for layer, gene in zip(moe.layers, genome.layers, strict=True):
            neurons = _neurons(layer)
            order = _identity(neurons)
            for expert, dominant in _leaders(gene):
                order[expert] = _matched(neurons, expert, dominant)
            order.setflags(write=False)
            permutations.append(order)
            done(layer.number)
    return tuple(permutations)


def align_neurons(moe: MoEModel, permutations: Permutations) -> None:
    """Reorder the neurons of the loaded model's experts, for good; what it computes stays, up to rounding.

    Raises ModelError, before anything is changed, where they are of another model.
    """
    layers = [_neurons(layer) for layer in moe.layers]
    expected, got = [_identity(neurons).shape for neurons in layers], [one.shape for one in permutations]
    if got != expected:
        raise ModelError(
            f"alignment: of {len(got)} MoE layers of (experts, neurons) {_summary(got)}, the model has "
            f"{len(expected)} of {_summary(expected)}; use the model that it was made for"
        )
    with torch.no_grad():
        for neurons, orders in zip(layers, permutations, strict=True):
            for expert, order in enumerate(orders):
                if (order != np.arange(len(order))).any():
                    index = torch.from_numpy(order.astype(np.int64)).to(neurons[0].device)
                    for one in neurons:
                        one[expert] = one[expert][index]  # the right side is a copy
    moe.merged_cache.clear()  # of experts whose neurons were in another order


def check_permutations(permutations: Sequence[npt.NDArray[np.int32]]) -> None:
    """Raise ValueError unless every row of each (E, I) int32 is a permutation of 0 to I-1."""
    for layer, orders in enumerate(permutations):
        if (
            orders.dtype != np.int32
            or orders.ndim != 2
            or (np.sort(orders, axis=1) != np.arange(orders.shape[1])).any()
        ):
            raise ValueError(f"layer {layer} holds what is no permutation")


def _neurons(layer: MoELayer) -> list[Tensor]:
    """Views (E, I, ...) of all weights that belong to a neuron: its rows of gate and up, its column of down, biases."""
    stacked = layer.expert_tensors()
    if not all(map(is_whole, stacked.values())):
        raise ModelError(
            f"alignment: the experts of MoE layer {layer.number} are not whole in this process; "
            "align with model.sharding single, on a device that holds the model"
        )
    matrices = expert_matrices(layer.experts, stacked)
    biases = expert_biases(layer, stacked)
    return [matrices["gate"], matrices["up"], matrices["down"].mT, *biases]


def expert_biases(layer: MoELayer, stacked: dict[str, Tensor]) -> list[Tensor]:
    """Views (E, I) of the biases of gate and up, where a family has them."""
    bias = stacked.get("gate_up_proj_bias")
    if bias is None:
        return []
    return list(bias.chunk(2, dim=1)) if layer.experts.is_concatenated else [bias[:, 0::2], bias[:, 1::2]]


def _identity(neurons: Sequence[Tensor]) -> npt.NDArray[np.int32]:
    num_experts, num_neurons = neurons[0].shape[:2]
    return np.tile(np.arange(num_neurons, dtype=np.int32), (num_experts, 1))


def _leaders(gene: LayerGenome) -> list[tuple[int, int]]:
    """Pairs of experts: one that is merged into a slot, and that slot's dominant expert."""
    shares = np.abs(gene.expert_merging)
    dominants = np.abs(gene.router_mapping).argmax(axis=1)
    slots = shares.argmax(axis=0)
    return [
        (expert, int(dominants[slot]))
        for expert, slot in enumerate(slots)
        if shares[slot, expert] > 0 and expert not in dominants
    ]


def _matched(neurons: Sequence[Tensor], expert: int, dominant: int) -> npt.NDArray[np.int32]:
    """(I,) for each neuron of `dominant` the one of `expert` that takes its place."""
    from scipy.optimize import linear_sum_assignment

    products = sum(
        one[dominant].to(dtype).flatten(1) @ one[expert].to(dtype).flatten(1).T
        for one in ((tensor[..., None] if tensor.ndim == 2 else tensor) for tensor in neurons)
        for dtype in [torch.promote_types(one.dtype, torch.float32)]
    )
    assert isinstance(products, Tensor)
    order: npt.NDArray[np.int32] = linear_sum_assignment(products.cpu().numpy(), maximize=True)[1].astype(np.int32)
    return order


def _summary(shapes: Sequence[tuple[int, ...]]) -> str:
    distinct = sorted(set(shapes))
    return str(distinct[0]) if len(distinct) == 1 else str(distinct)
