"""Router rows and scales against NumPy's solutions of the whole problem, and what `recover.train` lets change."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from test_layer_repair import CONFIG, memory, small_and_material
from tiny_models import tiny_model

from moe_evo.config.recover import RecoverConfig
from moe_evo.errors import ConfigError
from moe_evo.models.experts.matrices import expert_matrices
from moe_evo.models.layer import MoELayer
from moe_evo.models.view import MoEModel
from moe_evo.recovery.blocks import BlockInputs, block_inputs
from moe_evo.recovery.closed_form import held_out_tokens, refit
from moe_evo.recovery.expert_scales import refit_scales
from moe_evo.recovery.layer_repair import copied_weights, put_weights, repaired_by_layers
from moe_evo.recovery.least_squares import refit_down
from moe_evo.recovery.router_rows import corrected_rows, layer_error, refit_router

FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss"]
Array = npt.NDArray[np.float64]


def first_layer(model_type: str, folder: Path) -> tuple[MoELayer, BlockInputs, torch.Tensor]:
    """The first layer of a pruned model, what enters it, and what the full model's layer puts out."""
    small, material = small_and_material(model_type, folder)
    assert material.blocks is not None
    inputs = block_inputs(small, material.lessons, material.blocks.numbers, 0, 100)
    return small.layers[0], inputs, material.blocks.of(0)


def outputs_of(layer: MoELayer, inputs: BlockInputs) -> Array:
    """(N, k, H) what each chosen expert puts out, one token and expert after the other."""
    experts = layer.experts
    found = np.zeros((*inputs.index.shape, inputs.hidden.shape[1]))
    for token, chosen in enumerate(inputs.index.tolist()):
        for place, expert in enumerate(chosen):
            gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
            if not experts.is_transposed:
                gate_up, down = gate_up.T, down.T
            product = inputs.hidden[token] @ gate_up
            product = product + experts.gate_up_proj_bias[expert] if experts.has_bias else product
            output = experts._apply_gate(product) @ down
            output = output + experts.down_proj_bias[expert] if experts.has_bias else output
            found[token, place] = output.detach().numpy()
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scales_solve_the_least_squares_problem_and_become_part_of_the_experts(model_type: str, tmp_path: Path) -> None:
    layer, inputs, targets = first_layer(model_type, tmp_path)
    weighed = outputs_of(layer, inputs) * inputs.gates.numpy()[..., None]
    features = np.zeros((*targets.shape, layer.num_experts))
    for token, chosen in enumerate(inputs.index.tolist()):
        features[token][:, chosen] = weighed[token].T
    features = features.reshape(-1, layer.num_experts)
    gram = features.T @ features
    ridge = np.diag(0.1 * np.diag(gram))
    expected = np.linalg.solve(gram + ridge, features.T @ targets.numpy().reshape(-1).astype(float) + ridge.sum(1))
    before = copy.deepcopy(layer.expert_tensors())
    refit_scales(layer, inputs, targets, 0.1, 37)
    assert np.abs(expected - 1).max() > 0.05
    for name, tensor in layer.expert_tensors().items():
        factors = torch.from_numpy(expected).float() if name.startswith("down") else torch.ones(layer.num_experts)
        shaped = before[name] * factors.view(-1, *[1] * (tensor.ndim - 1))
        torch.testing.assert_close(tensor.detach(), shaped, rtol=1e-3, atol=1e-5)


