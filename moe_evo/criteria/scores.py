"""Criteria on what experts do: the scores (E,) of one layer's experts from its observation, higher is kept.

The formulas are those of the REAP paper (arXiv 2510.13999) and its baselines, and others that their
functions name. A_j are the tokens routed to expert j, g_j its gate, f_j its answer before it is weighed.
Means over no tokens are 0, so that experts without a single token are the first to go.
"""

from __future__ import annotations

import numpy as np

from moe_evo.criteria.sums import LayerObservation, LayerOutputs, Sums


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
    """Mean over A_j of ||f_j||_2^2 (arXiv 2606.15716)"""
    return _mean(layer.squared_norms, layer.tokens)


def easy_ep(layer: LayerObservation) -> Sums:
    """sum over A_j of g_j ||f_j||_2 (1 - cos(h, h + y)), h the residual stream and y what all routed experts add to it

    As RUCAIBox/EASYEP computes it (`pruning/model_new.py`, `pruning/expert_selection.py`; arXiv 2504.06792).
    """
    return layer.turned_norms


def mone(layer: LayerOutputs) -> Sums:
    """||sqrt(Var f_j)||_2 over A_j, times the sum over A_j of g_j

    The 'fusion' metric of zxgx/mode-pd (MoNE, arXiv 2507.00390), which divides the sum by the number of all
    tokens, the same for all experts of a layer. The variance is the unbiased one, 0 for a single token. MoNE
    puts its mean answer in the place of a dropped expert, which no stock checkpoint can hold: here it goes.
    """
    tokens, answers = layer.tokens, np.square(layer.outputs).sum(axis=-1)
    deviations = (layer.squared_norms - _mean(answers, tokens)).clip(min=0)
    return np.sqrt(_mean(deviations, (tokens - 1).clip(min=0))) * layer.gates


def _mean(sums: Sums, tokens: Sums) -> Sums:
    return np.divide(sums, tokens, out=np.zeros_like(sums), where=tokens > 0)
