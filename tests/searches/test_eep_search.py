"""EEP: its two phases, its parameters, and that it finds more than random search does."""

from dataclasses import replace

import numpy as np
import pytest
from toy_fitness import ToyTask, run

from moe_evo.config.search import EEP_RELEASE, EEPConfig, SearchConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, EvaluationFailure, Individual
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.searches.eep import EEPSearch, schedule
from moe_evo.searches.registry import build_search


def _space(num_layers=3, num_experts=8, num_kept=4, **options) -> SearchSpace:
    layers = tuple(range(num_layers))
    shape = ModelShape("mixtral", (num_experts,) * num_layers, (2,) * num_layers, layers)
    return SearchSpace.build(shape, num_kept=num_kept, **options)


def _search(space: SearchSpace | None = None, evaluations: int = 80, **eep) -> EEPSearch:
    config = SearchConfig(algorithm="eep", evaluations=evaluations, eep=EEPConfig(**eep))
    return EEPSearch(space or _space(), config)


def _candidates(search: EEPSearch, evaluations: int = 80, space: SearchSpace | None = None):
    task = ToyTask(space or _space(), seed=0)
    run(search, task.evaluate, evaluations)
    return [one.candidate for one in sorted(search.population, key=lambda one: one.number)]


@pytest.mark.parametrize(
    ("eep", "evaluations", "expected"),
    [
        (EEPConfig(), 402, (31, 201)),
        (EEP_RELEASE, 402, (31, 101)),
        (EEPConfig(), 2000, (31, 1000)),
        (EEPConfig(), 199, (31, 99)),
        (EEPConfig(), 100, (25, 50)),
        (EEPConfig(), 40, (10, 20)),
        (EEPConfig(), 2, (1, 1)),
        (EEPConfig(), 1, (1, 1)),
        (EEPConfig(num_initial=150), 402, (100, 201)),
        (EEPConfig(num_initial=500), 402, (100, 201)),
        (EEPConfig(num_pruning=402), 402, (31, 402)),
        (EEPConfig(num_pruning=500), 402, (31, 402)),
        (EEP_RELEASE, 60, (31, 60)),
    ],
)
def test_half_of_the_budget_prunes_and_explicit_numbers_are_kept(eep, evaluations, expected):
    assert schedule(eep, evaluations) == expected


def test_prunings_come_first_and_merges_after():
    search = _search(evaluations=80)
    phases = [search.phase]
    candidates = []
    for _ in range(80):
        (candidate,) = search.ask(1)
        search.tell([Individual(candidate, Evaluation(float(candidate.number), standard_error=1.0))])
        candidates.append(candidate)
        phases.append(search.phase)
    assert phases[:40] == ["pruning"] * 40 and phases[40:] == ["merging"] * 41
    assert [c.operator for c in candidates[:20]] == ["random_pruning"] * 20
    assert all(c.genome.is_pruning for c in candidates[:40])
    assert {c.operator for c in candidates[20:40]} == {"swap_mutation", "row_crossover"}
    assert not any(c.genome.is_pruning for c in candidates[40:])
    assert {c.operator for c in candidates[40:]} == {"gaussian_mutation", "row_crossover"}


def test_a_run_whose_pruning_budget_is_the_whole_only_prunes():
    candidates = _candidates(_search(num_pruning=80))
    assert len(candidates) == 80 and all(candidate.genome.is_pruning for candidate in candidates)


def test_merging_starts_early_when_every_pruning_is_known():
    space = _space(1, 5, 2)
    search = _search(space, num_pruning=40)
    candidates = _candidates(search, 30, space)
    assert [candidate.genome.is_pruning for candidate in candidates] == [True] * 10 + [False] * 20
    assert search.phase == "merging"


def test_keeping_every_expert_starts_from_the_identity_and_merges_at_once():
    space = _space(num_kept=8)
    search = _search(space)
    assert search.phase == "merging"
    ahead = search.ask(5)
    assert ahead[0].genome == space.shape.identity() and ahead[0].operator == "identity"
    assert [candidate.parents for candidate in ahead[1:]] == [(0,)] * 4
    search.tell([Individual(one, Evaluation(float(one.number))) for one in ahead])
    later = [candidate for _ in range(20) for candidate in search.ask(1)]
    assert {candidate.operator for candidate in later} <= {"gaussian_mutation", "row_crossover"}
    assert set().union(*(candidate.parents for candidate in later)) - {0}


def test_an_identity_that_fails_does_not_end_a_run_that_keeps_every_expert():
    search = _search(_space(num_kept=8))
    search.tell([Individual(search.ask(1)[0], EvaluationFailure("out_of_memory", "..."))])
    assert [candidate.parents for candidate in search.ask(3)] == [(0,)] * 3


