"""The hook of the experts: who computes, in which order, and what is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import logits, tiny_model, tokens

from moe_evo.models.experts_hook import IMPLEMENTATION, Compute, Hook, hooks_in_force
from moe_evo.models.view import MoEModel


@pytest.fixture(scope="module")
def mixtral() -> MoEModel:
    return MoEModel(tiny_model("mixtral"))


def test_the_newest_hook_is_called_first_and_the_model_computes_last(mixtral: MoEModel) -> None:
    calls: list[str] = []

    def noting(name: str) -> Any:
        def forward(compute: Compute, experts: Any, *routed: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            return compute(experts, *routed)

        return forward

    model = mixtral.language_model
    untouched, previous = logits(model, tokens()), model.get_experts_implementation()
    experts = [layer.experts for layer in mixtral.layers]
    with hooks_in_force(model, experts), hooks_in_force(model, experts):
        assert model.get_experts_implementation()[""] == IMPLEMENTATION
        older, newer = Hook(experts[0], noting("older")), Hook(experts[0], noting("newer"))
        assert torch.equal(logits(model, tokens()), untouched)
        assert calls == ["newer", "older"]
        with pytest.raises(AssertionError, match="the newest hook goes first"):
            older.remove()
        newer.remove()
        older.remove()
        assert torch.equal(logits(model, tokens()), untouched)
        assert calls == ["newer", "older"]
    assert model.get_experts_implementation() == previous


def test_nothing_of_it_is_left_when_the_block_is_left_by_an_error(mixtral: MoEModel) -> None:
    model, experts = mixtral.language_model, [layer.experts for layer in mixtral.layers]
    before = [set(module.__dict__) for module in experts]
    previous = model.get_experts_implementation()
    with pytest.raises(RuntimeError, match="stop"), hooks_in_force(model, experts):
        raise RuntimeError("stop")
    assert [set(module.__dict__) for module in experts] == before
    assert model.get_experts_implementation() == previous
