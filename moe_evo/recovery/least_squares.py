"""The down matrices of a layer's experts, refitted in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_evo.errors import ModelError
from moe_evo.models.experts.matrices import expert_matrices, intermediate
from moe_evo.models.layer import MoELayer
from moe_evo.recovery.blocks import BlockInputs
from moe_evo.recovery.pass_memory import PassMemory

_SWEEPS = 10


@dataclass(frozen=True, eq=False)
class _Expert:
    """One expert's part of the problem.

    pieces: of its tokens, the numbers (n,) and what enters its down matrix times the gates (n, I). before: (I, H) its
    weights as they were. factor: (I, I) of features' features + ridge I (Cholesky), float64. Features and factor may
    wait in host memory.
    """

    number: int
    pieces: list[tuple[Tensor, Tensor]]
    before: Tensor
    ridge: Tensor
    factor: Tensor


@torch.no_grad()
def refit_down(layer: MoELayer, inputs: BlockInputs, targets: Tensor, ridge_share: float, memory: PassMemory) -> None:
    """Solve one least-squares problem for the down matrices W_j (H, I) of all experts of a layer.

    Minimises ||Y - sum_j diag(g_j) A_j W_j'||^2 + sum_j r_j ||W_j - W_j0||^2 over the tokens: Y (N, H) are the targets
    less what biases add, A_j is what enters W_j, g_j are its gates, W_j0 the weights as they were, and r_j is
    `ridge_share` times the mean of the diagonal of A_j' diag(g_j)^2 A_j. One expert after the other, several times
    over (block Gauss-Seidel), so that no matrix is larger than I x I. An expert that no token reaches is left as it is.
    Once memory has run out, what is not needed at the moment waits in host memory.
    """
    stacked = layer.expert_tensors()
    down = expert_matrices(layer.experts, stacked)["down"]
    device = down.device
    store = torch.device("cpu") if memory.was_halved else device
    biases = stacked.get("down_proj_bias")
    residual = targets.to(device).float().clone()
    experts = []
    for number in range(len(down)):
        tokens, place = torch.where(inputs.index == number)
        if not len(tokens):
            continue
        before, pieces = down[number].float().T.contiguous(), []
        gram = torch.zeros(len(before), len(before), dtype=torch.float64, device=device)
        for some, places in zip(
            torch.split(tokens, memory.batch_tokens), torch.split(place, memory.batch_tokens), strict=True
        ):
            gates = inputs.gates[some, places].to(device).float()[:, None]
            features = intermediate(layer.experts, number, inputs.hidden[some].to(device)).float() * gates
            added = features @ before
            if biases is not None:
                added = added + gates * biases[number].float()
            residual.index_add_(0, some.to(device), added, alpha=-1)
            gram += features.double().T @ features.double()
            pieces.append((some.to(device), features.to(store)))
        ridge, factor = _factor(gram, number, len(tokens), ridge_share)
        experts.append(_Expert(number, pieces, before, ridge, factor.to(store)))
    found = {one.number: one.before for one in experts}
    for _ in range(_SWEEPS):
        for one in experts:
            found[one.number] = _solved(one, found[one.number], residual)
    for number, weights in found.items():
        down[number].copy_(weights.T)


def _solved(expert: _Expert, weights: Tensor, residual: Tensor) -> Tensor:
    """One expert's weights (I, H) for what the others leave of the targets; changes the residual (N, H)."""
    right = expert.ridge * expert.before.double()
    for tokens, stored in expert.pieces:
        features = stored.to(weights.device)
        right += features.double().T @ (residual[tokens] + features @ weights).double()
    new = torch.cholesky_solve(right, expert.factor.to(weights.device)).float()
    for tokens, stored in expert.pieces:
        residual.index_add_(0, tokens, stored.to(weights.device) @ (new - weights), alpha=-1)
    return new


def _factor(gram: Tensor, number: int, num_tokens: int, ridge_share: float) -> tuple[Tensor, Tensor]:
    """The ridge, and the Cholesky factor of the expert's features' features with it."""
    ridge = (ridge_share * gram.diagonal().mean()).clamp(min=1e-12)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    if failed or not factor.isfinite().all():
        raise ModelError(
            f"expert {number}: what enters its down matrix at {num_tokens} tokens has no least-squares solution; "
            f"raise recover.ridge (now {ridge_share:g}), or leave closed_form out of recover.methods"
        )
    return ridge, factor
