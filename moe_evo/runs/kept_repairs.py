"""Which repaired prunings may win: those that gain on the validation split, too."""

from __future__ import annotations

from moe_evo.genomes.population import Population
from moe_evo.searches.repair import REPAIR


def without_idle_repairs(validated: Population) -> Population:
    """Leave out each repair that is not better than the pruning that it repairs, by the mean of all paired differences.

    validated: individuals of one search with their fitness on the validation split. All saw the same examples, so the
    difference of two means is the mean of the paired differences. A repair whose pruning was not scored is left out.
    """
    prunings = {one.number: one.evaluation.fitness for one in validated if one.genome.is_pruning}
    kept = []
    for one in validated:
        parent = one.candidate.parents[0] if one.candidate.operator == REPAIR else None
        if parent is None or one.evaluation.fitness > prunings.get(parent, float("inf")):
            kept.append(one)
    return Population(tuple(kept))
