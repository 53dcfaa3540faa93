"""Tests for every one-shot method, which is either a criterion (it prunes) or a merge."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.criteria.merges import Merge
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.questions import RouterLogits
from moe_evo.criteria.registry import METHODS, Criterion, Method, check_methods
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.tiny import tiny_model
from moe_evo.models.view import MoEModel
from moe_evo.testing import tiny_tasks as tiny
from moe_evo.testing.tasks import PROMPTS

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss")
"""Families with different routers: softmax; sigmoid with expert groups; softmax after top-k, with biases."""


@cache
def evaluator_of(family: str) -> Evaluator:
    """A tiny random model of a family and a task of eleven prompts, made once."""
    moe = MoEModel(tiny_model(family, vocab_size=350), tiny.tiny_tokenizer(bos=True))
    rows = [{"prompt": prompt, "choices": [" yes", " no no"], "label": 0} for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        task = tiny.make_task(Path(folder) / "task", rows, moe.tokenizer, batch_tokens=128)
    return Evaluator(moe, [task], EvaluationConfig())


def observer_of(evaluator: Evaluator) -> Observer:
    return Observer(LocalPool(evaluator).ask, {task.name: task.name for task in evaluator.tasks}, "model")


class MethodContract:
    """Tests for criteria and merges.

    name: as in `moe-evo prune --method`.

    >>> class TestMyMethod(MethodContract):
    ...     name = "naee"
    """

    name = ""

    @pytest.fixture
    def method_name(self) -> str:
        return self.name

    @pytest.fixture
    def method(self, method_name: str) -> Method:
        return METHODS.get(method_name)

    @pytest.fixture(params=FAMILIES)
    def evaluator(self, request: pytest.FixtureRequest) -> Evaluator:
        return evaluator_of(request.param)

    @pytest.fixture
    def space(self, evaluator: Evaluator) -> SearchSpace:
        return SearchSpace.build(evaluator.model.shape, num_kept=4)

    def test_it_is_found_by_its_name_with_a_line_and_a_source(self, method_name: str, method: Method) -> None:
        check_methods("--method", [method_name])
        assert method.name and method.title and method.source
        assert method.description and "\n" not in method.description

    def test_its_genome_is_in_the_space_and_always_the_same(
        self, method: Method, evaluator: Evaluator, space: SearchSpace
    ) -> None:
        genome = method.genome(observer_of(evaluator), space)
        space.check(genome)
        assert genome.num_kept == (4,) * evaluator.model.shape.num_layers
        assert method.genome(observer_of(evaluator), space).digest == genome.digest

    def test_where_all_experts_are_kept_the_model_is_left_as_it_is(self, method: Method, evaluator: Evaluator) -> None:
        everything = SearchSpace.build(evaluator.model.shape, num_kept=8)
        assert method.genome(observer_of(evaluator), everything) == evaluator.model.shape.identity()


class CriterionContract(MethodContract):
    """Tests for a criterion, which scores every expert and keeps those with the highest scores.

    >>> class TestMyCriterion(CriterionContract):
    ...     name = "reap"
    """

    def test_it_prunes(self, method: Method, evaluator: Evaluator, space: SearchSpace) -> None:
        assert method.genome(observer_of(evaluator), space).is_pruning

    def test_it_scores_every_expert_of_every_layer(self, method: Method, evaluator: Evaluator) -> None:
        assert isinstance(method, Criterion)
        scores = method.scores(observer_of(evaluator))
        assert tuple(layer.shape for layer in scores) == tuple(
            (number,) for number in evaluator.model.shape.num_experts
        )
        assert all(np.isfinite(layer).all() for layer in scores)


class MergeContract(MethodContract):
    """Tests for a merge, which puts every expert into at most one group; the weights of a group have the sum 1.

    >>> class TestMyMerge(MergeContract):
    ...     name = "m_smoe"
    """

    def test_each_kept_expert_is_a_mean_of_a_group_of_its_own(
        self, method: Method, evaluator: Evaluator, space: SearchSpace
    ) -> None:
        for layer in method.genome(observer_of(evaluator), space).layers:
            np.testing.assert_allclose(layer.expert_merging.sum(axis=1), 1, rtol=1e-6)
            assert (layer.expert_merging >= 0).all() and not layer.is_pruning
            used = sorted(expert for members in layer.members for expert in members)
            assert len(set(used)) == len(used), "an expert is in two groups"

    def test_later_layers_can_be_merged_behind_merged_ones(
        self, method: Method, evaluator: Evaluator, space: SearchSpace
    ) -> None:
        assert isinstance(method, Merge)
        observer = observer_of(evaluator)
        genome, behind = method.genome(observer, space), method.progressive_genome(observer, space)
        space.check(behind)
        assert behind.layers[0] == genome.layers[0]
        # the second layer is observed behind the first layer's merge
        before = Genome((behind.layers[0], *evaluator.model.shape.identity().layers[1:]))
        moved = observer.about(RouterLogits(genome=before, layer=1)).layers[0]
        still = observer.about(RouterLogits()).layers[1]
        assert moved.tokens == still.tokens and not np.allclose(moved.products, still.products)
