"""The search algorithms by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from moe_evo.genome import Genome
from moe_evo.search.base import Search
from moe_evo.search.eep import EEPSearch
from moe_evo.search.random_search import RandomSearch
from moe_evo.search_config import Algorithm, SearchConfig
from moe_evo.space import SearchSpace

SEARCHES: dict[Algorithm, Callable[[SearchSpace, SearchConfig, Sequence[Genome], Mapping[str, Genome]], Search]] = {
    "eep": EEPSearch,
    "eep_release": EEPSearch,
    "random": lambda space, config, wider, seeds: RandomSearch(space, config.seed),
}


def build_search(
    space: SearchSpace,
    config: SearchConfig,
    wider: Sequence[Genome] = (),
    seeds: Mapping[str, Genome] = MappingProxyType({}),
) -> Search:
    """The search that `config.algorithm` names.

    wider: good prunings that keep more experts than `space`, for a search that can begin from them. seeds: the
    genomes of `config.init_methods`, by name.
    """
    return SEARCHES[config.algorithm](space, config, wider, seeds)
