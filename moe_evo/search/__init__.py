"""The search algorithms by name."""

from __future__ import annotations

from collections.abc import Callable

from moe_evo.config import Algorithm, SearchConfig
from moe_evo.search.base import Search
from moe_evo.search.eep import EEPSearch
from moe_evo.search.random_search import RandomSearch
from moe_evo.space import SearchSpace

SEARCHES: dict[Algorithm, Callable[[SearchSpace, SearchConfig], Search]] = {
    "eep": EEPSearch,
    "eep_release": EEPSearch,
    "random": lambda space, config: RandomSearch(space, config.seed),
}


def build_search(space: SearchSpace, config: SearchConfig) -> Search:
    """The search that `config.algorithm` names."""
    return SEARCHES[config.algorithm](space, config)
