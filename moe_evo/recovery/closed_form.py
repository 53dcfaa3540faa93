"""The layers of a pruned model refitted without gradient steps: scales of experts, down matrices and router rows.

A fit that has as many unknowns as tokens learns these by heart. So a part of the prompts is held out of it at first,
and says how strongly weights are to be held where they were; then all prompts are fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moe_evo.config.recover import RecoverConfig
from moe_evo.models.layer import MoELayer
from moe_evo.recovery.blocks import BlockInputs
from moe_evo.recovery.expert_scales import refit_scales
from moe_evo.recovery.layer_repair import copied_weights, put_weights
from moe_evo.recovery.least_squares import refit_down
from moe_evo.recovery.pass_memory import PassMemory
from moe_evo.recovery.router_rows import layer_error, refit_router

_RAISED = 10.0
MOST_RIDGES = 5
"""That are tried for each part."""
_HELD_OUT = 5  # every fifth prompt

Fit = Callable[[BlockInputs, Tensor, float], None]
"""Changes a layer's weights so that at some inputs it puts out the targets, with a ridge."""


@torch.no_grad()
def refit(layer: MoELayer, inputs: BlockInputs, targets: Tensor, config: RecoverConfig, memory: PassMemory) -> None:
    """Refit what `config.refitted` names of one layer, the router last: its logits are right for the experts then.

    The ridge is the config's, or one of ten times it and so on, whichever leaves the smallest error at prompts that its
    fit does not know; a part is left as it is where that is smallest without a fit.
    """

    def scales(some: BlockInputs, wanted: Tensor, ridge: float) -> None:
        refit_scales(layer, some, wanted, ridge, memory.batch_tokens)

    def down(some: BlockInputs, wanted: Tensor, ridge: float) -> None:
        refit_down(layer, some, wanted, ridge, memory)

    def router(some: BlockInputs, wanted: Tensor, ridge: float) -> None:
        refit_router(layer, some.hidden, wanted, ridge, memory.batch_tokens)

    held_out = held_out_tokens(inputs.lessons)
    error = partial(layer_error, layer, inputs.hidden[held_out], targets[held_out], memory.batch_tokens)
    for part, fit in (("scales", scales), ("experts", down), ("router", router)):
        if part in config.refitted:
            before = copied_weights(layer)
            ridge = _best_ridge(layer, partial(fit, inputs.at(~held_out), targets[~held_out]), config.ridge, error)
            put_weights(layer, before)
            if ridge is not None:
                fit(inputs, targets, ridge)


def held_out_tokens(lessons: Tensor) -> Tensor:
    """(N,) whether a token is of a prompt that is held out of the fit: a fifth of them; of a single one, its end."""
    numbers = torch.unique(lessons)
    if len(numbers) == 1:
        return torch.arange(len(lessons)) >= len(lessons) - len(lessons) // _HELD_OUT
    order = np.random.default_rng(0).permutation(len(numbers))
    return torch.isin(lessons, numbers[order[: max(len(numbers) // _HELD_OUT, 1)]])


def _best_ridge(
    layer: MoELayer, fit: Callable[[float], None], ridge: float, error: Callable[[], float]
) -> float | None:
    """The ridge after whose fit the error is lowest, out of this one and larger ones for as long as it falls.

    None where the layer is better as it is. The layer has other weights afterwards.
    """
    before = copied_weights(layer)
    best, lowest, latest = None, error(), math.inf
    for number in range(MOST_RIDGES):
        put_weights(layer, before)
        tried = ridge * _RAISED**number
        fit(tried)
        found = error()
        if found < lowest:
            best, lowest = tried, found
        if found >= latest:
            break
        latest = found
    return best
