"""The prunings of a space in lexicographic order: how many there are, and which one comes next.

The order is by how many experts each layer keeps, then by top_k, then by experts. Random draws may miss the last few
prunings of a small space; going through them in order finds them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import Archive


@cache
def num_prunings(space: SearchSpace) -> int:
    """How many different prunings the space holds; two that differ in top_k alone are different, too."""
    kept, active = space.kept, space.active
    taken = kept.taken
    ways = np.array([1], dtype=object)  # by steps that the layer groups so far take: Python's integers are exact
    for group, layers in enumerate(space.layer_groups):
        numbers = range(kept.fewest[group], kept.most[group] + 1, kept.step)
        size = space.shape.num_experts[layers[0]]
        own = np.array([_choices(size, number, space.shape.num_expert_groups) for number in numbers], dtype=object)
        ways = np.convolve(ways, own)[: None if taken is None else taken + 1]
    by_top_k = math.prod(most - low + 1 for low, most in zip(active.fewest, active.most, strict=True))
    return int(ways.sum() if taken is None else ways[taken]) * by_top_k


def next_pruning(genome: Genome, space: SearchSpace) -> Genome:
    """The next pruning in lexicographic order; after the last comes the first."""
    genes = list(space.genes(genome))
    for group in reversed(range(len(genes))):
        gene, size = genes[group], space.shape.num_experts[space.layer_groups[group][0]]
        kept, wrapped = _next_experts(gene.kept, size, space.shape.num_expert_groups)
        genes[group] = LayerGenome.from_kept(kept, size, gene.top_k)
        if not wrapped:
            return space.genome(genes)
    top_k, kept_now = tuple(gene.top_k for gene in genes), tuple(gene.num_kept for gene in genes)
    following = space.active.following(top_k)
    if following <= top_k:  # the order of top_k began again
        kept_now = space.kept.following(kept_now)
    return _first_with(space, kept_now, following)


def unseen_pruning(space: SearchSpace, archive: Archive, rng: np.random.Generator) -> Genome | None:
    """The next pruning after a random one that is not in the archive; None where the archive has all."""
    if archive.num_prunings >= num_prunings(space):
        return None
    genome = random_pruning(space, rng)
    while genome in archive:  # ends after at most len(archive) steps, as every step gives another pruning
        genome = next_pruning(genome, space)
    return genome


def _choices(num_experts: int, num_kept: int, expert_groups: int) -> int:
    """In how many ways a layer keeps so many experts, equally many of each expert group."""
    choices: int = math.comb(num_experts // expert_groups, num_kept // expert_groups) ** expert_groups
    return choices


def _first_with(space: SearchSpace, num_kept: Sequence[int], top_k: Sequence[int]) -> Genome:
    """The first pruning in which the layer groups keep so many experts."""
    parts = space.shape.num_expert_groups
    genes = []
    for layers, number, active in zip(space.layer_groups, num_kept, top_k, strict=True):
        size = space.shape.num_experts[layers[0]]
        experts = [part * size // parts + slot for part in range(parts) for slot in range(number // parts)]
        genes.append(LayerGenome.from_kept(experts, size, active))
    return space.genome(genes)


def _next_experts(kept: Sequence[int], num_experts: int, expert_groups: int) -> tuple[list[int], bool]:
    """The next experts of a layer, and whether the order began again with the first ones."""
    following, slots, size = list(kept), len(kept) // expert_groups, num_experts // expert_groups
    for part in reversed(range(expert_groups)):
        own = slice(part * slots, (part + 1) * slots)
        following[own], wrapped = _next_combination(kept[own], range(part * size, (part + 1) * size))
        if not wrapped:
            return following, False
    return following, True


def _next_combination(kept: Sequence[int], experts: range) -> tuple[list[int], bool]:
    """The next subset of `experts` of the same size, and whether the order began again with the first one."""
    size = len(kept)
    for slot in reversed(range(size)):
        if kept[slot] < experts.stop - (size - slot):
            following = kept[slot] + 1
            return [*kept[:slot], *range(following, following + size - slot)], False
    return list(experts[:size]), True
