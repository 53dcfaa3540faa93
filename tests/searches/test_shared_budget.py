"""A budget that layers share: the search finds which layers need more of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_fitness import run

from moe_evo.config.search import SearchConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.registry import build_search
from moe_evo.testing.searches import candidates_of, space_of

SHARED = space_of([8] * 6, {"mean": 4, "min": 2, "max": 8}, top_k=2)
EVEN = space_of([8] * 6, 4, top_k=2)


class Layers:
    """Experts have worths, in some layers large ones and in others small ones; scores are noisy."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.worths = rng.exponential(1.0, (6, 8)) * np.array([3.0, 0.2, 1.0, 0.1, 2.0, 0.5])[:, None]
        self.noise = np.random.default_rng([seed, 1])

    def worth(self, genome: Genome) -> float:
        return float(sum(self.worths[layer][list(kept)].sum() for layer, kept in enumerate(genome.kept)))

    def evaluate(self, genome: Genome) -> Evaluation:
        return Evaluation(self.worth(genome) + self.noise.normal(0, 0.3), standard_error=0.3, num_examples=100)


def best_of(space: SearchSpace, algorithm: str, seed: int) -> float:
    task = Layers(seed)
    config = SearchConfig(algorithm=algorithm, evaluations=150, seed=seed)
    found = run(build_search(space, config), task.evaluate, 150).population
    return task.worth(found.best.genome)


@pytest.mark.parametrize("seed", range(2))
def test_it_moves_experts_to_the_layers_that_need_them(seed: int) -> None:
    found = best_of(SHARED, "surrogate", seed)
    best_even = sum(np.sort(one)[-4:].sum() for one in Layers(seed).worths)
    assert found > best_even > best_of(EVEN, "random", seed)
    assert found > best_of(SHARED, "random", seed) + 2


def test_what_keeps_as_many_in_every_layer_is_among_the_first() -> None:
    config = SearchConfig(algorithm="surrogate", evaluations=60)
    first = build_search(SHARED, config).ask(30)
    is_even = [len(set(one.genome.num_kept)) == 1 for one in first]
    assert 15 <= sum(is_even) < 30


def test_one_shot_seeds_keep_as_many_in_every_layer_and_their_mutants_keep_the_sum() -> None:
    config = SearchConfig(algorithm="surrogate", evaluations=60, init=["reap"])
    seed = Genome.from_kept([range(4)] * 6, 8, 2)
    for one in build_search(SHARED, config, seeds={"reap": seed}).ask(30):
        SHARED.check(one.genome)


def test_prunings_of_a_wider_run_are_narrowed_to_the_budget() -> None:
    config = SearchConfig(algorithm="surrogate", evaluations=60)
    wider = Genome.from_kept([range(7)] * 6, 8, 2)
    asked = build_search(SHARED, config, wider=[wider]).ask(30)
    narrowed = [one.genome for one in asked if one.operator == "narrowed"]
    assert len(narrowed) == 15
    for genome in narrowed:
        SHARED.check(genome)
        assert all(7 not in kept or len(kept) == 8 for kept in genome.kept)


def test_a_budget_and_a_multiple_are_kept_together() -> None:
    space = space_of([8] * 4, {"mean": 4, "min": 2, "max": 8}, top_k=2)
    doubled = replace(space, kept_bounds=replace(space.kept, step=2))
    for one in candidates_of(build_search(doubled, SearchConfig(algorithm="surrogate", evaluations=60)), at_once=5):
        assert sum(one.genome.num_kept) == 16 and not any(number % 2 for number in one.genome.num_kept)
