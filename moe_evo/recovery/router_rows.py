"""The router rows of a layer, fitted by least squares to logits that are corrected by what each expert is good for.

Letters in shapes: N tokens, K experts of the layer, k of them chosen for a token, H the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_evo.models.experts.outputs import single_outputs
from moe_evo.models.layer import MoELayer

_STEP_LENGTHS = (1.0, 0.5, 0.25, 0.125)
_MOST_ITERATIONS = 200
_TOLERANCE = 1e-6  # of the residual, as a share of the right-hand side


@torch.no_grad()
def refit_router(layer: MoELayer, hidden: Tensor, targets: Tensor, ridge_share: float, batch_tokens: int) -> None:
    """Change router rows (and biases) so that the layer puts out the targets (N, H) at `hidden` (N, H).

    The rows are those of `corrected_rows`. As these are for a choice of experts that may change with them, the step is
    shortened until the layer's error is lower than it was; where no step lowers it, the router is left as it is.
    """
    rows = _trained_rows(layer)
    before = {name: one.detach().clone() for name, one in rows.items()}
    error = layer_error(layer, hidden, targets, batch_tokens)
    change = corrected_rows(layer, hidden, targets, ridge_share, batch_tokens)
    for length in _STEP_LENGTHS:
        for name, one in rows.items():
            one.copy_(before[name].float() + length * change[name])
        if layer_error(layer, hidden, targets, batch_tokens) < error:
            return
    for name, one in rows.items():
        one.copy_(before[name])


def _trained_rows(layer: MoELayer) -> dict[str, Tensor]:
    """The router's weights and bias; no correction bias, which takes part in the choice of experts only."""
    return {name: one for name, one in layer.router_tensors().items() if isinstance(one, nn.Parameter)}


def layer_error(layer: MoELayer, hidden: Tensor, targets: Tensor, batch_tokens: int) -> float:
    """Sum of the squared differences of the layer's outputs from the targets."""
    device, error = layer.router_tensors()["weight"].device, 0.0
    for piece, target in zip(torch.split(hidden, batch_tokens), torch.split(targets, batch_tokens), strict=True):
        entering = piece.to(device)
        _, gates, index = layer.router(entering)
        outputs = layer.experts(entering, index, gates)
        error += float((outputs.float() - target.to(device).float()).square().sum())
    return error


def corrected_rows(
    layer: MoELayer, hidden: Tensor, targets: Tensor, ridge_share: float, batch_tokens: int
) -> dict[str, Tensor]:
    """The change of the router's weight (K, H) and bias (K,), float32, which is one step of Gauss and Newton.

    With residuals r_t = y_t - sum_i g_i f_i and the slopes J_t = d(sum_i g_i f_i) / d(logits) (H, K), the logits z_t
    were better by the d_t that minimises ||r_t - J_t d_t||^2. The rows D (K, H) are fitted to these corrections, each
    weighed by what it is worth: they minimise sum_t ||r_t - J_t D x_t||^2 + sum_j r_j ||D_j||^2, where r_j is
    `ridge_share` times the mean of the diagonal of row j's own equations. Solved by conjugate gradients.
    """
    device = layer.router_tensors()["weight"].device
    pieces = zip(torch.split(hidden, batch_tokens), torch.split(targets, batch_tokens), strict=True)
    worth = [_worth(layer, piece.to(device), target.to(device)) for piece, target in pieces]
    slopes, products, moments = (torch.cat(one) for one in zip(*worth, strict=True))
    entering = hidden.to(device).float()
    if "bias" in layer.router_tensors():
        entering = torch.cat([entering, torch.ones_like(entering[:, :1])], dim=1)
    solved = _Equations(entering, slopes, products, ridge_share).solve(moments)
    found = {"weight": solved[:, : hidden.shape[1]]}
    return found | ({"bias": solved[:, -1]} if "bias" in layer.router_tensors() else {})


def _worth(layer: MoELayer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of some tokens d gates / d logits (N, k, K), and inner products of outputs (N, k, k), and with r_t (N, k)."""
    logits = layer.router(hidden)[0].float()
    gates, index, slopes = _gate_slopes(layer, logits)
    outputs = single_outputs(layer.experts, hidden, index, gates.to(hidden.dtype)).float()
    residual = targets.float() - (gates[..., None] * outputs).sum(dim=1)
    return slopes, outputs @ outputs.mT, (outputs @ residual[..., None]).squeeze(-1)


@torch.enable_grad()
def _gate_slopes(layer: MoELayer, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the family's own router makes of logits (N, K): gates and experts (N, k), d gates / d logits (N, k, K)."""
    logits = logits.detach().requires_grad_(True)
    top_k: Any = layer.router.top_k
    gates, index = layer.route_among(logits, torch.ones_like(logits, dtype=torch.bool), top_k)
    slopes = [torch.autograd.grad(gates[:, place].sum(), logits, retain_graph=True)[0] for place in range(top_k)]
    return gates.detach().float(), index, torch.stack(slopes, dim=1)


@dataclass(frozen=True, eq=False)
class _Equations:
    """The normal equations of `corrected_rows`. entering: (N, H); slopes: (N, k, K); products: (N, k, k)."""

    entering: Tensor
    slopes: Tensor
    products: Tensor
    ridge_share: float

    def solve(self, moments: Tensor) -> Tensor:
        """(K, H) by conjugate gradients, preconditioned by the diagonal; moments: (N, k)."""
        diagonal, ridge = self._diagonal()
        right = (self.slopes.mT @ moments[..., None]).squeeze(-1).T @ self.entering
        found, left = torch.zeros_like(right), right
        scaled = left / diagonal
        direction, size = scaled, (left * scaled).sum()
        smallest = _TOLERANCE * right.norm()
        for _ in range(_MOST_ITERATIONS):
            if left.norm() <= smallest:
                break
            product = self._times(direction) + ridge * direction
            length = size / (direction * product).sum()
            found = found + length * direction
            left = left - length * product
            scaled = left / diagonal
            before, size = size, (left * scaled).sum()
            direction = scaled + size / before * direction
        return found

    def _times(self, rows: Tensor) -> Tensor:
        logits = self.entering @ rows.T
        outputs = self.products @ (self.slopes @ logits[..., None])
        return (self.slopes.mT @ outputs).squeeze(-1).T @ self.entering

    def _diagonal(self) -> tuple[Tensor, Tensor]:
        """(K, H), with the ridge, and the ridge (K, 1)."""
        weights = (self.slopes * (self.products @ self.slopes)).sum(dim=1)
        own = weights.T @ self.entering.square()
        ridge = (self.ridge_share * own.mean(dim=1, keepdim=True)).clamp(min=1e-12)
        return own + ridge, ridge
