"""What every one-shot method promises, over all of this package."""

from __future__ import annotations

import pytest

from moe_evo.criteria.merges import MERGES
from moe_evo.criteria.registry import CRITERIA, METHODS
from moe_evo.testing.methods import CriterionContract, MergeContract, MethodContract

ALONE = sorted(name for name, criterion in CRITERIA.items() if not criterion.needs_base_model)


class TestCriteria(CriterionContract):
    @pytest.fixture(params=ALONE)
    def method_name(self, request: pytest.FixtureRequest) -> str:
        return request.param


class TestMerges(MergeContract):
    @pytest.fixture(params=sorted(MERGES))
    def method_name(self, request: pytest.FixtureRequest) -> str:
        return request.param


class TestNaee(MethodContract):
    name = "naee"


def test_every_method_is_named_as_it_is_registered() -> None:
    for name, method in METHODS.items():
        assert method.name == name
