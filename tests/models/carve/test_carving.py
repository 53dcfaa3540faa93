"""Carved FFNs against stock blocks of transformers, closed forms against NumPy, profiles against hooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_evo.config.model import ModelConfig
from moe_evo.models.carve.build import FFN, Expansion, Factors, block_state
from moe_evo.models.carve.carve import carved, upcycled
from moe_evo.models.carve.formats import Layout, target_config
from moe_evo.models.carve.profile import drawn_rows, ffn_inputs, is_active
from moe_evo.models.carve.routers import centroid_router, least_squares_router
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource

HIDDEN, INNER, EXPERTS = 32, 64, 4
SILU = torch.nn.SiLU()


def random_ffn(seed: int = 0) -> FFN:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(INNER, HIDDEN, generator=generator) for _ in range(2))
    return FFN(gate, up, torch.randn(HIDDEN, INNER, generator=generator))


def random_hidden(number: int = 200, seed: int = 1) -> Tensor:
    return torch.randn(number, HIDDEN, generator=torch.Generator().manual_seed(seed))


def dense_output(ffn: FFN, hidden: Tensor) -> Tensor:
    return (SILU(hidden @ ffn.gate.T) * (hidden @ ffn.up.T)) @ ffn.down.T


def stock_block(
    ffn: FFN, made: Expansion, layout: Layout, factors: Factors, model_type: str = "llama"
) -> torch.nn.Module:
    """The MoE block of a stock model that holds the experts."""
    dense = tiny_model(model_type, intermediate_size=INNER)
    config = target_config(dense.config, layout)
    block = AutoModelForCausalLM.from_config(config).eval().model.layers[0].mlp
    block.load_state_dict(block_state(ffn, made, config, factors))
    return block


def output_of(block: torch.nn.Module, hidden: Tensor) -> Tensor:
    with torch.inference_mode():
        return block(hidden[None])[0]


@pytest.mark.parametrize("shared_size", [0, 32])
@pytest.mark.parametrize("router", ["least_squares", "centroid"])
def test_every_neuron_has_one_place_and_all_experts_together_are_the_ffn(shared_size: int, router: str) -> None:
    ffn, hidden = random_ffn(), random_hidden()
    layout = Layout(EXPERTS, EXPERTS, (INNER - shared_size) // EXPERTS, shared_size)
    made, facts = carved(ffn, hidden, SILU, layout, router, np.random.default_rng(0))
    assert made.neurons.shape == (EXPERTS, layout.width) and made.shared.shape == (shared_size,)
    assert sorted([*made.neurons.ravel().tolist(), *made.shared.tolist()]) == list(range(INNER))
    got = output_of(stock_block(ffn, made, layout, Factors.of_parts(layout)), random_hidden(seed=5))
    expected = dense_output(ffn, random_hidden(seed=5))
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert facts.relative_error < 1e-5 and facts.best_error < 1e-6


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_errors_that_are_told_are_those_of_the_stock_block(top_k: int) -> None:
    ffn, hidden = random_ffn(), random_hidden()
    layout = Layout(EXPERTS, top_k, INNER // EXPERTS)
    made, facts = carved(ffn, hidden, SILU, layout, "least_squares", np.random.default_rng(0))
    got = output_of(stock_block(ffn, made, layout, Factors.of_parts(layout)), hidden)
    expected = dense_output(ffn, hidden)
    assert facts.relative_error == pytest.approx(float((got - expected).norm() / expected.norm()), rel=1e-4)
    parts = torch.stack([(SILU(hidden @ ffn.gate.T) * (hidden @ ffn.up.T))[:, own] @ ffn.down[:, own].T
                         for own in made.neurons], dim=1)  # fmt: skip
    missing = expected.clone()
    for token, norms in enumerate(parts.norm(dim=-1)):
        for expert in norms.argsort(descending=True)[:top_k].tolist():
            missing[token] -= parts[token, expert]
    assert facts.best_error == pytest.approx(float(missing.norm() / expected.norm()), rel=1e-4)
    assert facts.best_error <= facts.relative_error


def test_neurons_that_are_active_together_become_an_expert_and_the_router_finds_it() -> None:
    planted = torch.randperm(INNER, generator=torch.Generator().manual_seed(3)).view(EXPERTS, -1)
    gate = torch.full((INNER, HIDDEN), 0.0)
    for topic, neurons in enumerate(planted):
        gate[neurons, topic] = 4.0  # only the topic's own tokens open these neurons
    down = torch.eye(HIDDEN).repeat(1, INNER // HIDDEN)  # of equal length, so that a topic's neurons are all active
    ffn = FFN(gate, torch.ones(INNER, HIDDEN) / HIDDEN, down)
    topics = torch.arange(400) % EXPERTS
    hidden = 0.1 * random_hidden(400).abs()
    hidden[torch.arange(400), topics] = 3.0
    for router in ("least_squares", "centroid"):
        layout = Layout(EXPERTS, 1, INNER // EXPERTS)
        made, facts = carved(ffn, hidden, SILU, layout, router, np.random.default_rng(0))
        assert {frozenset(one.tolist()) for one in made.neurons} == {frozenset(one.tolist()) for one in planted}
        chosen = (hidden @ made.router.T).argmax(dim=1)
        own = [int(planted[topic][0]) in made.neurons[expert] for topic, expert in zip(topics, chosen, strict=True)]
        assert all(own)
        assert facts.relative_error == pytest.approx(facts.best_error, abs=1e-3)


def test_the_shared_expert_has_the_neurons_that_are_active_most_often() -> None:
    ffn, hidden = random_ffn(), random_hidden()
    ffn.down[:, 10:26] *= 50  # so that what these add is among the largest at every token
    made, _ = carved(ffn, hidden, SILU, Layout(EXPERTS, 2, 14, 8), "least_squares", np.random.default_rng(0))
    assert set(made.shared.tolist()) <= set(range(10, 26))


def test_as_many_neurons_are_active_as_asked_and_a_silent_one_never() -> None:
    ffn = random_ffn()
    inner = random_hidden(50).repeat(1, 2)
    inner[:, 7] = 0.0
    active = is_active(inner, ffn, 0.25)
    assert (active.sum(dim=1) == 16).all() and not active[:, 7].any()
    assert not is_active(torch.zeros(3, INNER), ffn, 0.25).any()


def test_the_least_squares_router_is_that_of_numpy() -> None:
    hidden, sizes = random_hidden(300), random_hidden(300, seed=2)[:, :EXPERTS].abs()
    x = hidden.double().numpy()
    wanted = np.zeros((300, EXPERTS))
    np.put_along_axis(wanted, np.argsort(-sizes.numpy(), axis=1)[:, :2], 1.0, axis=1)
    wanted -= wanted.mean(axis=1, keepdims=True)
    ridge = np.sqrt(1e-3 * np.square(x).sum(axis=0).mean())
    rows = np.linalg.lstsq(np.vstack([x, ridge * np.eye(HIDDEN)]), np.vstack([wanted, np.zeros((HIDDEN, EXPERTS))]))[
        0
    ].T
    rows -= rows.mean(axis=0)
    logits = x @ rows.T
    rows /= np.sqrt(np.square(logits - logits.mean(axis=1, keepdims=True)).mean())
    got = least_squares_router(hidden, sizes, 2)
    np.testing.assert_allclose(got.numpy(), rows, rtol=1e-4, atol=1e-5)


def test_centroids_are_means_of_gate_rows_whose_logits_are_spread_by_one() -> None:
    gate, hidden = random_ffn().gate, random_hidden()
    neurons = torch.arange(INNER).view(EXPERTS, -1)
    rows = centroid_router(gate, neurons, hidden)
    means = np.stack([gate[one].numpy().mean(axis=0) for one in neurons])
    apart = means - means.mean(axis=0)
    np.testing.assert_allclose(rows / rows.norm(), apart / np.linalg.norm(apart), rtol=1e-4, atol=1e-6)
    logits = hidden @ rows.T
    assert (logits - logits.mean(dim=1, keepdim=True)).square().mean() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_copies_of_an_ffn_are_the_ffn_whatever_their_router_says(model_type: str, top_k: int) -> None:
    ffn = random_ffn()
    made = upcycled(ffn, EXPERTS, 2.0, torch.Generator().manual_seed(0))
    block = stock_block(ffn, made, Layout(EXPERTS, top_k, INNER), Factors(), model_type)
    expected = dense_output(ffn, random_hidden())
    assert (output_of(block, random_hidden()) - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert made.router.std() == pytest.approx(2.0, rel=0.2)


def test_inputs_of_ffns_are_those_of_the_stock_model_without_padding(tmp_path: Path) -> None:
    dense = tiny_model("qwen2", intermediate_size=INNER)
    dense.save_pretrained(tmp_path)
    moe = load_model(ModelSource(ModelConfig(path=str(tmp_path), device="cpu"), "dense"))
    rows = [
        torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 3, 14, 3)
    ]
    done: list[int] = []
    found = ffn_inputs(moe, rows, 20, done.append)
    assert sum(done) == 4 and len(done) > 1
    for layer, hidden in zip(dense.model.layers, found, strict=True):
        seen: list[Tensor] = []
        handle = layer.mlp.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
        with torch.inference_mode():
            for row in sorted(rows, key=len):
                dense(input_ids=row[None])
        handle.remove()
        torch.testing.assert_close(hidden, torch.cat(seen), rtol=1e-5, atol=1e-5)


def test_rows_are_drawn_until_there_are_enough_tokens() -> None:
    rows = [[1] * 5, [2] * 7, [3] * 4]
    drawn = drawn_rows(rows, 10, np.random.default_rng(0))
    assert sum(map(len, drawn)) == 10
    again = drawn_rows(rows, 10, np.random.default_rng(0))
    assert all(map(torch.equal, drawn, again))
    assert sorted(map(len, drawn_rows(rows, 100, np.random.default_rng(1)))) == [4, 5, 7]
