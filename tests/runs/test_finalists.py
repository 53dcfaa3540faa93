"""The finalists of a search, and what their validation scores say of new examples."""

from __future__ import annotations

import numpy as np
import pytest

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.population import Candidate, Evaluation, Individual, Population
from moe_evo.runs.finalists import _noise, are_apart, better_half, finalists, judge, put_together
from moe_evo.runs.halving import cost, num_parts, part_size
from moe_evo.searches.scored import expected_scores
from moe_evo.testing.searches import space_of

SPACE = space_of([8] * 3, 4)


def pruning(*kept: tuple[int, ...]) -> Genome:
    return Genome(tuple(LayerGenome.from_kept(layer, 8, 2) for layer in kept))


BASE = pruning((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))
ONE_SWAP = pruning((0, 1, 2, 4), (0, 1, 2, 3), (0, 1, 2, 3))
TWO_SWAPS = pruning((0, 1, 2, 4), (0, 1, 2, 3), (0, 1, 2, 7))


def merged(genome: Genome, by: float) -> Genome:
    first = genome.layers[0]
    layer = LayerGenome(first.expert_merging + by, first.router_mapping, first.top_k)
    return Genome((layer, *genome.layers[1:]))


def individual(number: int, genome: Genome, fitness: float, **more: object) -> Individual:
    return Individual(Candidate(number, genome, "random_pruning"), Evaluation(fitness, **more))


def numbers(individuals: list[Individual]) -> list[int]:
    return [one.number for one in individuals]


def population_of(*genomes: Genome) -> tuple[Population, dict[int, float]]:
    """With falling fitness, which is also what is expected."""
    some = tuple(individual(number, genome, 1 - number / 10) for number, genome in enumerate(genomes))
    return Population(some), {one.number: one.evaluation.fitness for one in some}


def test_prunings_that_differ_by_one_exchange_are_not_apart() -> None:
    assert not are_apart(BASE, BASE) and not are_apart(BASE, ONE_SWAP)
    assert are_apart(BASE, TWO_SWAPS) and not are_apart(ONE_SWAP, TWO_SWAPS)


def test_the_better_of_two_neighbours_is_a_finalist() -> None:
    assert numbers(finalists(*population_of(BASE, ONE_SWAP, TWO_SWAPS), 3)) == [0, 2]
    assert numbers(finalists(*population_of(ONE_SWAP, TWO_SWAPS, BASE), 3)) == [0]


def test_the_order_is_that_of_what_is_expected_not_of_scores() -> None:
    population, expected = population_of(BASE, TWO_SWAPS)
    assert numbers(finalists(population, expected | {0: 0.2}, 2)) == [1, 0]


def test_merged_genomes_and_prunings_have_half_of_the_places_each() -> None:
    some = [merged(BASE, by / 100) for by in range(1, 6)]
    population, expected = population_of(*some, BASE, TWO_SWAPS)
    assert numbers(finalists(population, expected, 4)) == [0, 5, 1, 6]
    assert numbers(finalists(population, expected, 7)) == [0, 5, 1, 6, 2, 3, 4]


def test_an_individual_that_was_stopped_is_no_finalist() -> None:
    some = (individual(0, BASE, 0.9, scores=None), individual(1, TWO_SWAPS, 0.5))
    assert numbers(finalists(Population(some), {0: 0.9, 1: 0.5}, 2)) == [1]


def test_the_better_half_has_a_pruning_where_there_is_one() -> None:
    some = [individual(n, merged(BASE, (n + 1) / 100), 0.5) for n in range(4)]
    last = [individual(4, BASE, 0.4), individual(5, TWO_SWAPS, 0.3)]
    assert numbers(better_half(some)) == [0, 1]
    assert numbers(better_half(some + last)) == [0, 1, 2, 4]
    assert numbers(better_half(last + some)) == [4, 5, 0]


def test_parts_are_quarters_and_small_splits_are_not_divided() -> None:
    assert (num_parts(20, [320, 400]), part_size([320, 400])) == (2, 80)
    assert num_parts(20, [99, 400]) == num_parts(3, [320]) == 0


@pytest.mark.parametrize(("number", "size", "wanted"), [(20, 320, 5 + 3 + 5), (1, 320, 1), (20, 40, 20)])
def test_cost_is_counted_in_whole_evaluations(number: int, size: int, wanted: int) -> None:
    assert cost(number, [size], merges=False) == wanted


def test_cost_is_enough_where_the_best_pruning_comes_last_every_time() -> None:
    left = [individual(n, merged(BASE, (n + 1) / 100), 0.5) for n in range(19)] + [individual(19, BASE, 0.1)]
    seen = 0.0
    for _ in range(num_parts(20, [320])):
        seen += len(left) / 4
        left = better_half(left)
    assert seen + len(left) <= cost(20, [320], merges=True) <= seen + len(left) + 1


