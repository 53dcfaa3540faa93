"""Layers fitted to those of the full model: the least-squares solution against NumPy, every family, killed and not."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lessons import readings
from tiny_models import CONFIGS, random_kept, stock_model, tiny_model

from moe_evo.config.recover import RecoverConfig
from moe_evo.errors import ModelError, OutOfMemory
from moe_evo.genomes.genome import Genome
from moe_evo.models.experts.matrices import expert_matrices
from moe_evo.models.view import MoEModel
from moe_evo.recovery import blocks as blocks_module
from moe_evo.recovery import least_squares
from moe_evo.recovery import training as training_module
from moe_evo.recovery.blocks import BlockTargets, block_inputs, has_blocks, write_blocks
from moe_evo.recovery.closed_form import refit
from moe_evo.recovery.layer_repair import repaired_by_layers, train_layer
from moe_evo.recovery.least_squares import refit_down
from moe_evo.recovery.lessons import read_lessons, write_lessons
from moe_evo.recovery.material import Material
from moe_evo.recovery.pass_memory import PassMemory
from moe_evo.recovery.state import TrainingState

CPU = torch.device("cpu")
CONFIG = RecoverConfig(steps=60, batch_tokens=10_000, learning_rate=3e-3, block_tokens=10_000)


def memory(batch_tokens: int = 100) -> PassMemory:
    return PassMemory(batch_tokens, CPU, "")


def small_and_material(
    model_type: str,
    folder: Path,
    *,
    batch_tokens: int = 100,
    full: MoEModel | None = None,
    number: int = 60,
    seed: int = 0,
) -> tuple[MoEModel, Material]:
    """A pruned model, and what the full one has to teach by so many sequences."""
    full = MoEModel(tiny_model(model_type)) if full is None else full
    for name, what in (("learned", readings(number, seed=seed)), ("validation", readings(60, seed=1))):
        write_lessons(folder, name, what, full.language_model, CPU, top_k=96, batch_tokens=batch_tokens)
    lessons = read_lessons(folder, "learned")
    write_blocks(folder, lessons, full, most_tokens=10_000, batch_tokens=batch_tokens)
    kept = random_kept(full.shape, 4, seed=3)
    genome = Genome.from_kept(kept, full.shape.num_experts, full.shape.top_k)
    small = MoEModel(stock_model(full.language_model, genome, full.shape))
    return small, Material(lessons, read_lessons(folder, "validation"), BlockTargets.load(folder))


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_blocks_are_what_hooks_on_the_experts_see_of_each_sequence_alone(model_type: str, tmp_path: Path) -> None:
    full = MoEModel(tiny_model(model_type))
    _, material = small_and_material(model_type, tmp_path, full=full)
    blocks = material.blocks
    assert blocks is not None and blocks.numbers == tuple(range(60)) and blocks.shards > 3
    for layer in full.layers:
        seen: list[torch.Tensor] = []
        handle = layer.experts.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        with torch.inference_mode():
            for row in material.lessons.rows(blocks.numbers):
                full.language_model(input_ids=row[None].long())
        handle.remove()
        expected = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen])
        torch.testing.assert_close(blocks.of(layer.number), expected, rtol=1e-4, atol=1e-5)


def test_the_size_of_a_batch_changes_neither_order_nor_values(tmp_path: Path) -> None:
    small, one = small_and_material("mixtral", tmp_path / "a", batch_tokens=30)
    _, two = small_and_material("mixtral", tmp_path / "b", batch_tokens=1000)
    assert one.blocks is not None and two.blocks is not None and one.blocks.shards > two.blocks.shards
    for layer in range(3):
        torch.testing.assert_close(one.blocks.of(layer), two.blocks.of(layer), rtol=1e-4, atol=1e-5)
        parts = [block_inputs(small, one.lessons, one.blocks.numbers, layer, size) for size in (30, 1000)]
        torch.testing.assert_close(parts[0].hidden, parts[1].hidden, rtol=1e-4, atol=1e-5)
        assert torch.equal(parts[0].index, parts[1].index)
        assert len(parts[0].hidden) == len(one.blocks.of(layer)) == len(one.lessons.tokens)


def test_few_tokens_are_those_of_some_lessons_drawn_at_random(tmp_path: Path) -> None:
    small_and_material("mixtral", tmp_path)
    lessons, full = read_lessons(tmp_path, "learned"), MoEModel(tiny_model("mixtral"))
    write_blocks(tmp_path, lessons, full, most_tokens=50, batch_tokens=100)
    blocks = BlockTargets.load(tmp_path)
    tokens = sum(int(lessons.lengths[number]) for number in blocks.numbers)
    assert 38 < tokens <= 50 and len(blocks.of(0)) == tokens
    assert blocks.numbers != tuple(range(len(blocks.numbers)))  # lessons are sorted by length
    write_blocks(tmp_path, lessons, full, most_tokens=1, batch_tokens=100)
    assert len(BlockTargets.load(tmp_path).numbers) == 1 and has_blocks(tmp_path)


def numpy_solution(layer, inputs, targets: torch.Tensor, ridge_share: float) -> np.ndarray:
    """(E, H, I): the joint ridge problem of all experts, solved at once."""
    experts = layer.experts
    matrices = {name: one.detach().numpy().astype(float) for name, one in
                expert_matrices(experts, layer.expert_tensors()).items()}  # fmt: skip
    num_experts, hidden_size, inner_size = matrices["down"].shape
    tokens, size = len(inputs.hidden), num_experts * inner_size
    features, wanted = np.zeros((tokens, size)), targets.numpy().astype(float).copy()
    for token in range(tokens):
        for expert, gate in zip(inputs.index[token].tolist(), inputs.gates[token].tolist(), strict=True):
            x = torch.from_numpy(inputs.hidden[token].numpy())
            gate_up = experts.gate_up_proj[expert]
            product = x @ (gate_up if experts.is_transposed else gate_up.T)
            if experts.has_bias:
                product = product + experts.gate_up_proj_bias[expert]
                wanted[token] -= gate * experts.down_proj_bias[expert].detach().numpy()
            inner = experts._apply_gate(product.detach()).numpy()
            features[token, expert * inner_size : (expert + 1) * inner_size] = gate * inner
    penalty = np.zeros(size)
    for expert in range(num_experts):
        part = slice(expert * inner_size, (expert + 1) * inner_size)
        penalty[part] = max(ridge_share * (features[:, part] ** 2).sum() / inner_size, 1e-12)
    before = matrices["down"].transpose(0, 2, 1).reshape(size, hidden_size)
    right = features.T @ wanted + penalty[:, None] * before
    solved = np.linalg.solve(features.T @ features + np.diag(penalty), right)
    return solved.reshape(num_experts, inner_size, hidden_size).transpose(0, 2, 1)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_down_matrices_solve_the_joint_least_squares_problem(model_type: str, tmp_path: Path) -> None:
    small, material = small_and_material(model_type, tmp_path)
    assert material.blocks is not None
    layer = small.layers[0]
    inputs = block_inputs(small, material.lessons, material.blocks.numbers, 0, 100)
    targets = material.blocks.of(0)
    expected = numpy_solution(layer, inputs, targets, 0.3)  # at which ten sweeps have converged
    before = copy.deepcopy(small.language_model.state_dict())
    refit_down(layer, inputs, targets, 0.3, memory())
    got = expert_matrices(layer.experts, layer.expert_tensors())["down"].detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-3)
    changed = {name for name, one in small.language_model.state_dict().items() if not torch.equal(one, before[name])}
    assert len(changed) == 1 and changed.pop().endswith("experts.down_proj")


def test_an_expert_that_no_token_reaches_keeps_its_weights(tmp_path: Path) -> None:
    small, material = small_and_material("mixtral", tmp_path)
    assert material.blocks is not None
    layer = small.layers[0]
    inputs = block_inputs(small, material.lessons, material.blocks.numbers, 0, 100)
    away = torch.where(inputs.index == 2, 1, inputs.index)
    before = layer.expert_tensors()["down_proj"].detach().clone()
    refit_down(layer, replace(inputs, index=away), material.blocks.of(0), CONFIG.ridge, memory())
    after = layer.expert_tensors()["down_proj"].detach()
    assert torch.equal(after[2], before[2]) and not torch.equal(after[0], before[0])


def test_inputs_without_a_solution_are_told(tmp_path: Path) -> None:
    small, material = small_and_material("mixtral", tmp_path)
    assert material.blocks is not None
    inputs = block_inputs(small, material.lessons, material.blocks.numbers, 0, 100)
    broken = replace(inputs, hidden=torch.full_like(inputs.hidden, torch.nan))
    with pytest.raises(
        ModelError, match=r"expert 0: .* has no least-squares solution; raise recover\.ridge \(now 0\.001\)"
    ):
        refit_down(small.layers[0], broken, material.blocks.of(0), CONFIG.ridge, memory())


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize("repair", [refit, train_layer])
def test_layers_of_every_family_come_nearer_to_the_full_model(repair, model_type: str, tmp_path: Path) -> None:
    small, material = small_and_material(model_type, tmp_path)
    assert material.blocks is not None
    number = len(small.layers) - 1

    def error() -> float:
        inputs = block_inputs(small, material.lessons, material.blocks.numbers, number, 100)
        layer = small.layers[number]
        with torch.no_grad():
            _, gates, index = layer.router(inputs.hidden)
            outputs = layer.experts(inputs.hidden, index, gates)
        return float((outputs - material.blocks.of(number)).square().mean())

    before, others = error(), copy.deepcopy(small.language_model.state_dict())
    learned = repaired_by_layers(small, material, CONFIG, tmp_path / "state", lambda _: None, repair)
    assert learned.steps == len(small.layers) and [check.step for check in learned.checks] == list(
        range(len(small.layers) + 1)
    )
    left = error()
    assert left == before if learned.best.step == 0 else left < before or learned.best.step <= number
    # a random model's answers may be no better for it, and then it is left as it was
    assert learned.best.step == 0 or learned.best.validation < learned.checks[0].validation
    allowed = (".experts.", ".gate.", ".router.")
    for name, tensor in small.language_model.state_dict().items():
        assert any(part in name for part in allowed) or torch.equal(tensor, others[name]), name


def test_a_killed_repair_goes_on_behind_the_last_layer_that_was_done(tmp_path: Path) -> None:
    whole, material = small_and_material("mixtral", tmp_path)
    killed = MoEModel(copy.deepcopy(whole.language_model))
    again = MoEModel(copy.deepcopy(whole.language_model))
    expected = repaired_by_layers(whole, material, CONFIG, tmp_path / "whole", lambda _: None, refit)

    class Killed(Exception):
        pass

    def dying(layer, *rest):
        if layer.number == 2:
            raise Killed
        refit(layer, *rest)

    with pytest.raises(Killed):
        repaired_by_layers(killed, material, CONFIG, tmp_path / "state", lambda _: None, dying)
    assert TrainingState.load(tmp_path / "state").learned.steps == 2
    got = repaired_by_layers(again, material, CONFIG, tmp_path / "state", lambda _: None, refit)
    assert [one.validation for one in got.checks] == [one.validation for one in expected.checks]
    for one, two in zip(again.language_model.parameters(), whole.language_model.parameters(), strict=True):
        assert torch.equal(one, two)


def fill_device(monkeypatch: pytest.MonkeyPatch, most_tokens: int, repair) -> None:
    """Let a device seem full, as there is no GPU here to fill: no pass of the model or of a layer may be larger."""
    logits_of, intermediate = blocks_module.logits_of, least_squares.intermediate

    def check(number: int) -> None:
        if number > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def limited(model, rows, device):
        check(len(rows) * max(map(len, rows)))
        return logits_of(model, rows, device)

    def limited_expert(experts, number, hidden):
        check(len(hidden))
        return intermediate(experts, number, hidden)

    def limited_layer(_module, inputs):
        if torch.is_grad_enabled() and repair is train_layer:
            check(len(inputs[0]))

    for module in (blocks_module, training_module):
        monkeypatch.setattr(module, "logits_of", limited)
    monkeypatch.setattr(least_squares, "intermediate", limited_expert)
    monkeypatch.setattr(torch.nn.modules.module, "_global_forward_pre_hooks", {0: limited_layer})


@pytest.mark.parametrize("repair", [refit, train_layer])
def test_a_full_memory_halves_the_pass_and_repairs_the_layer_anew(
    repair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, material = small_and_material("mixtral", tmp_path)
    halved, again = (MoEModel(copy.deepcopy(whole.language_model)) for _ in range(2))
    config = replace(CONFIG, steps=8, train=["scales", "experts", "router"])
    expected = repaired_by_layers(whole, material, config, tmp_path / "one", lambda _: None, repair)
    fill_device(monkeypatch, 20, repair)
    got = repaired_by_layers(halved, material, config, tmp_path / "two", lambda _: None, repair)
    found = [check.validation for check in got.checks]
    assert found == pytest.approx([check.validation for check in expected.checks], rel=2e-2)
    assert got.tokens == expected.tokens and TrainingState.load(tmp_path / "two").batch_tokens <= 20
    finished = repaired_by_layers(again, material, config, tmp_path / "two", lambda _: None, repair)
    assert finished == got
    for one, two in zip(again.language_model.parameters(), halved.language_model.parameters(), strict=True):
        assert torch.equal(one, two) and one.grad is None and not one.requires_grad


def test_a_sequence_that_does_not_fit_while_layers_are_repaired_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, material = small_and_material("mixtral", tmp_path)
    fill_device(monkeypatch, 1, refit)
    with pytest.raises(OutOfMemory, match=r"one sequence in a pass: .* or lower recover\.block_tokens"):
        repaired_by_layers(small, material, CONFIG, tmp_path / "state", lambda _: None, refit)
