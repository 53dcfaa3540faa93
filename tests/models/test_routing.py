"""Routing of logits: with everyone kept as the router itself does, with a choice kept as the exported router."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, random_pruning, tiny_model

from moe_evo.models.routing import exported_route
from moe_evo.models.view import MoEModel

HIDDEN = torch.randn((64, 32), generator=torch.Generator().manual_seed(0))


def spread(weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The weight of each of 8 experts, (T, 8)."""
    return torch.zeros((len(index), 8), dtype=torch.float64).scatter_(1, index, weights.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_logits_among_everyone_are_routed_as_by_the_router(family: str, dtype: torch.dtype) -> None:
    moe = MoEModel(tiny_model(family).to(dtype))
    for layer in moe.layers:
        logits, weights, index = layer.router(HIDDEN.to(dtype))
        found = layer.route_among(logits, torch.ones_like(logits, dtype=torch.bool), 2)
        rounding = torch.finfo(dtype).eps  # granitemoe rounds weights as hidden states, of which none are left here
        torch.testing.assert_close(spread(*found), spread(weights, index), rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_logits_among_some_are_routed_as_by_a_router_that_has_only_those(family: str, top_k: int) -> None:
    moe = MoEModel(tiny_model(family))
    genome = random_pruning(moe.shape, 4, top_k=top_k)
    for layer, gene in zip(moe.layers, genome.layers, strict=True):
        logits, _, _ = layer.router(HIDDEN)
        kept = torch.from_numpy(np.isin(np.arange(8), gene.kept)).expand_as(logits)
        found = layer.route_among(logits, kept, top_k)
        rows = layer.mapped_router(gene.router_mapping)
        _, weights, slots = exported_route(layer.router, HIDDEN, rows, top_k)
        expected = spread(weights, torch.tensor(gene.kept)[slots])
        torch.testing.assert_close(spread(*found), expected, rtol=1e-5, atol=1e-6)
        assert not spread(*found)[~kept].any()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3"])
def test_every_token_may_have_others_to_choose_from(family: str) -> None:
    moe = MoEModel(tiny_model(family))
    layer = moe.layers[0]
    logits, _, _ = layer.router(HIDDEN)
    masks = [torch.ones(8, dtype=torch.bool) for _ in range(2)]
    masks[0][3] = masks[1][5] = False
    apart = [spread(*layer.route_among(logits, mask.expand_as(logits), 2)) for mask in masks]
    together = layer.route_among(logits.repeat(2, 1), torch.cat([mask.expand_as(logits) for mask in masks]), 2)
    torch.testing.assert_close(spread(*together), torch.cat(apart))
    assert not apart[0][:, 3].any() and apart[1][:, 3].any()
