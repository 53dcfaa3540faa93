"""Adapters and scales of experts: what they compute, how few numbers they are, and what becomes of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import CONFIG, CPU, losses, small_model
from tiny_lessons import readings
from tiny_models import CONFIGS, logits, tiny_model, tokens

from moe_evo.errors import ConfigError
from moe_evo.models.experts.matrices import expert_matrices
from moe_evo.models.size.size import size_of
from moe_evo.models.view import MoEModel
from moe_evo.recovery.adapters import adapted
from moe_evo.recovery.lessons import Lessons, read_lessons, write_lessons
from moe_evo.recovery.material import Material
from moe_evo.recovery.methods import RECOVERY_METHODS
from moe_evo.recovery.parts import trained_parameters
from moe_evo.recovery.state import Learned, TrainingState
from moe_evo.recovery.training_size import trained_numbers, training_bytes

ADAPTERS = ["adapters", "scales"]
NAMES = ("gate_up_proj_lora_A", "gate_up_proj_lora_B", "down_proj_lora_A", "down_proj_lora_B", "output_scales")
LOGITS = RECOVERY_METHODS.get("logits")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder, full = tmp_path_factory.mktemp("lessons"), tiny_model("mixtral")
    return material_of(full, folder)


def material_of(full, folder: Path) -> Material:
    found: list[Lessons] = []
    for name, what in (("learned", readings(30)), ("validation", readings(12, seed=1))):
        write_lessons(folder, name, what, full, CPU, top_k=96, batch_tokens=100)
        found.append(read_lessons(folder, name))
    return Material(*found)


def learned_by_adapters(
    model: MoEModel, material: Material, file: Path, done=lambda _: None, **changes: object
) -> Learned:
    config = replace(CONFIG, train=ADAPTERS, rank=2, **changes)
    return LOGITS.recover(model, material, config, file, done)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_what_was_trained_is_what_the_weights_then_compute(model_type: str, dtype: torch.dtype) -> None:
    model = MoEModel(tiny_model(model_type).to(dtype))
    before = {name: one.clone() for name, one in model.language_model.state_dict().items()}
    expected = logits(model.language_model, tokens())
    generator = torch.Generator().manual_seed(0)
    with adapted(model, ADAPTERS, 3, 0):
        parameters = trained_parameters(model, ADAPTERS)
        assert torch.equal(logits(model.language_model, tokens()), expected)  # they begin as nothing
        assert all(one.dtype == torch.float32 for one in parameters.values())
        for one in parameters.values():
            one.data += 0.02 * torch.randn(one.shape, generator=generator)
        trained = logits(model.language_model, tokens())
        factors = {name: one.detach().clone() for name, one in parameters.items()}
    assert not torch.allclose(trained, expected, atol=0.05)
    assert torch.equal(logits(model.language_model, tokens()), trained)  # bit for bit, in bfloat16, too
    assert set(model.language_model.state_dict()) == set(before)
    names = {module: name for name, module in model.language_model.named_modules()}
    for layer in model.layers:
        own = {name: factors.pop(f"{names[layer.experts]}.{name}") for name in NAMES}
        stored = {name: before[f"{names[layer.experts]}.{name}"].float() for name in layer.expert_tensors()}
        for expert, scale in enumerate(own["output_scales"]):
            for matrix in ("gate_up_proj", "down_proj"):
                factor_a = own[f"{matrix}_lora_A"][expert]
                product = own[f"{matrix}_lora_B"][expert] @ factor_a * 5 * (factor_a.shape[1] / 3) ** 0.5
                stored[matrix][expert] += product.T if layer.experts.is_transposed else product
            stored["down_proj"][expert] *= scale
            if "down_proj_bias" in stored:
                stored["down_proj_bias"][expert] *= scale
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        for name, one in layer.expert_tensors().items():
            torch.testing.assert_close(one.detach().float(), stored[name], **close)
        for name, one in layer.router_tensors().items():
            assert torch.equal(one, before[f"{names[layer.router]}.{name}"])
    assert not factors


def test_an_error_within_leaves_the_model_as_it_was() -> None:
    model = small_model()
    before = copy.deepcopy(model.language_model.state_dict())
    with pytest.raises(ZeroDivisionError), adapted(model, ADAPTERS, 2, 0):
        for one in trained_parameters(model, ADAPTERS).values():
            one.data += 1.0
        raise ZeroDivisionError
    after = model.language_model.state_dict()
    assert set(after) == set(before) and all(torch.equal(one, before[name]) for name, one in after.items())
    with pytest.raises(ConfigError, match="of which this model has no parameters"):
        trained_parameters(model, ADAPTERS)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_adapters_of_every_family_learn_and_change_experts_alone(model_type: str, tmp_path: Path) -> None:
    full, small = tiny_model(model_type), MoEModel(tiny_model(model_type, seed=1))
    before = copy.deepcopy(small.language_model.state_dict())
    changes = {"steps": 6, "checks": 6, "batch_size": 30, "learning_rate": 1e-3}
    learned = learned_by_adapters(small, material_of(full, tmp_path), tmp_path / "state", **changes)
    assert learned.checks[-1].training < learned.checks[1].training and learned.best.step > 0
    changed = {name for name, one in small.language_model.state_dict().items() if not torch.equal(one, before[name])}
    assert changed and all(".experts." in name and "gate_up_proj_bias" not in name for name in changed)


def test_optimizer_states_are_of_the_few_numbers_alone(material: Material, tmp_path: Path) -> None:
    model = small_model(dtype=torch.bfloat16)
    learned_by_adapters(model, material, tmp_path / "state", learning_rate=1e-3)
    tensors = TrainingState.load(tmp_path / "state").tensors
    moments = sum(one.numel() for name, one in tensors.items() if name.startswith("exp_avg/"))
    # 3 layers of 4 experts of 32 x 24: two factors of rank 2 on each side of gate and up together, and of down
    assert moments == 3 * 4 * (2 * (32 + 48) + 2 * (24 + 32) + 1)
    assert moments < 0.15 * sum(one.numel() for layer in model.layers for one in layer.expert_tensors().values())
    assert {one.dtype for one in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("change", [{"batch_tokens": 25}, {"gradient_checkpointing": True}])
def test_the_size_of_a_pass_and_checkpointing_change_no_loss_of_adapters(
    change: dict, material: Material, tmp_path: Path
) -> None:
    expected = losses(learned_by_adapters(small_model(), material, tmp_path / "whole"))
    assert losses(learned_by_adapters(small_model(), material, tmp_path / "parts", **change)) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_killed_adapters_go_on_with_the_same_losses_and_weights(
    dtype: torch.dtype, material: Material, tmp_path: Path
) -> None:
    whole, killed, again = (small_model(dtype=dtype) for _ in range(3))
    before = copy.deepcopy(killed.language_model.state_dict())
    expected = learned_by_adapters(whole, material, tmp_path / "whole")
    assert expected.best.step > 0

    class Killed(Exception):
        pass

    def kill(learned: Learned) -> None:
        if learned.steps == 6:
            raise Killed

    with pytest.raises(Killed):
        learned_by_adapters(killed, material, tmp_path / "state", kill)
    assert all(torch.equal(one, before[name]) for name, one in killed.language_model.state_dict().items())
    got = learned_by_adapters(again, material, tmp_path / "state")
    assert losses(got) == losses(expected)
    pairs = zip(again.language_model.parameters(), whole.language_model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize("part", ["experts", "adapters", "scales", "router", "norms", "attention", "all"])
def test_the_numbers_that_a_plan_counts_are_those_that_are_trained(model_type: str, part: str) -> None:
    full, small = tiny_model(model_type), MoEModel(tiny_model(model_type))
    size = size_of(small.family, full.config, torch.float32, 1)
    with adapted(small, [part], 2, 0):
        expected = sum(one.numel() for one in trained_parameters(small, [part]).values())
    assert trained_numbers(size, small.shape.num_experts, [part], 2) == expected


def test_adapters_take_far_less_memory_than_whole_experts() -> None:
    size = size_of(small_model().family, tiny_model("mixtral", hidden_size=256, intermediate_size=512).config,
                   torch.bfloat16, 1)  # fmt: skip
    kept = [4] * 3
    whole, adapters, checkpointed = (
        training_bytes(size, kept, [part], 4, checkpointing=checkpointing)
        for part, checkpointing in (("experts", False), ("adapters", False), ("adapters", True))
    )
    experts = 3 * 4 * 3 * 256 * 512
    assert whole - training_bytes(size, kept, [], 4, checkpointing=False) == 18 * experts
    numbers = trained_numbers(size, kept, ["adapters"], 4)
    assert adapters - training_bytes(size, kept, [], 4, checkpointing=False) == 16 * numbers + 2 * experts
    assert adapters - checkpointed == 2 * experts * 2 // 3
    matrices = expert_matrices(small_model().layers[0].experts, small_model().layers[0].expert_tensors())
    assert numbers < 0.06 * experts and set(matrices) == {"gate", "up", "down"}
