"""Every recovery method passes the contract suite; those of other packages are found."""

from __future__ import annotations

import pytest

from moe_evo.errors import ConfigError
from moe_evo.recovery.methods import RECOVERY_METHODS, Distillation
from moe_evo.testing.recovery import RecoveryContract


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


NORMS = Distillation("norms alone", "an example", ("norms",))


class TestAnotherPackage(RecoveryContract):
    name = f"{__name__}:NORMS"


def test_a_thing_that_is_no_method_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"is no recovery method: .* has no description, .*expected a .*RecoveryMethod"
    ):
        RECOVERY_METHODS.get(f"{__name__}:pytest", "recover.methods")
