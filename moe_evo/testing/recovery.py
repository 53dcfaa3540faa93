"""Tests for every recovery method, on a tiny pruned model and what the full one has to teach."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_evo.config.recover import RecoverConfig
from moe_evo.genomes.genome import Genome
from moe_evo.models.tiny import tiny_model
from moe_evo.models.view import MoEModel
from moe_evo.recovery.blocks import BlockTargets, write_blocks
from moe_evo.recovery.lessons import Reading, read_lessons, write_lessons
from moe_evo.recovery.material import Material
from moe_evo.recovery.methods import RECOVERY_METHODS, RecoveryMethod
from moe_evo.recovery.state import Learned
from moe_evo.testing.stock_models import random_kept, stock_model

CONFIG = RecoverConfig(steps=30, batch_size=8, checks=5, learning_rate=3e-3, batch_tokens=200)


def random_readings(number: int, *, seed: int) -> list[Reading]:
    """Of a vocabulary of 96 tokens, the second half of each with right answers."""
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(2, 12, size=number).tolist():
        tokens = tuple(rng.integers(3, 96, size=length).tolist())
        found.append(Reading(tokens, length // 2, tuple(rng.integers(3, 96, size=length - length // 2).tolist())))
    return found


class RecoveryContract:
    """Tests for a method of `moe-evo recover`.

    name: as in --recover.methods. config: how it learns.

    >>> class TestMyMethod(RecoveryContract):
    ...     name = "closed_form"
    """

    name = ""
    config = CONFIG

    @pytest.fixture
    def method(self) -> RecoveryMethod:
        return RECOVERY_METHODS.get(self.name)

    @pytest.fixture(params=["mixtral", "deepseek_v3"])
    def taught(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[MoEModel, Material]:
        """A pruned model, and what the full one has to teach."""
        full, folder = MoEModel(tiny_model(request.param)), tmp_path / "material"
        for name, seed in (("learned", 0), ("validation", 1)):
            readings = random_readings(40, seed=seed)
            write_lessons(folder, name, readings, full.language_model, full.device, top_k=20, batch_tokens=100)
        lessons = read_lessons(folder, "learned")
        write_blocks(folder, lessons, full, most_tokens=10_000, batch_tokens=100)
        kept = random_kept(full.shape, 4, seed=3)
        genome = Genome.from_kept(kept, full.shape.num_experts, full.shape.top_k)
        small = MoEModel(stock_model(full.language_model, genome, full.shape))
        return small, Material(lessons, read_lessons(folder, "validation"), BlockTargets.load(folder))

    def test_it_is_found_by_its_name_with_a_line_and_a_source(self, method: RecoveryMethod) -> None:
        assert method.description and "\n" not in method.description
        assert method.source and method.unit

    def test_it_tells_its_steps_and_keeps_the_weights_with_the_lowest_loss(
        self, method: RecoveryMethod, taught: tuple[MoEModel, Material], tmp_path: Path
    ) -> None:
        model, material = taught
        before = copy.deepcopy(model.language_model.state_dict())
        told: list[Learned] = []
        learned = method.recover(model, material, self.config, tmp_path / "state", told.append)
        most = method.num_steps(self.config, len(model.layers))
        assert [one.steps for one in told] == list(range(1, learned.steps + 1)) and learned.steps <= most
        assert learned.steps == most or learned.stopped
        assert learned.checks[0].step == 0 and learned.best.validation <= learned.checks[0].validation
        changed = [
            name for name, one in model.language_model.state_dict().items() if not torch.equal(one, before[name])
        ]
        assert bool(changed) == (learned.best.step > 0)
        assert not any(one.requires_grad for one in model.language_model.parameters())
        assert not model.language_model.training

    def test_called_again_with_its_finished_state_it_makes_no_step(
        self, method: RecoveryMethod, taught: tuple[MoEModel, Material], tmp_path: Path
    ) -> None:
        model, material = taught
        other = MoEModel(copy.deepcopy(model.language_model))
        first = method.recover(model, material, self.config, tmp_path / "state", lambda _: None)
        steps: list[Learned] = []
        second = method.recover(other, material, self.config, tmp_path / "state", steps.append)
        assert second == first and not steps
        pairs = zip(model.language_model.parameters(), other.language_model.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)

    def test_from_where_it_was_killed_it_comes_to_the_same(
        self, method: RecoveryMethod, taught: tuple[MoEModel, Material], tmp_path: Path
    ) -> None:
        model, material = taught
        killed, again = (MoEModel(copy.deepcopy(model.language_model)) for _ in range(2))
        expected = method.recover(model, material, self.config, tmp_path / "whole", lambda _: None)

        class Killed(Exception):
            pass

        def kill(learned: Learned) -> None:
            if learned.steps == 2:
                raise Killed

        with pytest.raises(Killed):
            method.recover(killed, material, self.config, tmp_path / "state", kill)
        got = method.recover(again, material, self.config, tmp_path / "state", lambda _: None)
        assert [one.validation for one in got.checks] == [one.validation for one in expected.checks]
        pairs = zip(model.language_model.parameters(), again.language_model.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
