"""Routers of carved experts, in closed form: which experts the neurons' own activity asks for, as a linear function."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-3


def least_squares_router(hidden: Tensor, sizes: Tensor, top_k: int) -> Tensor:
    """(E, H) whose logits tell best, in the sense of least squares, which top_k experts put out most for a token.

    hidden: (N, H), what enters the experts. sizes: (N, E), norms of their outputs. Ridge regression on 1 for the top_k
    largest and 0 for the others, less the mean over experts, which chooses nothing; without an intercept, which these
    formats lack.
    """
    num_experts = sizes.shape[1]
    wanted = torch.zeros_like(sizes, dtype=torch.float64)
    wanted.scatter_(1, sizes.topk(top_k, dim=1).indices, 1.0)
    inputs = hidden.double()
    products = inputs.T @ inputs
    products.diagonal().add_(_RIDGE * products.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    rows = torch.linalg.solve(products, inputs.T @ (wanted - top_k / num_experts)).T
    return _normalised(rows, inputs)


def centroid_router(gate: Tensor, neurons: Tensor, hidden: Tensor) -> Tensor:
    """(E, H) the mean gate row (I, H) of each expert's neurons (E, m), as in MoEfication (arXiv 2110.01786)."""
    return _normalised(gate.double()[neurons].mean(dim=1), hidden.double())


def random_router(num_experts: int, hidden_size: int, scale: float, generator: torch.Generator) -> Tensor:
    """(E, H) normally distributed, as sparse upcycling begins with (arXiv 2212.05055); equal experts need no other."""
    return torch.randn(num_experts, hidden_size, generator=generator) * scale


def _normalised(rows: Tensor, hidden: Tensor) -> Tensor:
    """The rows, float32, scaled so that a token's logits have the standard deviation 1 among experts, over all tokens.

    What rows have in common is taken off: it chooses nothing, and 16 bits would round the differences away.
    """
    rows = rows - rows.mean(dim=0)
    spread = (hidden @ rows.T).square().mean().sqrt()
    return (rows / spread.clamp(min=torch.finfo(torch.float64).tiny)).float()
