"""The prunings of a space, against a list of all genomes there can be."""

from __future__ import annotations

from itertools import chain, combinations, product

import pytest

from moe_evo.config.search import SearchConfig
from moe_evo.errors import GenomeError
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.enumeration import next_pruning, num_prunings
from moe_evo.searches.registry import build_search
from moe_evo.testing.searches import candidates_of, space_of

TINY = {
    "fixed": space_of([4, 3], [2, 1]),
    "shared": space_of([4] * 3, {"mean": 2, "min": 1, "max": 3}),
    "shared, expert groups": space_of([4] * 3, {"mean": 2, "min": 2, "max": 4}, expert_groups=2),
    "shared, layer groups": space_of([4] * 4, {"mean": 2, "min": 1, "max": 3}, num_layer_groups=2),
    "free": space_of([4] * 2, {"min": 1, "max": 3}),
    "top_k": space_of([4] * 2, 3, top_k=3, varies_top_k=True),
    "both": space_of([4] * 2, {"min": 2, "max": 4}, top_k=2, varies_top_k=True),
}


@pytest.fixture(params=TINY)
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return TINY[request.param]


def all_of(space: SearchSpace) -> set[Genome]:
    """Every genome that the space does not refuse."""
    found = set()
    firsts = [group[0] for group in space.layer_groups]
    layers = []
    for layer in firsts:
        experts = range(space.shape.num_experts[layer])
        kept = chain.from_iterable(combinations(experts, number) for number in range(1, len(experts) + 1))
        layers.append([(one, top_k) for one in kept for top_k in range(1, min(len(one), space.top_k[layer]) + 1)])
    for chosen in product(*layers):
        by_layer = [chosen[place] for place, group in enumerate(space.layer_groups) for _ in group]
        genome = Genome.from_kept([kept for kept, _ in by_layer], space.shape.num_experts, [k for _, k in by_layer])
        try:
            space.check(genome)
        except GenomeError:
            continue
        found.add(genome)
    return found


def test_a_walk_visits_every_pruning_once(space: SearchSpace) -> None:
    wanted = all_of(space)
    assert num_prunings(space) == len(wanted)
    genome = next(iter(wanted))
    seen = set()
    for _ in wanted:
        seen.add(genome)
        genome = next_pruning(genome, space)
    assert seen == wanted and len(seen) == len(wanted)


@pytest.mark.parametrize("algorithm", ["random", "surrogate"])
def test_a_search_finds_every_pruning_once_and_then_ends(space: SearchSpace, algorithm: str) -> None:
    wanted = all_of(space)
    search = build_search(space, SearchConfig(algorithm=algorithm, evaluations=40))
    asked = candidates_of(search, budget=len(wanted) + 5, at_once=8)
    assert len(asked) == len(wanted) and {one.genome for one in asked} == wanted
