"""Criteria: the scores (E,) of one layer's experts from its observation; higher is kept.

From what experts compute: the formulas of the REAP paper (arXiv 2510.13999) and its baselines, and others that
their functions name. A_j are the tokens routed to expert j, g_j its gate, f_j its output before it is multiplied with
the gate. Means over no tokens are 0, so that experts without a single token are dropped first. AIMER and
the change of router norms (Chowdhury et al. 2024, arXiv 2405.16646) look at weights alone and need no data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_evo.criteria.sums import LayerObservation, LayerOutputs, LayerRouters, LayerTrials, LayerWeights, Sums


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
    puts its mean output in the place of a dropped expert, which no stock checkpoint can hold; here it is dropped.
    """
    tokens, answers = layer.tokens, np.square(layer.outputs).sum(axis=-1)
    deviations = (layer.squared_norms - _mean(answers, tokens)).clip(min=0)
    return np.sqrt(_mean(deviations, (tokens - 1).clip(min=0))) * layer.gates


def _mean(sums: Sums, tokens: Sums) -> Sums:
    return np.divide(sums, tokens, out=np.zeros_like(sums), where=tokens > 0)


def aimer(layer: LayerWeights) -> npt.NDArray[np.float64]:
    """- (||W||_1 / N) / sqrt(||W||_2^2 / N), -1 to 0, for the experts (E,) of one layer.

    An expert of zeros, whose output is 0, scores -1 as the worst do.
    """
    mean = layer.absolute / layer.num_weights
    root_mean_square = np.sqrt(layer.squared / layer.num_weights)
    return -np.divide(mean, root_mean_square, out=np.ones_like(mean), where=root_mean_square > 0)


def leave_one_out(layer: LayerTrials) -> Sums:
    """sum over all T tokens of ||y - y^(-j)||_2^2 / T, (E,), from the trials that each leave out one expert.

    y is what the routed experts of a token add up to, y^(-j) the same when expert j is masked and its tokens
    are routed anew by the model's own router. As NVIDIA's Model-Optimizer scores experts.
    """
    return layer.errors / max(float(layer.num_tokens), 1.0)


def router_norm(layer: LayerRouters) -> Sums:
    """||w_j tuned||_2 - ||w_j base||_2, (E,)"""
    return layer.tuned - layer.base


def router_norm_absolute(layer: LayerRouters) -> Sums:
    """| ||w_j tuned||_2 - ||w_j base||_2 |, (E,)"""
    return np.abs(layer.tuned - layer.base)
