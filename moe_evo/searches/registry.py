"""The search algorithms by name, and what a config asks them to search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from moe_evo.config.search import Algorithm, SearchConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.searches.base import Search
from moe_evo.searches.eep import EEPSearch
from moe_evo.searches.random_search import RandomSearch

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


def build_space(shape: ModelShape, config: SearchConfig) -> SearchSpace:
    """The space that a config asks for on a model of this shape; raises ConfigError."""
    return SearchSpace.build(
        shape,
        num_kept=config.num_kept,
        top_k=config.top_k,
        num_layer_groups=config.num_layer_groups,
        multiple_of=config.multiple_of,
    )
