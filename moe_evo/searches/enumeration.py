"""The prunings of a space in lexicographic order: how many there are, and which one comes next.

Random draws may miss the last few prunings of a small space; going through them in order finds them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import Archive


def num_prunings(space: SearchSpace) -> int:
    """How many different prunings the space holds."""
    expert_groups = space.shape.num_expert_groups
    firsts = [layers[0] for layers in space.layer_groups]
    return math.prod(
        math.comb(space.shape.num_experts[layer] // expert_groups, space.num_kept[layer] // expert_groups)
        ** expert_groups
        for layer in firsts
    )


def next_pruning(genome: Genome, space: SearchSpace) -> Genome:
    """The next pruning in lexicographic order; after the last comes the first."""
    genes = list(space.genes(genome))
    for group in reversed(range(len(genes))):
        gene = genes[group]
        kept = list(gene.kept)
        slots = len(kept) // space.shape.num_expert_groups
        for end in range(len(kept), 0, -slots):
            experts = space.expert_group(group, end - 1)
            part, wrapped = _next_combination(kept[end - slots : end], experts)
            kept[end - slots : end] = part
            if not wrapped:
                break
        genes[group] = LayerGenome.from_kept(kept, gene.num_experts, gene.top_k)
        if not wrapped:
            break
    return space.genome(genes)


def unseen_pruning(space: SearchSpace, archive: Archive, rng: np.random.Generator) -> Genome | None:
    """The next pruning after a random one that is not in the archive; None where the archive has all."""
    if archive.num_prunings >= num_prunings(space):
        return None
    genome = random_pruning(space, rng)
    while genome in archive:  # ends after at most len(archive) steps, as every step gives another pruning
        genome = next_pruning(genome, space)
    return genome


def _next_combination(kept: Sequence[int], experts: range) -> tuple[list[int], bool]:
    """The next subset of `experts` of the same size, and whether the order began again with the first one."""
    size = len(kept)
    for slot in reversed(range(size)):
        if kept[slot] < experts.stop - (size - slot):
            following = kept[slot] + 1
            return [*kept[:slot], *range(following, following + size - slot)], False
    return list(experts[:size]), True
