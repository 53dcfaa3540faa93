"""The search that learns from every evaluation: what it finds, and on what its candidates depend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from toy_fitness import ToyTask, run

from moe_evo.config.search import SearchConfig, SurrogateConfig
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.registry import build_search
from moe_evo.searches.surrogate import SurrogateSearch
from moe_evo.testing.searches import space_of

SPACE = space_of([8] * 6, 4)
CONFIG = SearchConfig(algorithm="surrogate", evaluations=120)


def surrogate(space: SearchSpace = SPACE, config: SearchConfig = CONFIG, **options: object) -> SurrogateSearch:
    search = build_search(space, replace(config, surrogate=SurrogateConfig(**options)))
    assert isinstance(search, SurrogateSearch)
    return search


def told(task: ToyTask, candidates: Sequence[Candidate]) -> list[Individual]:
    return [Individual(one, task.evaluate(one.genome)) for one in candidates]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("space", [SPACE, space_of([16] * 4, 4)], ids=["half", "a quarter"])
def test_it_finds_more_than_random_search_and_prunings_of_eep_also_on_examples_that_it_never_saw(
    space: SearchSpace, seed: int
) -> None:
    task = ToyTask(space, seed)
    found = {}
    for algorithm in ("surrogate", "random", "eep"):
        config = SearchConfig(algorithm=algorithm, evaluations=150, seed=seed)
        if algorithm == "eep":
            config = replace(config, eep=replace(config.eep, num_pruning=150))
        best = run(build_search(space, config), task.evaluate, 150).population.best
        found[algorithm] = best.evaluation.fitness, task.unseen_share(best.genome)
    assert found["surrogate"][0] > found["random"][0] + 0.02
    assert found["surrogate"][0] >= found["eep"][0] - 0.005
    assert found["surrogate"][1] > found["random"][1]


def test_candidates_of_a_batch_depend_on_the_outcomes_before_it_and_on_no_others() -> None:
    task = ToyTask(SPACE, seed=0)
    together, apart = surrogate(), surrogate()
    for search in (together, apart):
        search.tell(told(task, search.ask(30)))
    whole = together.ask(10)
    one_by_one = []
    for _ in range(10):
        (candidate,) = apart.ask(1)
        one_by_one.append(candidate)
        apart.tell(told(task, [candidate]))
    assert one_by_one == whole
    together.tell(told(task, whole))
    assert together.ask(10) == apart.ask(10)


def test_a_batch_that_is_asked_by_many_gangs_is_diverse() -> None:
    task = ToyTask(SPACE, seed=1)
    search = surrogate(batch=30)
    search.tell(told(task, search.ask(60)))
    asked = search.ask(30)
    distances = [
        sum(len(set(first) - set(second)) for first, second in zip(one.genome.kept, other.genome.kept, strict=True))
        for place, one in enumerate(asked)
        for other in asked[:place]
    ]
    assert min(distances) >= 1 and np.median(distances) > 2


def test_failures_teach_nothing_and_do_no_harm() -> None:
    task, search = ToyTask(SPACE, seed=2), surrogate()
    for _ in range(12):
        asked = search.ask(10)
        failed = EvaluationFailure("out_of_memory", "...")
        search.tell([Individual(one, failed if one.number % 3 == 0 else task.evaluate(one.genome)) for one in asked])
    drawn = run(build_search(SPACE, SearchConfig(algorithm="random", evaluations=80)), task.evaluate, 80).population
    assert len(search.population) == 80
    assert search.population.best.evaluation.fitness > drawn.best.evaluation.fitness


def test_scores_that_a_race_stopped_early_count_less() -> None:
    """One lucky score from few examples does not become the centre of what is proposed."""
    task, first, second = ToyTask(SPACE, seed=3), surrogate(), surrogate()
    asked = first.ask(30)
    assert second.ask(30) == asked
    for search, examples in ((first, 200), (second, 4)):
        lucky = replace(task.evaluate(asked[0].genome), fitness=1.0, num_examples=examples)
        search.tell([Individual(asked[0], lucky), *told(task, asked[1:])])
    children = [sum(0 in one.parents for one in search.ask(10)) for search in (first, second)]
    assert children[0] > children[1]


def test_all_equal_scores_are_no_reason_to_stop() -> None:
    search = surrogate()
    for _ in range(6):
        search.tell([Individual(one, Evaluation(0.5, num_examples=10)) for one in search.ask(10)])
    assert len(search.population) == 60


@pytest.mark.parametrize("changed", [{"num_warmup": 10}, {"batch": 3}, {"pool": 100}])
def test_every_parameter_changes_the_search(changed: dict[str, int]) -> None:
    task = ToyTask(SPACE, seed=0)

    def proposed(search: SurrogateSearch) -> list[Candidate]:
        asked: list[Candidate] = []
        for _ in range(50):
            asked += search.ask(1)
            search.tell(told(task, asked[-1:]))
        return asked

    assert proposed(surrogate(**changed)) != proposed(surrogate())


def test_priors_change_what_is_proposed_and_a_right_one_helps() -> None:
    space = space_of([32] * 6, 8)
    task = ToyTask(space, seed=4)
    rng = np.random.default_rng(5)
    worth = [np.isin(np.arange(32), kept) + 0.7 * rng.normal(size=32) for kept in task.best_pruning]
    config = SearchConfig(algorithm="surrogate", evaluations=80)
    searches = [run(build_search(space, config, priors=one), task.evaluate, 80) for one in ({"right": worth}, {})]
    knowing, other = (
        float(np.mean([one.evaluation.fitness for one in search.population.individuals[40:]])) for search in searches
    )
    assert knowing > other + 0.02


def test_what_each_prior_would_keep_is_scored_first_by_its_name() -> None:
    space = space_of([32] * 6, 8)
    rng = np.random.default_rng(6)
    priors = {name: [rng.normal(size=32) for _ in range(6)] for name in ("reap", "ean")}
    asked = build_search(space, SearchConfig(algorithm="surrogate", evaluations=80), priors=priors).ask(3)
    assert [one.operator for one in asked] == ["ean", "reap", "random_pruning"]
    for one in asked[:2]:
        wanted = [sorted(np.argsort(-layer)[:8].tolist()) for layer in priors[one.operator]]
        assert [sorted(kept) for kept in one.genome.kept] == wanted
