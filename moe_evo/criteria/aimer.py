"""AIMER: experts whose weights are alike in size go first; needs no data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_evo.criteria.sums import LayerWeights


def aimer(layer: LayerWeights) -> npt.NDArray[np.float64]:
    """- (||W||_1 / N) / sqrt(||W||_2^2 / N), -1 to 0, for the experts (E,) of one layer.

    An expert of zeros, which answers nothing, scores -1 as the worst do.
    """
    mean = layer.absolute / layer.num_weights
    root_mean_square = np.sqrt(layer.squared / layer.num_weights)
    return -np.divide(mean, root_mean_square, out=np.ones_like(mean), where=root_mean_square > 0)
