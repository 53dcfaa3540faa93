"""Criteria on what experts do: the scores (E,) of one layer's experts from its observation, higher is kept.

The formulas are those of the REAP paper (arXiv 2510.13999) and its baselines, and of MSAN (arXiv
2606.15716). A_j are the tokens routed to expert j, g_j its gate, f_j its answer before it is weighed. Means
over no tokens are 0, so that experts without a single token are the first to go.
"""

from __future__ import annotations

import numpy as np

from moe_evo.criteria.observation import LayerObservation, Sums


def frequency(layer: LayerObservation) -> Sums:
    """#A_j"""
    return layer.tokens


def soft_frequency(layer: LayerObservation) -> Sums:
    """sum over A_j of g_j"""
    return layer.gates


def ean(layer: LayerObservation) -> Sums:
    """Expert activation norm: sum over A_j of ||f_j||_2"""
    return layer.norms


def mean_ean(layer: LayerObservation) -> Sums:
    """Mean over A_j of ||f_j||_2"""
    return _mean(layer.norms, layer.tokens)


def weighted_ean(layer: LayerObservation) -> Sums:
    """sum over A_j of g_j ||f_j||_2"""
    return layer.gated_norms


def reap(layer: LayerObservation) -> Sums:
    """Mean over A_j of g_j ||f_j||_2 (eq. 9)"""
    return _mean(layer.gated_norms, layer.tokens)


def msan(layer: LayerObservation) -> Sums:
    """Mean over A_j of ||f_j||_2^2"""
    return _mean(layer.squared_norms, layer.tokens)


def _mean(sums: Sums, tokens: Sums) -> Sums:
    return np.divide(sums, tokens, out=np.zeros_like(sums), where=tokens > 0)