def slopes_of(model_type: str, gates: Array, logits: Array) -> Array:
    """(k, k) d gates / d logits of one token's chosen experts, by the family's formula."""
    if model_type != "deepseek_v3":  # a softmax of the chosen logits
        return np.diag(gates) - np.outer(gates, gates)
    sigmoids = 1 / (1 + np.exp(-logits))  # divided by their sum, times routed_scaling_factor
    rising, total = sigmoids * (1 - sigmoids), sigmoids.sum()
    return 1.5 * (np.diag(rising) / total - np.outer(sigmoids, rising) / total**2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_router_rows_solve_the_linearised_problem_at_once(model_type: str, tmp_path: Path) -> None:
    layer, inputs, targets = first_layer(model_type, tmp_path)
    logits = layer.router(inputs.hidden)[0].numpy().astype(float)
    outputs, gates = outputs_of(layer, inputs), inputs.gates.numpy().astype(float)
    entering = inputs.hidden.numpy().astype(float)
    if model_type == "gpt_oss":  # whose router has a bias
        entering = np.concatenate([entering, np.ones_like(entering[:, :1])], axis=1)
    num_tokens, width = entering.shape
    features = np.zeros((num_tokens, targets.shape[1], layer.num_experts, width))
    for token, chosen in enumerate(inputs.index.tolist()):
        slopes = outputs[token].T @ slopes_of(model_type, gates[token], logits[token, chosen])
        features[token][:, chosen] = slopes[:, :, None] * entering[token]
    residual = targets.numpy() - (gates[..., None] * outputs).sum(axis=1)
    flat = features.reshape(-1, layer.num_experts * width)
    gram = flat.T @ flat
    ridge = 0.05 * np.diag(gram).reshape(layer.num_experts, width).mean(axis=1).repeat(width)
    expected = np.linalg.solve(gram + np.diag(ridge), flat.T @ residual.reshape(-1)).reshape(-1, width)
    got = corrected_rows(layer, inputs.hidden, targets, 0.05, 41)
    assert set(got) == ({"weight", "bias"} if model_type == "gpt_oss" else {"weight"})
    found = torch.cat([one.reshape(len(one), -1) for one in got.values()], dim=1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_step_of_the_router_lowers_the_error_and_leaves_correction_biases(model_type: str, tmp_path: Path) -> None:
    layer, inputs, targets = first_layer(model_type, tmp_path)
    before, error = copy.deepcopy(layer.router_tensors()), layer_error(layer, inputs.hidden, targets, 100)
    refit_router(layer, inputs.hidden, targets, 0.001, 100)
    assert layer_error(layer, inputs.hidden, targets, 100) < 0.98 * error
    for name, tensor in layer.router_tensors().items():
        assert torch.equal(tensor, before[name]) == (name == "e_score_correction_bias")


def test_a_router_that_no_step_betters_is_left_as_it_is(tmp_path: Path) -> None:
    layer, inputs, _ = first_layer("mixtral", tmp_path)
    _, gates, index = layer.router(inputs.hidden)
    own = layer.experts(inputs.hidden, index, gates).detach()
    before = layer.router_tensors()["weight"].detach().clone()
    refit_router(layer, inputs.hidden, own, 0.001, 100)
    assert torch.equal(layer.router_tensors()["weight"], before)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("train", "changed"),
    [
        ([], {"down_proj"}),
        (["adapters", "norms"], {"down_proj"}),
        (["scales"], {"down_proj", "down_proj_bias"}),
        (["router"], {"weight", "bias"}),
        (["all"], {"down_proj", "weight", "bias"}),
        (["scales", "router"], {"down_proj", "down_proj_bias", "weight", "bias"}),
    ],
)
def test_what_train_names_is_refitted_and_nothing_else(
    model_type: str, train: list[str], changed: set[str], tmp_path: Path
) -> None:
    layer, inputs, _ = first_layer(model_type, tmp_path)
    before = {**layer.router_tensors(), **layer.expert_tensors()}
    before = {name: one.detach().clone() for name, one in before.items()}
    targets = outputs_with_other_weights(layer, inputs, changed)
    refit(layer, inputs, targets, replace(CONFIG, train=train), memory())
    after = {**layer.router_tensors(), **layer.expert_tensors()}
    found = {name for name, one in after.items() if not torch.equal(one, before[name])}
    assert found <= changed
    # behind another refit no step of the router may be better, as each lowers the layer's error or is not made
    assert found >= (changed & set(after)) - ({"weight", "bias"} if len(changed) > 2 else set())


@torch.no_grad()
def outputs_with_other_weights(layer: MoELayer, inputs: BlockInputs, changed: set[str]) -> torch.Tensor:
    """(N, H) what this layer puts out with some other weights, so that a fit of these can come near to it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {**layer.router_tensors(), **layer.expert_tensors()}
    trained = [one for name, one in tensors.items() if name in changed]
    before = [one.clone() for one in trained]
    for one in trained:
        one.add_(torch.randn(one.shape, generator=generator) * 0.3 * one.abs().mean())
    _, gates, index = layer.router(inputs.hidden)
    wanted = (0.7 if "down_proj_bias" in changed else 1.0) * layer.experts(inputs.hidden, index, gates)
    for one, old in zip(trained, before, strict=True):
        one.copy_(old)
    return wanted


def test_every_refit_of_a_layer_lowers_its_error_further(tmp_path: Path) -> None:
    errors = []
    for number, train in enumerate((["scales"], ["scales", "experts"], ["scales", "experts", "router"])):
        layer, inputs, targets = first_layer("mixtral", tmp_path / str(number))
        if not errors:
            errors.append(layer_error(layer, inputs.hidden, targets, 100))
        refit(layer, inputs, targets, replace(CONFIG, train=train), memory())
        errors.append(layer_error(layer, inputs.hidden, targets, 100))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_refit_with_more_unknowns_than_tokens_is_no_worse_at_tokens_that_it_does_not_know(
    model_type: str, tmp_path: Path
) -> None:
    full = MoEModel(tiny_model(model_type))
    small, material = small_and_material(model_type, tmp_path / "few", full=full, number=4)
    _, other = small_and_material(model_type, tmp_path / "other", full=full, seed=5)
    assert material.blocks is not None and other.blocks is not None
    inputs = block_inputs(small, material.lessons, material.blocks.numbers, 0, 100)
    unknown = block_inputs(small, other.lessons, other.blocks.numbers, 0, 100)
    targets, wanted, layer = material.blocks.of(0), other.blocks.of(0), small.layers[0]
    before = copied_weights(layer)
    assert len(targets) < unknowns_of(layer)
    errors = {"before": layer_error(layer, unknown.hidden, wanted, 100)}
    refit_down(layer, inputs, targets, CONFIG.ridge, memory())
    errors["one ridge"] = layer_error(layer, unknown.hidden, wanted, 100)
    put_weights(layer, before)
    refit(layer, inputs, targets, CONFIG, memory())
    errors["best ridge"] = layer_error(layer, unknown.hidden, wanted, 100)
    assert errors["best ridge"] <= errors["before"] < errors["one ridge"]


def unknowns_of(layer: MoELayer) -> int:
    """How many numbers each row of the experts' down matrices has, all experts together."""
    down = expert_matrices(layer.experts, layer.expert_tensors())["down"]
    return down.shape[0] * down.shape[2]


def test_a_layer_that_no_ridge_betters_is_left_as_it_is(tmp_path: Path) -> None:
    layer, inputs, _ = first_layer("mixtral", tmp_path)
    noise = torch.randn(len(inputs.hidden), inputs.hidden.shape[1], generator=torch.Generator().manual_seed(1))
    _, gates, index = layer.router(inputs.hidden)
    before = copied_weights(layer)
    own = layer.experts(inputs.hidden, index, gates).detach()
    refit(layer, inputs, own + 3 * own.std() * noise, CONFIG, memory())  # only chance tells the targets from its own
    assert all(torch.equal(one, before[name]) for name, one in copied_weights(layer).items())


def test_the_ridge_is_the_one_with_the_smallest_error_at_prompts_that_are_held_out(tmp_path: Path) -> None:
    layer, inputs, targets = first_layer("mixtral", tmp_path)
    before, held_out = copied_weights(layer), held_out_tokens(inputs.lessons)
    assert 0.1 < held_out.float().mean() < 0.3
    assert not set(inputs.lessons[held_out].tolist()) & set(inputs.lessons[~held_out].tolist())
    errors = {}
    for ridge in [CONFIG.ridge * 10**power for power in range(5)]:
        put_weights(layer, before)
        refit_down(layer, inputs.at(~held_out), targets[~held_out], ridge, memory())
        errors[ridge] = layer_error(layer, inputs.hidden[held_out], targets[held_out], 100)
    best = min(errors, key=errors.__getitem__)
    assert best != CONFIG.ridge
    put_weights(layer, before)
    refit_down(layer, inputs, targets, best, memory())
    expected = copied_weights(layer)
    put_weights(layer, before)
    refit(layer, inputs, targets, CONFIG, memory())
    assert all(torch.equal(one, expected[name]) for name, one in copied_weights(layer).items())


@pytest.mark.parametrize(("lessons", "expected"), [([3] * 10, [False] * 8 + [True] * 2), ([3] * 4, [False] * 4)])
def test_of_a_single_prompt_its_end_is_held_out(lessons: list[int], expected: list[bool]) -> None:
    assert held_out_tokens(torch.tensor(lessons)).tolist() == expected


def test_a_killed_refit_of_everything_comes_to_the_same(tmp_path: Path) -> None:
    small, material = small_and_material("gpt_oss", tmp_path)
    killed, again = (MoEModel(copy.deepcopy(small.language_model)) for _ in range(2))
    config = replace(CONFIG, train=["scales", "experts", "router"])
    expected = repaired_by_layers(small, material, config, tmp_path / "whole", lambda _: None, refit)

    class Killed(Exception):
        pass

    def kill(_: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        repaired_by_layers(killed, material, config, tmp_path / "state", kill, refit)
    got = repaired_by_layers(again, material, config, tmp_path / "state", lambda _: None, refit)
    assert [one.validation for one in got.checks] == [one.validation for one in expected.checks]
    pairs = zip(small.language_model.parameters(), again.language_model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("train", [["norms"], ["attention", "norms"]])
def test_a_refit_of_what_least_squares_cannot_refit_is_refused(train: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"recover\.train: got .*, expected one of experts, adapters, scales or router"
    ):
        RecoverConfig(train=train)
    assert RecoverConfig(methods=["logits"], train=train).train == train
