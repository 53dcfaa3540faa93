"""Tests for every pool: each request gets one outcome, with the scores of an evaluator used directly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from moe_evo.criteria.answering import answer
from moe_evo.criteria.questions import Question, Routed, Weights
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.pool import Pool, Request
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.population import Evaluation, Outcome
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.tasks.data import SCORINGS

Key = tuple[int, str]
"""Number and split of a request."""


def requests_of(shape: ModelShape, number: int, *, seed: int = 0, split: str = "search") -> list[Request]:
    """Requests for `number` random prunings, which keep half of the experts."""
    space = SearchSpace.build(shape, num_kept=[experts // 2 for experts in shape.num_experts])
    genomes = [random_pruning(space, np.random.default_rng([seed, n])) for n in range(number)]
    return [Request("search", n, genome, split) for n, genome in enumerate(genomes)]


def completed(pool: Pool, wanted: Sequence[Request]) -> dict[Key, Outcome]:
    """Evaluate all requests on a pool, and check that each gets exactly one outcome."""
    outcomes: dict[Key, Outcome] = {}
    todo = list(wanted)
    while len(outcomes) < len(wanted):
        slots = pool.free_slots
        pool.submit(todo[:slots])
        del todo[:slots]
        for request, outcome in pool.next_outcomes():
            key = (request.number, request.split)
            assert key not in outcomes, f"{key} was answered twice"
            outcomes[key] = outcome
    assert outcomes.keys() == {(one.number, one.split) for one in wanted}
    return outcomes


def numbers(outcome: Outcome) -> tuple[object, ...]:
    """The content of an outcome except its duration, as float32."""
    assert isinstance(outcome, Evaluation)
    metrics = tuple((name, np.float32(value)) for name, value in sorted(outcome.metrics.items()))
    scores = (outcome.fitness, outcome.tie_break, outcome.standard_error)
    return (*map(np.float32, scores), outcome.num_examples, metrics)


class PoolContract:
    """Tests for a pool. Override both fixtures: the pool, and an evaluator of the same model and tasks.

    >>> from moe_evo.evaluation.local_pool import LocalPool
    >>> from moe_evo.testing.methods import evaluator_of
    >>> class TestMyPool(PoolContract):
    ...     @pytest.fixture
    ...     def evaluator(self):
    ...         return evaluator_of("mixtral")
    ...
    ...     @pytest.fixture
    ...     def pool(self, evaluator):
    ...         return LocalPool(evaluator)
    """

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        raise NotImplementedError("override the fixture `evaluator`")

    @pytest.fixture
    def pool(self) -> Pool:
        raise NotImplementedError("override the fixture `pool`")

    def test_the_shape_is_that_of_the_model(self, pool: Pool, evaluator: Evaluator) -> None:
        assert pool.shape == evaluator.model.shape

    def test_there_are_free_slots_at_the_start_and_none_when_they_are_taken(self, pool: Pool) -> None:
        slots = pool.free_slots
        assert slots > 0
        pool.submit(requests_of(pool.shape, slots, seed=1))
        assert pool.free_slots == 0
        done = 0
        while done < slots:
            done += len(pool.next_outcomes())
        assert done == slots
        assert pool.free_slots > 0

    @pytest.mark.parametrize("split", SCORINGS)
    def test_every_request_is_answered_once_with_the_scores_of_its_genome(
        self, pool: Pool, evaluator: Evaluator, split: str
    ) -> None:
        wanted = requests_of(pool.shape, 12, seed=SCORINGS.index(split) + 10, split=split)
        outcomes = completed(pool, wanted)
        expected = evaluator.evaluate([one.genome for one in wanted], split)
        assert {key: numbers(one) for key, one in outcomes.items()} == {
            (request.number, split): numbers(one) for request, one in zip(wanted, expected, strict=True)
        }

    def test_equal_genomes_under_two_numbers_are_both_answered(self, pool: Pool) -> None:
        (one,) = requests_of(pool.shape, 1, seed=20)
        outcomes = completed(pool, [Request("search", n, one.genome, "search") for n in range(3)])
        assert len({numbers(one) for one in outcomes.values()}) == 1

    def test_answers_about_experts_are_those_of_the_evaluator(self, pool: Pool, evaluator: Evaluator) -> None:
        questions: list[Question] = [*(Routed(task.name) for task in evaluator.tasks), Weights()]
        answers = {question.key: answer for question, answer in pool.ask(questions)}
        assert answers.keys() == {question.key for question in questions}
        for question in questions:
            for found, expected in zip(answers[question.key].layers, answer(question, evaluator).layers, strict=True):
                for name in expected.names():
                    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)

    def test_what_was_answered_to_examples_is_what_the_evaluator_answers(
        self, pool: Pool, evaluator: Evaluator
    ) -> None:
        (request,) = requests_of(pool.shape, 1, seed=30)
        for genome, first in ((request.genome, None), (request.genome, 2), (None, 3)):
            found, expected = (of.answered(genome, "validation", first) for of in (pool, evaluator))
            assert [(one.task, one.number, one.example) for one in found] == [
                (one.task, one.number, one.example) for one in expected
            ]
            for one, wanted in zip(found, expected, strict=True):
                assert one.score == pytest.approx(wanted.score, abs=1e-4)
                assert (one.given is None) == (wanted.given is None)
                if one.given is not None and wanted.given is not None:
                    np.testing.assert_allclose(one.given.log_likelihoods, wanted.given.log_likelihoods, atol=1e-4)
            numbers_of = {task.name: task.numbers("validation")[:first] for task in evaluator.tasks}
            assert {name: [one.number for one in found if one.task == name] for name in numbers_of} == numbers_of
