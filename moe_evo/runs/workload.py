"""How many evaluations a run makes on each split, and how long they take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moe_evo.config.run import RunConfig
from moe_evo.config.search import SearchConfig
from moe_evo.report.planned import Estimate
from moe_evo.runs.halving import cost
from moe_evo.searches.registry import planned_phases

MOST_ON_FRONT = 10
"""Of a longer front, those points are scored without which its hypervolume would shrink most."""


def evaluations_by_split(
    config: RunConfig, examples: Mapping[str, Sequence[int]], *, can_prune: bool
) -> dict[str, int]:
    """The most evaluations that a run makes on each split; equal genomes are not evaluated twice.

    examples: by split, how many each task has. An evaluation on some of them counts as that part of one. Recovering
    finalists counts as the part of the budget that it takes.
    """
    budget, finalists = config.search.evaluations, config.selection.finalists
    compares_random = config.selection.random_search and config.search.algorithm != "random"
    baselines = len(config.selection.baselines) if can_prune else 0
    is_merged = merges(config.search, can_prune=can_prune)
    prunes_first = any(phase.only_prunes for phase in planned_phases(config.search, can_prune=can_prune))
    searches = 1 + compares_random
    references = 1 + baselines
    observes = can_prune and bool(  # a pass of its own
        config.selection.baselines or config.search.init_methods or config.search.priors
    )
    # only merged individuals are averaged: each in turn is added to the average that starts with the best
    averages = min(finalists, budget) - 1 if config.selection.soup and is_merged else 0
    soups = int(averages > 0)
    # the winner; the best pruning, where merging came after it; the best random one; full and baselines
    rows = searches + (is_merged and prunes_first) + references + soups
    # the rows of the table that no search proposed; by another metric, all of them and the full model's fitness
    differs = config.evaluation.is_fresh or any(task.sets_search_metric for task in config.tasks)
    front = min(MOST_ON_FRONT, budget) if config.search.has_front else 0
    reported = rows + front + 1 if differs else references + soups
    recovered = config.selection.recover_finalists
    own, of_random = (
        cost(min(finalists, budget), examples["validation"], merges=one, fewest=max(recovered, 1))
        for one in (is_merged, False)
    )
    return {
        "search": math.ceil(budget * searches * _share_seen(config, examples["search"])) + observes + reported,
        "validation": own + recovered + of_random * compares_random + references + averages + front,
        "test": rows + front,
    }


def _share_seen(config: RunConfig, examples: Sequence[int]) -> float:
    """The share of the search split that one candidate is scored on. examples: of each task."""
    if not config.evaluation.is_fresh:
        return 1.0
    return sum(min(config.evaluation.sample_size, number) for number in examples) / sum(examples)


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
