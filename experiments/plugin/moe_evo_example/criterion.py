"""A criterion: which experts the router is sure of."""

from __future__ import annotations

import numpy as np

from moe_evo.criteria.questions import Routed
from moe_evo.criteria.registry import Criterion
from moe_evo.criteria.sums import LayerObservation, Sums


def mean_gate(layer: LayerObservation) -> Sums:
    """Mean gate weight of the tokens that are routed to an expert; 0 without any. (E,)"""
    return np.divide(layer.gates, layer.tokens, out=np.zeros_like(layer.gates), where=layer.tokens > 0)


MEAN_GATE = Criterion("mean_gate", "mean gate weight of its tokens", "this example", Routed(), mean_gate)
