"""Which repaired prunings may win: those that gain on the validation split, too."""

from __future__ import annotations

from collections.abc import Sequence

from moe_evo.genomes.population import Individual, Population
from moe_evo.searches.repair import REPAIR


def with_their_prunings(finalists: Sequence[Individual], population: Population) -> list[Individual]:
    """The finalists and the prunings of their repairs, with which those are compared."""
    there = {one.number for one in finalists}
    missing = {parent for one in finalists if _is_repair(one) for parent in one.candidate.parents} - there
    return [*finalists, *(one for one in population if one.number in missing)]


def without_idle_repairs(validated: Sequence[Individual]) -> list[Individual]:
    """Leave out each repair that is not better than the pruning that it repairs, by the mean of all paired differences.

    validated: individuals of one search with their fitness on the validation split. All saw the same examples, so the
    difference of two means is the mean of the paired differences. A repair whose pruning was not scored is left out.
    """
    prunings = {one.number: one.evaluation.fitness for one in validated if one.genome.is_pruning}
    return [
        one
        for one in validated
        if not _is_repair(one) or one.evaluation.fitness > prunings.get(one.candidate.parents[0], float("inf"))
    ]


def _is_repair(individual: Individual) -> bool:
    return individual.candidate.operator == REPAIR