def test_fewer_active_experts_are_the_same_search():
    space = _space(top_k=1)
    candidates = _candidates(_search(space), space=space)
    assert {candidate.genome.top_k for candidate in candidates} == {(1, 1, 1)}


def test_candidates_asked_ahead_of_all_outcomes_are_random_prunings():
    assert {candidate.operator for candidate in _search().ask(60)} == {"random_pruning"}


@pytest.mark.parametrize(
    "changed",
    [
        {"num_initial": 5},
        {"num_pruning": 60},
        {"layer_rate": 0.9},
        {"swap_rate": 0.9},
        {"entry_rate": 0.9},
        {"sigma": 0.5},
        {"crossover_rate": 0.9},
        {"crossover_bias": 0.99},
        {"pruning_crossover": False},
        {"layer_crossover_rate": 0.95},
        {"prefix_rate": 0.9},
        {"normalise_rate": 0.9},
        {"mutation_margin": 4.0},
        {"mutation_parents": 12},
        {"crossover_margin": 5.0},
        {"crossover_parents": 20},
        {"margin_unit": "fitness"},
    ],
)
def test_every_parameter_changes_the_search(changed):
    assert _candidates(_search(**changed)) != _candidates(_search())


def test_crossover_can_be_kept_to_the_merging_phase():
    candidates = _candidates(_search(crossover_rate=1.0, pruning_crossover=False))
    assert not any("crossover" in candidate.operator for candidate in candidates[:40])
    assert all(candidate.operator == "row_crossover" for candidate in candidates[40:])


def test_crossovers_can_exchange_whole_layers():
    candidates = _candidates(_search(crossover_rate=1.0, layer_crossover_rate=1.0))
    assert {candidate.operator for candidate in candidates[20:]} == {"layer_crossover"}


def test_children_may_keep_a_beginning_of_their_parent():
    def first_changes(**options):
        candidates = _candidates(_search(crossover_rate=0.3, normalise_rate=0.5, **options))
        genes = {one.number: one.genome.layers for one in candidates}
        pairs = [(genes[one.parents[0]], one.genome.layers) for one in candidates if one.parents]
        return [next(n for n, (old, new) in enumerate(zip(*pair, strict=True)) if old != new) for pair in pairs]

    kept, usual = first_changes(prefix_rate=1.0), first_changes()
    assert np.mean(kept) > np.mean(usual) + 0.25 and kept.count(2) > len(kept) / 4


def test_parents_are_within_the_margin_of_the_best():
    search = _search(crossover_rate=0.0, mutation_margin=0.0, mutation_parents=1, margin_unit="fitness", num_initial=20)
    task = ToyTask(_space(), seed=1)
    for number in range(80):
        (candidate,) = search.ask(1)
        if number >= 20:
            best = search.population.best.evaluation.fitness
            (parent,) = candidate.parents
            by_number = {one.number: one.evaluation.fitness for one in search.population}
            assert by_number[parent] == best
        search.tell([Individual(candidate, task.evaluate(candidate.genome))])


def test_normalised_children_have_rows_that_sum_to_one():
    for candidate in _candidates(_search(normalise_rate=1.0))[40:]:
        for layer in candidate.genome.layers:
            np.testing.assert_allclose(layer.expert_merging.sum(axis=1), 1, atol=1e-5)


def test_the_release_takes_the_published_values():
    search = build_search(_space(), SearchConfig(algorithm="eep_release"))
    assert isinstance(search, EEPSearch) and search.eep == EEP_RELEASE
    assert (search.num_initial, search.num_pruning) == (31, 101)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("algorithm", ["eep", "eep_release"])
def test_eep_finds_more_than_random_search_at_equal_evaluations(algorithm, seed):
    space = _space(num_layers=8)
    task = ToyTask(space, seed)
    config = SearchConfig(algorithm="eep", evaluations=250, seed=seed)
    evolved, drawn = (
        run(build_search(space, replace(config, algorithm=name)), task.evaluate, 250).population
        for name in (algorithm, "random")
    )
    assert len(evolved) == len(drawn) == 250
    assert evolved.best.evaluation.fitness > drawn.best.evaluation.fitness + 0.02
    assert task.unseen_share(evolved.best.genome) > task.unseen_share(drawn.best.genome) - 0.02


def test_pruning_alone_finds_most_of_a_hidden_subset():
    space = _space(num_layers=2)
    task = ToyTask(space, seed=3, noise=0.0)
    hidden = Genome.from_kept(task.best_pruning, 8, 2)
    best = run(_search(space, 200, num_pruning=200), task.evaluate, 200).population.best
    found = sum(len(set(a) & set(b)) for a, b in zip(best.genome.kept, hidden.kept, strict=True))
    assert found >= 7
