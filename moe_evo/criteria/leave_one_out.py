"""Leave-one-out: experts without which a layer answers almost the same go first."""

from __future__ import annotations

from moe_evo.criteria.sums import LayerTrials, Sums


def leave_one_out(layer: LayerTrials) -> Sums:
    """sum over all T tokens of ||y - y^(-j)||_2^2 / T, (E,), from the trials that each leave out one expert.

    y is what the routed experts of a token add up to, y^(-j) the same when expert j is masked and its tokens
    are routed anew by the model's own router. As NVIDIA's Model-Optimizer scores experts.
    """
    return layer.errors / max(float(layer.num_tokens), 1.0)
