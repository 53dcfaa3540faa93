"""The search algorithms by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_evo.genome import Genome
from moe_evo.search.base import Search
from moe_evo.search.eep import EEPSearch
from moe_evo.search.random_search import RandomSearch
from moe_evo.search_config import Algorithm, SearchConfig
from moe_evo.space import SearchSpace

SEARCHES: dict[Algorithm, Callable[[SearchSpace, SearchConfig, Sequence[Genome]], Search]] = {
    "eep": EEPSearch,
    "eep_release": EEPSearch,
    "random": lambda space, config, wider: RandomSearch(space, config.seed),
}


def build_search(space: SearchSpace, config: SearchConfig, wider: Sequence[Genome] = ()) -> Search:
    """The search that `config.algorithm` names.

    wider: good prunings that keep more experts than `space`, for a search that can begin from them.
    """
    return SEARCHES[config.algorithm](space, config, wider)
