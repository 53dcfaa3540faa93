"""Dynamic skipping (NAEE, arXiv 2402.14800): a token skips its second expert where its gate is small.

A hook on the routers, so that it holds for the untouched model and for every genome alike. No stock
architecture computes this. Here it is only emulated, with a weight of 0: no time is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_evo.errors import ConfigError
from moe_evo.genomes.space import ModelShape
from moe_evo.models.layer import MoELayer
from moe_evo.models.routing import RouterOutput

Thresholds = float | Sequence[float]
"""beta, the same for all MoE layers or one for each."""


def check_skipping(thresholds: Thresholds | None, shape: ModelShape) -> None:
    """Raise ConfigError where there is no second expert to skip, or not one threshold a layer."""
    if thresholds is None:
        return
    if set(shape.top_k) != {2}:
        raise ConfigError(
            f"model.dynamic_skipping: skips the second of two experts, but this {shape.family} model uses "
            f"{shape.top_k[0]} a token; use a model of two, or none"
        )
    if not isinstance(thresholds, int | float) and len(thresholds) != shape.num_layers:
        raise ConfigError(
            f"model.dynamic_skipping: got {len(thresholds)} thresholds, the model has {shape.num_layers} MoE layers"
        )


def skip_dynamically(layers: Sequence[MoELayer], thresholds: Thresholds, *, renormalises: bool) -> None:
    """Make the routers of `layers` skip from now on; renormalises: whether their weights have a fixed sum."""
    each = [thresholds] * len(layers) if isinstance(thresholds, int | float) else thresholds
    for layer, threshold in zip(layers, each, strict=True):
        layer.router.register_forward_hook(partial(_skip, threshold, renormalises))


def _skip(threshold: float, renormalises: bool, _router: nn.Module, _inputs: Any, output: RouterOutput) -> RouterOutput:
    logits, weights, index = output
    return logits, without_second(weights, threshold, renormalises=renormalises), index


def without_second(weights: Tensor, threshold: float, *, renormalises: bool) -> Tensor:
    """Weights (T, 2) in which the smaller is 0 where it is less than `threshold` times the larger.

    renormalises: the larger one then gets both shares. Any other number of experts a token is left alone, as
    a genome may choose it.
    """
    if weights.shape[1] != 2:
        return weights
    second, place = weights.min(dim=-1, keepdim=True)
    first = weights.max(dim=-1, keepdim=True).values
    alone = torch.zeros_like(weights).scatter(1, 1 - place, first + second if renormalises else first)
    return torch.where(second < threshold * first, alone, weights)
