"""What every search promises, over every entry of SEARCHES, and what those of this package promise beside it."""

from dataclasses import replace

import pytest

from moe_evo.config.search import EEPConfig, SearchConfig
from moe_evo.genomes.population import Evaluation, EvaluationFailure, Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import Search
from moe_evo.searches.enumeration import next_pruning, num_prunings
from moe_evo.searches.registry import SEARCHES, build_search
from moe_evo.testing.searches import SPACES, SearchContract, candidates_of, space_of


class TestSearches(SearchContract):
    @pytest.fixture(params=SEARCHES)
    def algorithm(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def test_operators_tell_how_many_parents_there_are(self, algorithm: str, space: SearchSpace) -> None:
        for candidate in candidates_of(self.search(algorithm, space)):
            assert len(candidate.parents) == {"identity": 0, "random_pruning": 0, "most_worth": 0}.get(
                candidate.operator, 2 if "crossover" in candidate.operator else 1
            )


def search_of(algorithm: str, space: SearchSpace) -> Search:
    return build_search(space, SearchConfig(algorithm=algorithm, evaluations=60))


@pytest.mark.parametrize("name", ["eep", "eep_release"])
def test_the_one_success_in_a_used_up_space_is_the_only_parent(name):
    search = search_of(name, SPACES["tiny group-limited"])
    asked = search.ask(4)
    failure = EvaluationFailure("worker_died", "...")
    search.tell([Individual(one, Evaluation(0.5) if one.number == 2 else failure) for one in asked])
    assert {candidate.parents for candidate in search.ask(20)} == {(2,)}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_random_search_ends_exactly_when_the_space_is_exhausted(space):
    size = num_prunings(space)
    if size > 500:
        return
    asked = candidates_of(search_of("random", space), budget=size + 10)
    assert len({candidate.genome for candidate in asked}) == len(asked) == size


def test_random_search_finds_every_last_pruning_of_a_smallspace_of():
    space = space_of([8, 4], 2)
    asked = search_of("random", space).ask(1000)
    assert len({candidate.genome for candidate in asked}) == num_prunings(space) == 28 * 6


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_a_walk_through_the_prunings_visits_each_once(space):
    size = num_prunings(space)
    if size > 500:
        return
    start = genome = search_of("random", space).ask(1)[0].genome
    seen = set()
    while genome not in seen:
        seen.add(genome)
        genome = next_pruning(genome, space)
    assert genome == start and len(seen) == size


def test_an_unknown_parameter_of_the_release_is_not_read():
    space, config = SPACES["plain"], SearchConfig(algorithm="eep_release", evaluations=402)
    changed = replace(config, algorithm="eep", eep=EEPConfig(sigma=3.0))
    released, own = (candidates_of(build_search(space, one), 150) for one in (config, changed))
    assert released != own
