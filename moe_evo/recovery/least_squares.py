"""The down matrices of a layer's experts, refitted in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_evo.config.recover import RecoverConfig
from moe_evo.errors import ModelError
from moe_evo.models.experts.matrices import expert_matrices, intermediate
from moe_evo.models.layer import MoELayer
from moe_evo.recovery.blocks import BlockInputs

_SWEEPS = 10


@dataclass(frozen=True, eq=False)
class _Expert:
    """One expert's part of the problem.

    tokens: (n,) those that reach it. features: (n, I) what enters its down matrix, times the gates. before: (I, H) its
    weights as they were. factor: (I, I) of features' features + ridge I (Cholesky), float64.
    """

    number: int
    tokens: Tensor
    features: Tensor
    before: Tensor
    ridge: Tensor
    factor: Tensor


@torch.no_grad()
def refit_down(layer: MoELayer, inputs: BlockInputs, targets: Tensor, config: RecoverConfig) -> None:
    """Solve one least-squares problem for the down matrices W_j (H, I) of all experts of a layer.

    Minimises ||Y - sum_j diag(g_j) A_j W_j'||^2 + sum_j r_j ||W_j - W_j0||^2 over the tokens: Y (N, H) are the targets
    less what biases add, A_j is what enters W_j, g_j are its gates, W_j0 the weights as they were, and r_j is
    `config.ridge` times the mean of the diagonal of A_j' diag(g_j)^2 A_j. One expert after the other, several times
    over (block Gauss-Seidel), so that no matrix is larger than I x I. An expert that no token reaches is left as it is.
    """
    down = expert_matrices(layer.experts, layer.expert_tensors())["down"]
    hidden, index, gates = (one.to(down.device) for one in (inputs.hidden, inputs.index, inputs.gates))
    residual = targets.to(down.device).float().clone()
    biases = layer.expert_tensors().get("down_proj_bias")
    experts = []
    for number in range(len(down)):
        tokens, place = torch.where(index == number)
        if not len(tokens):
            continue
        weighed = gates[tokens, place].float()[:, None]
        one = _expert(number, tokens, intermediate(layer.experts, number, hidden[tokens]).float() * weighed,
                      down[number].float().T.contiguous(), config.ridge)  # fmt: skip
        added = one.features @ one.before
        if biases is not None:
            added = added + weighed * biases[number].float()
        residual.index_add_(0, tokens, added, alpha=-1)
        experts.append(one)
    found = {one.number: one.before for one in experts}
    for _ in range(_SWEEPS):
        for one in experts:
            wanted = residual[one.tokens] + one.features @ found[one.number]
            right = one.features.double().T @ wanted.double() + one.ridge * one.before.double()
            new = torch.cholesky_solve(right, one.factor).float()
            residual.index_add_(0, one.tokens, one.features @ (new - found[one.number]), alpha=-1)
            found[one.number] = new
    for number, weights in found.items():
        down[number].copy_(weights.T)


def _expert(number: int, tokens: Tensor, features: Tensor, before: Tensor, ridge_share: float) -> _Expert:
    gram = features.double().T @ features.double()
    ridge = (ridge_share * gram.diagonal().mean()).clamp(min=1e-12)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    if failed or not factor.isfinite().all():
        raise ModelError(
            f"expert {number}: what enters its down matrix at {len(tokens)} tokens has no least-squares solution; "
            f"raise recover.ridge (now {ridge_share:g}), or leave closed_form out of recover.methods"
        )
    return _Expert(number, tokens, features, before, ridge, factor)