def test_the_worst_of_two_tasks_is_as_noisy_as_one_and_their_mean_half_as_much() -> None:
    rng = np.random.default_rng(4)
    scores = [{task: rng.normal(size=4000) for task in ("a", "b")} for _ in range(30)]
    assert _noise(scores, "worst") == pytest.approx(1 / 4000, rel=0.1)
    assert _noise(scores, "mean") == pytest.approx(1 / 8000, rel=0.1)


def test_scores_of_parts_are_put_together_task_by_task() -> None:
    parts = [Evaluation(0.0, scores={"a": np.array([1.0, 0.0]), "b": np.array([n])}) for n in (2.0, 3.0)]
    found = put_together(parts)
    assert found["a"].tolist() == [1, 0, 1, 0] and found["b"].tolist() == [2, 3]


def judged(truth: np.ndarray, expected: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Estimates, and plain means, of finalists whose answers are right with these probabilities."""
    common = rng.random(320)
    scores = [{"t": (np.where(rng.random(320) < 0.5, common, rng.random(320)) < one).astype(float)} for one in truth]
    some = [individual(number, BASE, 0.0) for number in range(len(truth))]
    found = np.zeros(len(truth))
    for one in judge(some, expected.tolist(), scores, "mean"):
        found[one.individual.number] = one.score
    return found, np.array([one["t"].mean() for one in scores])


def test_shrunk_scores_choose_better_and_promise_less() -> None:
    rng = np.random.default_rng(0)
    chosen: dict[str, list[float]] = {"shrunk": [], "plain": []}
    promised: dict[str, list[float]] = {"shrunk": [], "plain": []}
    for _ in range(400):
        truth = 0.7 + 0.015 * rng.normal(size=12)
        found, plain = judged(truth, truth + 0.01 * rng.normal(size=12), rng)
        for name, scores in (("shrunk", found), ("plain", plain)):
            chosen[name].append(truth[scores.argmax()])
            promised[name].append(scores.max() - truth[scores.argmax()])
    assert np.mean(chosen["shrunk"]) > np.mean(chosen["plain"]) + 0.002
    assert abs(np.mean(promised["shrunk"])) < np.mean(promised["plain"]) / 2


def test_useless_expectations_do_no_harm() -> None:
    rng = np.random.default_rng(1)
    regret = {"shrunk": 0.0, "plain": 0.0}
    for _ in range(300):
        truth = 0.7 + 0.03 * rng.normal(size=12)
        found, plain = judged(truth, rng.normal(size=12), rng)
        regret["shrunk"] += truth.max() - truth[found.argmax()]
        regret["plain"] += truth.max() - truth[plain.argmax()]
    assert regret["shrunk"] < 1.1 * regret["plain"]


def test_two_finalists_or_equal_ones_are_judged_as_they_are() -> None:
    rng = np.random.default_rng(2)
    found, plain = judged(np.array([0.6, 0.7]), np.array([0.7, 0.6]), rng)
    np.testing.assert_allclose(found, plain)
    scores = [{"t": np.array([1.0, 0.0, 1.0])}] * 3
    same = judge([individual(n, BASE, 0.0) for n in range(3)], [0.1, 0.2, 0.3], scores, "mean")
    assert [one.individual.number for one in same] == [0, 1, 2] and same[0].score == pytest.approx(2 / 3)


def test_what_is_expected_of_a_pruning_weighs_its_score_against_those_of_its_like() -> None:
    rng = np.random.default_rng(3)
    worth = rng.normal(size=(3, 8))
    genomes = [random_pruning(SPACE, rng) for _ in range(120)]
    truth = np.array([sum(worth[layer, list(kept)].sum() for layer, kept in enumerate(one.kept)) for one in genomes])
    scores = truth + truth.std() * rng.normal(size=120)
    some = [
        individual(n, one, score, num_examples=100) for n, (one, score) in enumerate(zip(genomes, scores, strict=True))
    ]
    expected = expected_scores(SPACE, Population(tuple(some)))
    found = np.array([expected[number] for number in range(120)])
    assert np.corrcoef(found, truth)[0, 1] > np.corrcoef(scores, truth)[0, 1] + 0.1


def test_merged_genomes_and_few_prunings_are_expected_to_score_what_they_scored() -> None:
    few = Population((individual(0, BASE, 0.3), individual(1, merged(BASE, 0.1), 0.9)))
    assert expected_scores(SPACE, few) == {0: 0.3, 1: 0.9}
