"""What moe_evo expects of what this package brings; run with `pytest experiments/plugin/tests`."""

from __future__ import annotations

from moe_evo.testing.methods import CriterionContract
from moe_evo.testing.searches import SearchContract
from moe_evo.testing.tasks import MetricContract


class TestClimber(SearchContract):
    name = "climber"


class TestMeanGate(CriterionContract):
    name = "mean_gate"


class TestStartsWith(MetricContract):
    name = "starts_with"
    cases = (("Yes, they are.", ["yes"], 1.0), ("no", ["yes"], 0.0), ("well, yes", ["yes"], 0.0))
