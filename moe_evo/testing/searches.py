"""Tests for every search, in every kind of search space."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from moe_evo.config.search import SearchConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.searches.base import Search, phase_starts
from moe_evo.searches.enumeration import num_prunings
from moe_evo.searches.registry import build_search, check_search, has, planned_phases

BUDGET = 60


def space_of(
    num_experts: Sequence[int],
    num_kept: int | list[int] | dict[str, int],
    *,
    expert_groups: int = 1,
    top_k: int | None = None,
    num_layer_groups: int | None = None,
    varies_top_k: bool = False,
) -> SearchSpace:
    """The search space of an imaginary model; num_experts: of each MoE layer."""
    layers = tuple(range(len(num_experts)))
    shape = ModelShape("mixtral", tuple(num_experts), (1,) * len(num_experts), layers, expert_groups)
    return SearchSpace.build(
        shape, num_kept=num_kept, top_k=top_k, num_layer_groups=num_layer_groups, varies_top_k=varies_top_k
    )


SPACES = {
    "plain": space_of([8] * 3, 4, top_k=2),
    "ragged": space_of([4, 8, 6], [4, 3, 1]),
    "layer groups": space_of([8] * 6, 3, num_layer_groups=2),
    "group-limited": space_of([8] * 3, 4, expert_groups=2),
    "tiny": space_of([5], 2),
    "tiny group-limited": space_of([4], 2, expert_groups=2),
    "nothing to prune": space_of([4, 4], 4),
    "shared": space_of([8] * 4, {"mean": 4, "min": 2, "max": 7}, top_k=2),
    "shared by layer groups": space_of([8] * 6, {"mean": 4, "min": 2, "max": 8}, num_layer_groups=3, expert_groups=2),
    "tiny shared": space_of([3] * 3, {"mean": 2, "min": 1, "max": 3}),
}
"""Search spaces; in those that are named 'shared', layers share a budget."""


def outcome_of(candidate: Candidate) -> Evaluation | EvaluationFailure:
    """An artificial outcome: a rugged fitness with many ties, and a failure for every seventh candidate."""
    if candidate.number % 7 == 3:
        return EvaluationFailure("out_of_memory", "as this test wants it")
    sums = sum(
        float(layer.expert_merging @ np.arange(layer.num_experts) @ np.ones(layer.num_kept))
        for layer in candidate.genome.layers
    )
    return Evaluation(round(math.sin(sums), 1), standard_error=0.1)


def told(candidates: Iterable[Candidate]) -> list[Individual]:
    return [Individual(candidate, outcome_of(candidate)) for candidate in candidates]


def candidates_of(search: Search, budget: int = BUDGET, at_once: int = 1) -> list[Candidate]:
    """The candidates that a search proposes, `at_once` at a time; their outcomes are told before the next ones."""
    asked: list[Candidate] = []
    while len(asked) < budget and (new := search.ask(min(at_once, budget - len(asked)))):
        search.tell(told(new))
        asked += new
    return asked


class SearchContract:
    """Tests for a search.

    name: as in `search.algorithm`. Override `search` where yours needs another config.

    >>> class TestMySearch(SearchContract):
    ...     name = "moe_evo.searches.random_search:RandomSearch"
    """

    name = ""

    @pytest.fixture
    def algorithm(self) -> str:
        return self.name

    @pytest.fixture(params=SPACES)
    def space(self, request: pytest.FixtureRequest, algorithm: str) -> SearchSpace:
        return _space_for(algorithm, request.param)

    def search(self, algorithm: str, space: SearchSpace, seed: int = 0, evaluations: int = BUDGET) -> Search:
        return build_search(space, self.config(algorithm, seed, evaluations))

    def config(self, algorithm: str, seed: int = 0, evaluations: int = BUDGET) -> SearchConfig:
        return SearchConfig(algorithm=algorithm, seed=seed, evaluations=evaluations)

    def test_it_is_found_by_its_name_and_has_all_that_a_search_has(self, algorithm: str, space: SearchSpace) -> None:
        check_search(self.config(algorithm), space)

    def test_its_phases_are_its_budget_and_what_they_say(self, algorithm: str, space: SearchSpace) -> None:
        phases = planned_phases(self.config(algorithm), can_prune=space.can_prune)
        assert sum(phase.evaluations for phase in phases) == BUDGET
        assert all(phase.name and phase.row_title(BUDGET) for phase in phases)
        asked = candidates_of(self.search(algorithm, space))
        starts = phase_starts(phases, {one.number: one.operator for one in asked})
        for phase, start, end in zip(phases, starts, [*starts[1:], BUDGET], strict=True):
            assert not phase.only_prunes or all(one.genome.is_pruning for one in asked[start:end])

    def test_the_same_seed_gives_the_same_candidates_and_another_seed_others(
        self, algorithm: str, space: SearchSpace
    ) -> None:
        runs = [candidates_of(self.search(algorithm, space, seed)) for seed in (5, 5, 6)]
        assert runs[0] == runs[1]
        if num_prunings(space) > 10:
            assert runs[0] != runs[2]

    def test_candidates_are_numbered_in_order_and_name_earlier_ones_as_parents(
        self, algorithm: str, space: SearchSpace
    ) -> None:
        asked = candidates_of(self.search(algorithm, space))
        assert [candidate.number for candidate in asked] == list(range(len(asked)))
        for candidate in asked:
            assert candidate.operator and all(0 <= parent < candidate.number for parent in candidate.parents)

    def test_no_genome_is_proposed_twice(self, algorithm: str, space: SearchSpace) -> None:
        digests = [one.genome.digest for one in candidates_of(self.search(algorithm, space), at_once=4)]
        assert len(set(digests)) == len(digests)

    def test_a_genome_that_was_told_is_not_proposed(self, algorithm: str) -> None:
        known = Candidate(0, Genome.from_kept([[1, 3]], 5, 1), "frequency")
        search = self.search(algorithm, SPACES["tiny"])
        search.tell([Individual(known, Evaluation(0.5))])
        assert known.genome not in [candidate.genome for candidate in candidates_of(search)]

    def test_every_candidate_is_inside_the_space(self, algorithm: str, space: SearchSpace) -> None:
        for candidate in candidates_of(self.search(algorithm, space), at_once=3):
            space.check(candidate.genome)
            assert space.genome(space.genes(candidate.genome)) == candidate.genome

    def test_asking_at_once_or_one_by_one_is_the_same(self, algorithm: str, space: SearchSpace) -> None:
        together, apart = self.search(algorithm, space), self.search(algorithm, space)
        assert together.ask(25) == [candidate for _ in range(25) for candidate in apart.ask(1)]

    def test_the_order_of_telling_does_not_matter(self, algorithm: str, space: SearchSpace) -> None:
        forward, shuffled = self.search(algorithm, space), self.search(algorithm, space)
        for _ in range(6):
            asked = forward.ask(8)
            assert shuffled.ask(8) == asked
            forward.tell(told(asked))
            for index in np.random.default_rng(1).permutation(len(asked)):
                shuffled.tell(told([asked[index]]))
        assert forward.population.ranked == shuffled.population.ranked

    def test_outcomes_may_come_late_and_out_of_step(self, algorithm: str, space: SearchSpace) -> None:
        search, order = self.search(algorithm, space), np.random.default_rng(2)
        waiting: list[Candidate] = []
        for _ in range(BUDGET):
            waiting += search.ask(1)
            if len(waiting) > 5:
                search.tell(told([waiting.pop(int(order.integers(len(waiting))))]))
        search.tell(told(waiting))
        assert len(search.population) > 0

    @pytest.mark.parametrize("kind", ["ragged", "layer groups", "group-limited", "tiny", "nothing to prune", "shared"])
    def test_a_restored_search_goes_on_as_if_uninterrupted_from_every_cut(self, algorithm: str, kind: str) -> None:
        space = _space_for(algorithm, kind)
        whole = _lagging_run(self.search(algorithm, space, evaluations=30), [], 0)
        for cut in range(len(whole)):
            resumed = self.search(algorithm, space, evaluations=30)
            resumed.restore(whole[:cut])
            num_told = max(cut - 2, 0)
            resumed.tell(reversed(told(whole[:num_told])))
            assert _lagging_run(resumed, whole[:cut], num_told) == whole

    def test_phase_and_population_are_restored(self, algorithm: str, space: SearchSpace) -> None:
        search = self.search(algorithm, space)
        asked = candidates_of(search, 40)
        resumed = self.search(algorithm, space)
        resumed.restore(asked)
        resumed.tell(told(asked))
        assert resumed.phase == search.phase
        assert resumed.population.ranked == search.population.ranked

    def test_failures_are_tolerated_and_never_parents(self, algorithm: str, space: SearchSpace) -> None:
        for candidate in candidates_of(self.search(algorithm, space)):
            assert not any(parent % 7 == 3 for parent in candidate.parents)

    def test_a_search_in_which_everything_fails_still_proposes(self, algorithm: str) -> None:
        search = self.search(algorithm, SPACES["plain"])
        for _ in range(BUDGET):
            (candidate,) = search.ask(1)
            search.tell([Individual(candidate, EvaluationFailure("worker_died", "..."))])
        assert len(search.population) == 0


def _space_for(algorithm: str, name: str) -> SearchSpace:
    space = SPACES[name]
    if space.kept_bounds is not None and not has(algorithm, "varies_num_kept"):
        pytest.skip(f"{algorithm} moves no experts between layers")
    return space


def _lagging_run(search: Search, asked: list[Candidate], num_told: int) -> list[Candidate]:
    """Run a search with two candidates under way: candidate n - 2 is told before candidate n is asked."""
    while len(asked) < 30:
        if len(asked) - num_told == 2:
            search.tell(told([asked[num_told]]))
            num_told += 1
        if not (new := search.ask(1)):
            break
        asked += new
    return asked
