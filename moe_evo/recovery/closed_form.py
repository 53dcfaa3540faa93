"""The layers of a pruned model refitted without gradient steps: scales of experts, down matrices and router rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_evo.config.recover import RecoverConfig
from moe_evo.models.layer import MoELayer
from moe_evo.recovery.blocks import BlockInputs
from moe_evo.recovery.expert_scales import refit_scales
from moe_evo.recovery.least_squares import refit_down
from moe_evo.recovery.pass_memory import PassMemory
from moe_evo.recovery.router_rows import refit_router


@torch.no_grad()
def refit(layer: MoELayer, inputs: BlockInputs, targets: Tensor, config: RecoverConfig, memory: PassMemory) -> None:
    """Refit what `config.refitted` names of one layer, the router last: its logits are right for the experts then."""
    parts = config.refitted
    if "scales" in parts:
        refit_scales(layer, inputs, targets, config.ridge, memory.batch_tokens)
    if "experts" in parts:
        refit_down(layer, inputs, targets, config.ridge, memory)
    if "router" in parts:
        refit_router(layer, inputs.hidden, targets, config.ridge, memory.batch_tokens)
