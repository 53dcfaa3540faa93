"""What every search promises, over every entry of SEARCHES and every kind of space."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moe_evo.config.search import EEPConfig, SearchConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.searches.base import Search
from moe_evo.searches.enumeration import next_pruning, num_prunings
from moe_evo.searches.registry import SEARCHES, build_search


def _space(num_experts, num_kept, *, expert_groups=1, **options) -> SearchSpace:
    layers = tuple(range(len(num_experts)))
    shape = ModelShape("mixtral", tuple(num_experts), (1,) * len(num_experts), layers, expert_groups)
    return SearchSpace.build(shape, num_kept=num_kept, **options)


SPACES = {
    "plain": _space([8] * 3, 4, top_k=2),
    "ragged": _space([4, 8, 6], [4, 3, 1]),
    "layer groups": _space([8] * 6, 3, num_layer_groups=2),
    "group-limited": _space([8] * 3, 4, expert_groups=2),
    "tiny": _space([5], 2),
    "tiny group-limited": _space([4], 2, expert_groups=2),
    "nothing to prune": _space([4, 4], 4),
}
BUDGET = 60


@pytest.fixture(params=SEARCHES)
def algorithm(request):
    return request.param


@pytest.fixture(params=SPACES)
def space(request):
    return SPACES[request.param]


def _search(algorithm: str, space: SearchSpace, seed: int = 0, evaluations: int = BUDGET) -> Search:
    return build_search(space, SearchConfig(algorithm=algorithm, seed=seed, evaluations=evaluations))


def _outcome(candidate: Candidate) -> Evaluation | EvaluationFailure:
    """A rugged fitness with many ties; every seventh candidate fails."""
    if candidate.number % 7 == 3:
        return EvaluationFailure("out_of_memory", "as this test wants it")
    sums = sum(float(layer.expert_merging @ np.arange(layer.num_experts) @ np.ones(layer.num_kept))
               for layer in candidate.genome.layers)  # fmt: skip
    return Evaluation(round(math.sin(sums), 1), standard_error=0.1)


def _told(candidates) -> list[Individual]:
    return [Individual(candidate, _outcome(candidate)) for candidate in candidates]


def _run(search: Search, budget: int = BUDGET, at_once: int = 1) -> list[Candidate]:
    asked: list[Candidate] = []
    while len(asked) < budget and (new := search.ask(min(at_once, budget - len(asked)))):
        search.tell(_told(new))
        asked += new
    return asked


def test_the_same_seed_gives_the_same_candidates_and_another_seed_others(algorithm, space):
    runs = [_run(_search(algorithm, space, seed)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1]
    if num_prunings(space) > 10:
        assert runs[0] != runs[2]


def test_candidates_are_numbered_in_order_and_name_earlier_ones_as_parents(algorithm, space):
    asked = _run(_search(algorithm, space))
    assert [candidate.number for candidate in asked] == list(range(len(asked)))
    for candidate in asked:
        assert all(0 <= parent < candidate.number for parent in candidate.parents)
        assert len(candidate.parents) == {"identity": 0, "random_pruning": 0}.get(
            candidate.operator, 2 if "crossover" in candidate.operator else 1
        )


def test_no_genome_is_proposed_twice(algorithm, space):
    digests = [candidate.genome.digest for candidate in _run(_search(algorithm, space), at_once=4)]
    assert len(set(digests)) == len(digests)


def test_a_genome_that_was_told_is_not_proposed(algorithm):
    space = SPACES["tiny"]
    known = Candidate(0, Genome.from_kept([[1, 3]], 5, 1), "frequency")
    search = _search(algorithm, space)
    search.tell([Individual(known, Evaluation(0.5))])
    assert known.genome not in [candidate.genome for candidate in _run(search)]


def test_every_candidate_is_inside_the_space(algorithm, space):
    for candidate in _run(_search(algorithm, space), at_once=3):
        space.check(candidate.genome)
        assert space.genome(space.genes(candidate.genome)) == candidate.genome


def test_asking_at_once_or_one_by_one_is_the_same(algorithm, space):
    together, apart = _search(algorithm, space), _search(algorithm, space)
    assert together.ask(25) == [candidate for _ in range(25) for candidate in apart.ask(1)]


def test_the_order_of_telling_does_not_matter(algorithm, space):
    forward, shuffled = _search(algorithm, space), _search(algorithm, space)
    for _ in range(6):
        asked = forward.ask(8)
        assert shuffled.ask(8) == asked
        forward.tell(_told(asked))
        for index in np.random.default_rng(1).permutation(len(asked)):
            shuffled.tell(_told([asked[index]]))
    assert forward.population.ranked == shuffled.population.ranked


def test_outcomes_may_come_late_and_out_of_step(algorithm, space):
    search, waiting, order = _search(algorithm, space), [], np.random.default_rng(2)
    for _ in range(BUDGET):
        waiting += search.ask(1)
        if len(waiting) > 5:
            search.tell(_told([waiting.pop(int(order.integers(len(waiting))))]))
    search.tell(_told(waiting))
    assert len(search.population) > 0


def _lagging_run(search: Search, asked: list[Candidate], num_told: int) -> list[Candidate]:
    """Two requests in flight: tells candidate n - 2 before it asks for candidate n."""
    while len(asked) < 30:
        if len(asked) - num_told == 2:
            search.tell(_told([asked[num_told]]))
            num_told += 1
        if not (new := search.ask(1)):
            break
        asked += new
    return asked


@pytest.mark.parametrize("name", ["ragged", "layer groups", "group-limited", "tiny", "nothing to prune"])
def test_a_restored_search_goes_on_as_if_uninterrupted_from_every_cut(algorithm, name):
    space = SPACES[name]
    whole = _lagging_run(_search(algorithm, space, evaluations=30), [], 0)
    for cut in range(len(whole)):
        resumed = _search(algorithm, space, evaluations=30)
        resumed.restore(whole[:cut])
        num_told = max(cut - 2, 0)
        resumed.tell(reversed(_told(whole[:num_told])))
        assert _lagging_run(resumed, whole[:cut], num_told) == whole


def test_phase_and_population_are_restored(algorithm, space):
    search = _search(algorithm, space)
    asked = _run(search, 40)
    resumed = _search(algorithm, space)
    resumed.restore(asked)
    resumed.tell(_told(asked))
    assert resumed.phase == search.phase
    assert resumed.population.ranked == search.population.ranked


def test_failures_are_tolerated_and_never_parents(algorithm, space):
    for candidate in _run(_search(algorithm, space)):
        assert not any(parent % 7 == 3 for parent in candidate.parents)


@pytest.mark.parametrize("name", ["eep", "eep_release"])
def test_the_one_success_in_a_used_up_space_is_the_only_parent(name):
    search = _search(name, SPACES["tiny group-limited"])
    asked = search.ask(4)
    failure = EvaluationFailure("worker_died", "...")
    search.tell([Individual(one, Evaluation(0.5) if one.number == 2 else failure) for one in asked])
    assert {candidate.parents for candidate in search.ask(20)} == {(2,)}


def test_a_search_in_which_everything_fails_still_proposes(algorithm):
    search = _search(algorithm, SPACES["plain"])
    for _ in range(BUDGET):
        (candidate,) = search.ask(1)
        search.tell([Individual(candidate, EvaluationFailure("worker_died", "..."))])
    assert len(search.population) == 0


def test_random_search_ends_exactly_when_the_space_is_exhausted(space):
    size = num_prunings(space)
    if size > 500:
        return
    asked = _run(_search("random", space), budget=size + 10)
    assert len({candidate.genome for candidate in asked}) == len(asked) == size


def test_random_search_finds_every_last_pruning_of_a_small_space():
    space = _space([8, 4], 2)
    asked = _search("random", space).ask(1000)
    assert len({candidate.genome for candidate in asked}) == num_prunings(space) == 28 * 6


def test_a_walk_through_the_prunings_visits_each_once(space):
    size = num_prunings(space)
    if size > 500:
        return
    start = genome = _search("random", space).ask(1)[0].genome
    seen = set()
    while genome not in seen:
        seen.add(genome)
        genome = next_pruning(genome, space)
    assert genome == start and len(seen) == size


def test_an_unknown_parameter_of_the_release_is_not_read():
    space, config = SPACES["plain"], SearchConfig(algorithm="eep_release", evaluations=402)
    changed = replace(config, algorithm="eep", eep=EEPConfig(sigma=3.0))
    released, own = (_run(build_search(space, one), 150) for one in (config, changed))
    assert released != own
