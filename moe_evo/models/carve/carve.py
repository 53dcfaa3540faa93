"""Which neurons of a dense FFN become which expert, and the router that chooses, from what the neurons do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe_evo.models.carve.build import FFN, Expansion, Factors
from moe_evo.models.carve.clusters import balanced_clusters
from moe_evo.models.carve.formats import Layout
from moe_evo.models.carve.profile import inner_of, is_active, outputs_of
from moe_evo.models.carve.routers import centroid_router, least_squares_router, random_router

RouterKind = Literal["least_squares", "centroid"]

_ACTIVE_SHARE = 0.1  # of the neurons, at each token: they tell which neurons belong together


@dataclass(frozen=True)
class CarvedLayer:
    """How far a carved layer is from the FFN that it was made of, at the tokens that were profiled.

    relative_error: ||MoE(x) - FFN(x)|| / ||FFN(x)||, squares summed over tokens, with the experts that the router
    chooses. best_error: the same with the top_k experts that put out most for each token, which no router knows, each
    with its weight in the FFN.
    """

    relative_error: float
    best_error: float


@torch.no_grad()
def carved(
    ffn: FFN, hidden: Tensor, activation: nn.Module, layout: Layout, router: RouterKind, rng: np.random.Generator
) -> tuple[Expansion, CarvedLayer]:
    """Neurons that are active together become an expert; those that are active most often become the shared one.

    hidden: (N, H), what enters the FFN. Neurons are clustered by when they are active (CMoE, arXiv 2502.04416).
    """
    inner = inner_of(ffn, hidden, activation)
    active = is_active(inner, ffn, _ACTIVE_SHARE)
    order = active.float().mean(dim=0).argsort(descending=True, stable=True)
    shared, rest = order[: layout.shared_size].sort().values, order[layout.shared_size :].sort().values
    clusters = balanced_clusters(active[:, rest].T.float().cpu().numpy(), layout.num_experts, rng)
    neurons = rest[torch.from_numpy(clusters).to(rest.device)]
    sizes = torch.cat([part.norm(dim=-1) for part in outputs_of(inner, ffn, neurons)])
    if router == "centroid":
        rows = centroid_router(ffn.gate, neurons, hidden)
    else:
        # where all are active, none is to be chosen, and the router is that of half of them
        wanted = layout.top_k if layout.top_k < layout.num_experts else layout.num_experts // 2
        rows = least_squares_router(hidden, sizes, wanted)
    logits = hidden.float() @ rows.T * Factors.of_parts(layout).router
    chosen = _weights(logits, logits.topk(layout.top_k, dim=1).indices)
    best = _weights(torch.zeros_like(sizes), sizes.topk(layout.top_k, dim=1).indices)
    errors = [_distance(inner, ffn, neurons, one) for one in (chosen, best)]
    length = float((inner @ ffn.down.float().T).norm().clamp(min=torch.finfo(torch.float32).tiny))
    return Expansion(neurons, shared, rows), CarvedLayer(errors[0] / length, errors[1] / length)


def upcycled(ffn: FFN, num_experts: int, router_scale: float, generator: torch.Generator) -> Expansion:
    """Every expert is the whole FFN (sparse upcycling, arXiv 2212.05055)."""
    inner_size, hidden_size = ffn.gate.shape
    every = torch.arange(inner_size, device=ffn.gate.device)
    router = random_router(num_experts, hidden_size, router_scale, generator).to(ffn.gate.device)
    return Expansion(every.expand(num_experts, inner_size), every[:0], router)


def _weights(logits: Tensor, index: Tensor) -> Tensor:
    """(N, E) how much each expert counts, where it counts 1 in the dense FFN: 0 if it is not in `index` (N, k)."""
    gates = logits.gather(1, index).softmax(dim=1) * index.shape[1]
    return torch.zeros_like(logits).scatter_(1, index, gates)


def _distance(inner: Tensor, ffn: FFN, neurons: Tensor, weights: Tensor) -> float:
    """||sum_e (1 - w_e) f_e(x)||, over all tokens, of experts f_e with these weights (N, E)."""
    squares, done = 0.0, 0
    for part in outputs_of(inner, ffn, neurons):
        missing = 1 - weights[done : done + len(part)]
        squares += float(torch.einsum("ne,neh->nh", missing, part).square().sum())
        done += len(part)
    return float(squares**0.5)
