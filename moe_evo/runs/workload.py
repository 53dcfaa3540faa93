"""How many evaluations a run makes on each split, and how long they take."""

from __future__ import annotations

from collections.abc import Mapping

from moe_evo.config.run import RunConfig
from moe_evo.config.search import SearchConfig
from moe_evo.report.planned import Estimate
from moe_evo.searches.registry import planned_phases


def evaluations_by_split(config: RunConfig, *, can_prune: bool) -> dict[str, int]:
    """The most evaluations that a run makes on each split; equal genomes are not evaluated twice."""
    budget, finalists = config.search.evaluations, config.selection.finalists
    compares_random = config.selection.random_search and config.search.algorithm != "random"
    baselines = len(config.selection.baselines) if can_prune else 0
    is_merged = merges(config.search, can_prune=can_prune)
    prunes_first = any(phase.only_prunes for phase in planned_phases(config.search, can_prune=can_prune))
    # the winner; the best pruning, where merging came after it; the best random one; full and baselines
    populations = 1 + (is_merged and prunes_first) + compares_random
    references = 1 + baselines
    observes = can_prune and bool(  # a pass of its own
        config.selection.baselines or config.search.init_methods or config.search.priors or config.search.repairs
    )
    # only merged individuals are averaged: each in turn is added to the average that starts with the best
    averages = (1 + prunes_first) * min(finalists, budget) - 1 if config.selection.soup and is_merged else 0
    soups = int(averages > 0)
    rows = populations + references + soups
    # the rows of the table that no search proposed; by another metric, all of them and the full model's fitness
    reported = rows + 1 if any(task.sets_search_metric for task in config.tasks) else references + soups
    return {
        "search": budget * (1 + compares_random) + observes + reported,
        "validation": populations * min(finalists, budget) + references + averages,
        "test": rows,
    }


def merges(config: SearchConfig, *, can_prune: bool) -> bool:
    """Whether the plan of the search has evaluations in a phase that does more than prune."""
    phases = planned_phases(config, can_prune=can_prune)
    return any(phase.evaluations and not phase.only_prunes for phase in phases)


def estimate(evaluations: Mapping[str, int], examples: Mapping[str, int], evaluation_s: float, gangs: int) -> Estimate:
    """Time of a run whose evaluations on the search split take `evaluation_s` seconds on one gang.

    evaluations, examples: numbers by split; the time of an evaluation is proportional to the examples of its split.
    The estimate is a lower bound: it assumes that all `gangs` gangs are busy all the time.
    """
    seconds = {
        split: number * evaluation_s * examples[split] / examples["search"] for split, number in evaluations.items()
    }
    return Estimate(
        evaluation_s=evaluation_s,
        gangs=gangs,
        evaluations_per_h=3600 * gangs / evaluation_s,
        hours={split: second / gangs / 3600 for split, second in seconds.items()},
        total_h=sum(seconds.values()) / gangs / 3600,
    )
