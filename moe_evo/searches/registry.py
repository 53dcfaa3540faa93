"""The search algorithms by name, the phases that each plans, and the search space that a config asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_evo.config.search import ACTIVE, RANDOM, SearchConfig
from moe_evo.errors import ConfigError
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.plugins import Registry, lacking
from moe_evo.searches.base import Phase, Search
from moe_evo.searches.eep import EEPSearch
from moe_evo.searches.random_search import RandomSearch
from moe_evo.searches.surrogate import SurrogateSearch

SearchMaker = Callable[..., Search]
"""A class or function that makes a `Search` from (space, config), and from what else of `build_search` it takes."""

_OPTION = "search.algorithm"
_MEMBERS = ("population", "phase", "ask", "tell", "restore")


def _problem(make: Any) -> str | None:
    try:
        signature(make).bind("space", "config")
    except (TypeError, ValueError):
        return f"got {make!r}, expected a class or function of (space, config)"
    return None


SEARCHES: Registry[SearchMaker] = Registry(
    "search",
    ["moe_evo.searches"],
    {
        "eep": EEPSearch,
        "eep_release": EEPSearch,
        "random": RandomSearch,
        "surrogate": SurrogateSearch,
    },
    _problem,
)


def check_search(config: SearchConfig, space: SearchSpace | None = None) -> None:
    """Raise ConfigError where no search has the name in `config`, or where it does not support the config's options.

    space: if given, the search is constructed once, to check that it has every method of `Search`.
    """
    SEARCHES.get(config.algorithm, _OPTION)
    if config.init_methods and not begins_from(config.algorithm, "seeds"):
        raise ConfigError(
            f"search.init: got {config.init!r}, expected {RANDOM!r} alone: {config.algorithm} begins from no genomes"
        )
    if config.warm_start is not None and not begins_from(config.algorithm, "wider"):
        raise ConfigError(
            f"search.warm_start: got {config.warm_start!r}, expected none: {config.algorithm} begins from no prunings"
        )
    if isinstance(config.num_kept, dict) and not has(config.algorithm, "varies_num_kept"):
        raise ConfigError(
            f"search.num_kept: got {config.num_kept!r}, expected a number or a list: {config.algorithm} moves no "
            f"experts between layers; use one of {_those_that('varies_num_kept')}"
        )
    if config.has_front and not has(config.algorithm, "has_objectives"):
        raise ConfigError(
            f"search.objectives: got {config.objectives!r}, expected [quality]: {config.algorithm} has one objective; "
            f"use one of {_those_that('has_objectives')}"
        )
    if space is not None:
        problem = lacking(build_search(space, config), _MEMBERS, "moe_evo.searches.base.Search")
        if problem is not None:
            raise ConfigError(f"{_OPTION}: {config.algorithm!r} makes no search: {problem}")


def build_search(
    space: SearchSpace,
    config: SearchConfig,
    wider: Sequence[Genome] = (),
    seeds: Mapping[str, Genome] = MappingProxyType({}),
    priors: Mapping[str, Sequence[npt.NDArray[np.float64]]] = MappingProxyType({}),
) -> Search:
    """The search that `config.algorithm` names.

    wider: good prunings that keep more experts than `space`, for a search that can begin from them. seeds: the
    genomes of `config.init_methods`, by name. priors: scores of every expert, (E,) a MoE layer, by one-shot criterion.
    A search that takes no such argument does not get it.
    """
    offered = {"wider": wider, "seeds": seeds, "priors": priors}
    taken = {name: given for name, given in offered.items() if begins_from(config.algorithm, name)}
    return SEARCHES.get(config.algorithm, _OPTION)(space, config, **taken)


def begins_from(algorithm: str, given: str) -> bool:
    """Whether a search takes the argument `given` of `build_search`: 'wider', 'seeds' or 'priors'."""
    return given in signature(SEARCHES[algorithm]).parameters


def has(algorithm: str, ability: str) -> bool:
    """Whether a search has an optional ability, which is an attribute of it that is true."""
    return getattr(SEARCHES[algorithm], ability, False) is True


def _those_that(ability: str) -> str:
    """The searches of this package that have an ability."""
    return ", ".join(f"search.algorithm {name}" for name in SEARCHES if has(name, ability))


def planned_phases(config: SearchConfig, *, can_prune: bool) -> list[Phase]:
    """The phases of the search that a config names, in order.

    A search without a method `phases`, or one that is not installed on this machine, has one phase with its own name.
    can_prune: whether fewer experts are kept than there are.
    """
    plan = _told_by(config, "phases")
    name = config.algorithm.rpartition(":")[2]
    return [Phase(name, name, config.evaluations)] if plan is None else list(plan(config, can_prune=can_prune))


def search_parameters(config: SearchConfig) -> dict[str, Any]:
    """The options that a tracker records for a search, beside the config's general ones."""
    tell = _told_by(config, "parameters")
    return {} if tell is None else dict(tell(config))


def _told_by(config: SearchConfig, name: str) -> Callable[..., Any] | None:
    """The optional method `name` of the search that a config names, or None where it has none."""
    try:
        found: Callable[..., Any] | None = getattr(SEARCHES.get(config.algorithm), name, None)
    except ConfigError:
        return None
    return found


def build_space(shape: ModelShape, config: SearchConfig) -> SearchSpace:
    """The space that a config asks for on a model of this shape; raises ConfigError."""
    return SearchSpace.build(
        shape,
        num_kept=config.num_kept,
        top_k=config.top_k,
        num_layer_groups=config.num_layer_groups,
        multiple_of=config.multiple_of,
        varies_top_k=ACTIVE in config.objectives,
    )
