"""One factor on the outputs of each expert of a layer, fitted by least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_evo.models.experts.matrices import expert_matrices
from moe_evo.models.experts.outputs import single_outputs
from moe_evo.models.layer import MoELayer
from moe_evo.recovery.blocks import BlockInputs


@torch.no_grad()
def refit_scales(layer: MoELayer, inputs: BlockInputs, targets: Tensor, ridge_share: float, batch_tokens: int) -> None:
    """Multiply the outputs of each expert j of a layer by the factor s_j of the least-squares solution.

    Minimises sum_t ||y_t - sum_j s_j g_j(t) f_j(t)||^2 + sum_j r_j (s_j - 1)^2 over the tokens t: y_t (H,) are the
    targets, f_j(t) is what expert j puts out, g_j(t) its gate, and r_j is `ridge_share` times sum_t ||g_j f_j||^2. An
    expert that no token reaches keeps the factor 1. The factors become part of the down matrices and their biases.
    """
    stacked = layer.expert_tensors()
    down = expert_matrices(layer.experts, stacked)["down"]
    num_experts, device = len(down), down.device
    products = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)
    wanted = torch.zeros(num_experts, dtype=torch.float64, device=device)
    pieces = (torch.split(one, batch_tokens) for one in (inputs.hidden, inputs.index, inputs.gates, targets))
    for piece in zip(*pieces, strict=True):
        hidden, index, gates, target = (one.to(device) for one in piece)
        outputs = single_outputs(layer.experts, hidden, index, gates).float() * gates.float()[..., None]
        pairs = (index[:, :, None] * num_experts + index[:, None, :]).flatten()
        products.view(-1).index_add_(0, pairs, (outputs @ outputs.mT).double().flatten())
        wanted.index_add_(0, index.flatten(), (outputs @ target.float()[..., None]).double().flatten())
    ridge = (ridge_share * products.diagonal()).clamp(min=1e-12)
    change = torch.linalg.solve(products + ridge.diag(), wanted - products.sum(dim=1))
    scales = (1 + change).float()
    down.copy_(down.float() * scales[:, None, None])
    if "down_proj_bias" in stacked:
        bias = stacked["down_proj_bias"]
        bias.copy_(bias.float() * scales[:, None])
