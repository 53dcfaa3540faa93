"""Populations: ranked by fitness, then tie-break, then age; failures never join."""

import pickle

import numpy as np
import pytest

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual, Population

PRUNING = Genome.from_kept([[0, 1]], 4, 1)
MERGED = Genome((LayerGenome(np.ones((2, 4)), np.ones((2, 4)), 1),))


def _individual(number: int, fitness: float, tie_break: float = 0.0, genome: Genome = PRUNING) -> Individual:
    return Individual(Candidate(number, genome, "random_pruning"), Evaluation(fitness, tie_break))


def test_failures_never_join_a_population():
    failed = Individual(Candidate(0, PRUNING, "random_pruning"), EvaluationFailure("out_of_memory", "..."))
    population = Population().with_outcomes([failed, _individual(1, 0.5)])
    assert [one.number for one in population] == [1]
    with pytest.raises(AssertionError, match="candidate 0 failed"):
        failed.evaluation  # noqa: B018


def test_rank_goes_by_fitness_then_tie_break_then_the_earlier_candidate():
    told = [_individual(3, 0.5, -1), _individual(0, 0.4), _individual(2, 0.5, -2), _individual(1, 0.5, -1)]
    population = Population().with_outcomes(told)
    assert [one.number for one in population.ranked] == [1, 3, 2, 0]
    assert population.best.number == 1


def test_rank_does_not_depend_on_the_order_of_completion():
    told = [_individual(number, number % 3 / 10) for number in range(9)]
    forward, backward = Population(tuple(told)), Population(tuple(reversed(told)))
    assert forward.ranked == backward.ranked
    assert [one.number for one in forward] == list(range(9))


def test_adding_outcomes_makes_a_new_population():
    population = Population((_individual(0, 0.1),))
    larger = population.with_outcomes([_individual(1, 0.2)])
    assert len(population) == 1 and len(larger) == 2
    np.testing.assert_array_equal(larger.fitness, [0.1, 0.2])
    assert larger[1].number == 1


def test_prunings_are_the_part_that_only_prunes():
    population = Population((_individual(0, 0.1), _individual(1, 0.9, genome=MERGED)))
    assert [one.number for one in population.prunings] == [0]


def test_a_fitness_that_is_not_finite_cannot_be_an_evaluation():
    with pytest.raises(AssertionError, match="EvaluationFailure"):
        Evaluation(float("nan"))


def test_metrics_cannot_be_changed_and_survive_pickling():
    metrics = {"task/accuracy": 0.5}
    evaluation = Evaluation(0.5, -1.0, 0.1, 20, 3.0, metrics)
    metrics["task/accuracy"] = 1.0
    assert evaluation.metrics["task/accuracy"] == 0.5
    with pytest.raises(TypeError):
        evaluation.metrics["task/accuracy"] = 1.0
    assert pickle.loads(pickle.dumps(evaluation)) == evaluation


def test_a_ranking_that_grows_equals_one_that_is_sorted_anew() -> None:
    rng = np.random.default_rng(0)
    outcomes = [Evaluation(float(fitness), float(tie)) for fitness, tie in rng.integers(0, 4, (60, 2))]
    individuals = [Individual(Candidate(n, PRUNING, "test"), one) for n, one in enumerate(outcomes)]
    grown = Population()
    for start in range(0, 60, 3):
        assert len(grown.ranked) == start
        grown = grown.with_outcomes(individuals[start : start + 3])
    assert grown.ranked == Population().with_outcomes(individuals).ranked
