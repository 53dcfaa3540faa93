"""Router-norm change: experts whose router row fine-tuning made shorter go first; needs no data.

Chowdhury et al. 2024 (arXiv 2405.16646) prove it for the change of length, `router_norm`. The absolute
change is what it moved either way.
"""

from __future__ import annotations

import numpy as np

from moe_evo.criteria.sums import LayerRouters, Sums


def router_norm(layer: LayerRouters) -> Sums:
    """||w_j tuned||_2 - ||w_j base||_2, (E,)"""
    return layer.tuned - layer.base


def router_norm_absolute(layer: LayerRouters) -> Sums:
    """| ||w_j tuned||_2 - ||w_j base||_2 |, (E,)"""
    return np.abs(layer.tuned - layer.base)
