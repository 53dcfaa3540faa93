"""Repair of the best pruning at the end of a search: its genomes, what it finds, and on what it depends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_fitness import ToyTask, run

from moe_evo.config.search import SearchConfig, SurrogateConfig
from moe_evo.errors import ConfigError
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, EvaluationFailure, Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import Phase
from moe_evo.searches.registry import build_search, planned_phases
from moe_evo.searches.repair import REPAIR, Repairs
from moe_evo.searches.smooth import SmoothPosterior
from moe_evo.searches.surrogate import SurrogateSearch
from moe_evo.testing.searches import SPACES, SearchContract, candidates_of, space_of, told

SPACE = space_of([8] * 4, 4)
CONFIG = SearchConfig(algorithm="surrogate", evaluations=120, surrogate=SurrogateConfig(repair=0.5))


class TestRepairing(SearchContract):
    name = "surrogate"

    def config(self, algorithm: str, seed: int = 0, evaluations: int = 60) -> SearchConfig:
        surrogate = SurrogateConfig(repair=0.5, num_warmup=8)
        return SearchConfig(algorithm=algorithm, seed=seed, evaluations=evaluations, surrogate=surrogate)

    def test_after_the_prunings_every_candidate_repairs_one(self, algorithm: str, space: SearchSpace) -> None:
        asked = candidates_of(self.search(algorithm, space))
        pruned = [one for one in asked if one.operator != REPAIR]
        assert len(asked) == 60 and len(pruned) <= 30 and all(one.genome.is_pruning for one in pruned)
        for one in asked[len(pruned) :]:
            parent = asked[one.parents[0]].genome
            assert not one.genome.is_pruning and parent.is_pruning and one.genome.kept == parent.kept
            for layer, old in zip(one.genome.layers, parent.layers, strict=True):
                assert np.array_equal(layer.router_mapping, old.router_mapping)


@pytest.mark.parametrize("kind", SPACES)
def test_numbers_of_a_repair_can_be_read_from_its_genome(kind: str) -> None:
    space = SPACES[kind]
    pruning = build_search(space, SearchConfig(algorithm="random")).ask(1)[0].genome
    repairs = Repairs(space, pruning)
    numbers = np.random.default_rng(0).standard_normal(repairs.size)
    genome = repairs.genome(numbers)
    space.check(genome)
    np.testing.assert_allclose(repairs.numbers(genome), numbers, atol=1e-4)
    assert repairs.genome(np.zeros(repairs.size)) == pruning


def test_a_kept_expert_is_scaled_and_takes_in_the_dropped_one_that_is_most_like_it() -> None:
    space = space_of([4, 4], 2, num_layer_groups=1)
    likeness = [np.eye(4), np.eye(4)]
    likeness[0][0, 3], likeness[1][0, 2], likeness[1][1, 2] = 0.9, 0.5, 0.2
    repairs = Repairs(space, Genome.from_kept([[0, 1]] * 2, 4, 1), likeness)
    assert repairs.size == 4, "both layers share their genes"
    layer = repairs.genome(np.array([1.0, 0.0, 0.0, 1.0])).layers[0]
    scale, share = np.exp(0.07), 0.08
    np.testing.assert_allclose(layer.expert_merging, [[scale, 0, 0, 0], [0, 1, share, 0]], rtol=1e-6)
    far = repairs.genome(np.array([0.0, 0.0, 99.0, -99.0])).layers[1]
    np.testing.assert_allclose(far.expert_merging, [[1, 0, 0, 0.9], [0, 1, -0.9, 0]], rtol=1e-6)
    assert far.kept == (0, 1)


def repaired_gain(evaluate, seed: int, space: SearchSpace = SPACE) -> tuple[float, SurrogateSearch]:
    search = build_search(space, replace(CONFIG, seed=seed))
    assert isinstance(search, SurrogateSearch)
    population = run(search, evaluate, 120).population
    return population.best.evaluation.fitness - population.prunings.best.evaluation.fitness, search


@pytest.mark.parametrize("seed", range(3))
def test_it_climbs_a_smooth_hill_far_above_random_repairs(seed: int) -> None:
    """Fitness falls with the distance of W_EM from hidden scales and shares, as those of a toy task."""
    task, rng = ToyTask(SPACE, seed), np.random.default_rng(seed)
    hidden = rng.normal(0, 0.2, (4, 4, 8))

    def evaluate(genome: Genome) -> Evaluation:
        kept = sum(len(set(own) & set(best)) for own, best in zip(genome.kept, task.best_pruning, strict=True))
        shifts = [layer.expert_merging - layer.router_mapping for layer in genome.layers]
        return Evaluation(kept / 16 - float(np.mean((np.array(shifts) - hidden) ** 2)), num_examples=10)

    gain, search = repaired_gain(evaluate, seed)
    repaired = [one for one in search.population if one.candidate.operator == REPAIR]
    best_pruning = search.population.prunings.best.evaluation.fitness
    drawn = [one.evaluation.fitness - best_pruning for one in repaired[:30]]
    assert gain > max(*drawn, 0) + 0.0005 and len(repaired) == 60


def test_a_batch_depends_on_the_outcomes_before_it_and_on_no_others() -> None:
    task = ToyTask(SPACE, seed=0)
    together, apart = (build_search(SPACE, CONFIG) for _ in range(2))
    for search in (together, apart):
        run(search, task.evaluate, 100)
    whole, one_by_one = together.ask(10), []
    for _ in range(10):
        one_by_one += apart.ask(1)
        apart.tell([Individual(one_by_one[-1], task.evaluate(one_by_one[-1].genome))])
    assert one_by_one == whole and {one.operator for one in whole} == {REPAIR}


def test_repairs_of_a_pruning_that_is_no_longer_the_best_are_left_behind() -> None:
    search = build_search(SPACE, CONFIG)
    asked = candidates_of(search, 60)
    late = asked[59]
    search = build_search(SPACE, CONFIG)
    search.restore(asked)
    search.tell(told(asked[:59]))
    first = search.ask(10)
    search.tell([Individual(late, Evaluation(9.0))])
    search.tell(told(first))
    assert {one.parents for one in search.ask(10)} == {(59,)} and (59,) not in {one.parents for one in first}


def test_where_all_prunings_failed_more_are_tried() -> None:
    search = build_search(SPACE, CONFIG)
    for _ in range(70):
        search.tell([Individual(one, EvaluationFailure("out_of_memory", "...")) for one in search.ask(1)])
    assert search.ask(1)[0].operator == "random_pruning"


def test_a_small_space_is_repaired_once_all_of_it_is_pruned() -> None:
    asked = candidates_of(build_search(SPACES["tiny"], replace(CONFIG, evaluations=40)), 40)
    assert [one.operator == REPAIR for one in asked] == [False] * 10 + [True] * 30


def test_the_last_share_of_the_budget_is_a_phase_of_its_own() -> None:
    phases = planned_phases(replace(CONFIG, evaluations=101), can_prune=True)
    assert [(one.name, one.evaluations) for one in phases] == [
        ("initial prunings", 25),
        ("proposed prunings", 26),
        ("repair", 50),
    ]
    assert phases[-1] == Phase("repair", "surrogate, repaired", 50, own_operators=(REPAIR,))
    unrepaired = planned_phases(replace(CONFIG, surrogate=SurrogateConfig()), can_prune=True)
    assert all(one.only_prunes for one in unrepaired)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_no_pruning_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"search.surrogate.repair: got .*, expected a share of at least 0, below 1"):
        SurrogateConfig(repair=share)


def test_a_smooth_posterior_interpolates_and_is_sure_where_it_knows() -> None:
    rng = np.random.default_rng(0)
    known = rng.standard_normal((60, 6))
    slope = rng.standard_normal(6)

    def truth(asked: np.ndarray) -> np.ndarray:
        return asked @ slope - 0.3 * (asked**2).sum(axis=1)

    posterior = SmoothPosterior(known, truth(known), np.ones(60))
    near = known[:5] + 0.05 * rng.standard_normal((5, 6))
    mean, root = posterior.moments(np.concatenate([near, 9 * near]))
    np.testing.assert_allclose(mean[:5], truth(near), atol=0.3)
    deviation = np.sqrt((root**2).sum(axis=1))
    assert deviation[:5].max() < 0.2 * deviation[5:].min()
    assert np.corrcoef(posterior.of_known, truth(known))[0, 1] > 0.99
    assert posterior.uphill @ slope > 0 and np.linalg.norm(posterior.uphill) == pytest.approx(np.sqrt(6))


def test_equal_scores_tell_of_no_direction() -> None:
    posterior = SmoothPosterior(np.eye(4), np.full(4, 0.5), np.ones(4))
    mean, _ = posterior.moments(np.zeros((1, 4)))
    assert mean == pytest.approx(0.5) and not posterior.uphill.any()
