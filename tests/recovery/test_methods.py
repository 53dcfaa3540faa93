"""Every recovery method passes the contract suite; those of other packages are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from moe_evo.errors import ConfigError
from moe_evo.models.view import MoEModel
from moe_evo.recovery.lessons import read_lessons, write_lessons
from moe_evo.recovery.material import Material
from moe_evo.recovery.methods import RECOVERY_METHODS, Distillation
from moe_evo.testing.recovery import CONFIG, RecoveryContract, random_readings


class TestLogits(RecoveryContract):
    name = "logits"


class TestRouter(RecoveryContract):
    name = "router"


class TestLabels(RecoveryContract):
    name = "labels"


class TestLayerwise(RecoveryContract):
    name = "layerwise"


class TestClosedForm(RecoveryContract):
    name = "closed_form"


class TestAdapters(RecoveryContract):
    name = "logits"
    config = replace(CONFIG, train=["adapters", "scales", "router"], rank=2, learning_rate=1e-3)


class TestClosedFormOfAllParts(RecoveryContract):
    name = "closed_form"
    config = replace(CONFIG, train=["scales", "experts", "router"])


NORMS = Distillation("norms alone", "an example", ("norms",))


class TestAnotherPackage(RecoveryContract):
    name = f"{__name__}:NORMS"


def test_a_thing_that_is_no_method_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"is no recovery method: .* has no description, .*expected a .*RecoveryMethod"
    ):
        RECOVERY_METHODS.get(f"{__name__}:pytest", "recover.methods")


def test_the_router_method_trains_nothing_else_whatever_the_config_says(tmp_path: Path) -> None:
    method, model = RECOVERY_METHODS.get("router"), MoEModel(tiny_model("mixtral"))
    write_lessons(tmp_path, "one", random_readings(8, seed=0), tiny_model("mixtral", seed=1), model.device, top_k=8,
                  batch_tokens=100)  # fmt: skip
    lessons = read_lessons(tmp_path, "one")
    before = {name: one.clone() for name, one in model.language_model.state_dict().items()}
    config = replace(CONFIG, train=["experts"], steps=3)
    method.recover(model, Material(lessons, lessons), config, tmp_path / "state", lambda _: None)
    changed = {name for name, one in model.language_model.state_dict().items() if not torch.equal(one, before[name])}
    assert changed and all(name.endswith(".gate.weight") for name in changed)
