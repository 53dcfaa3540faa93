"""Variation and selection: pure functions over the genomes of a `SearchSpace`.

They act on layer groups (layers that share their genes), draw from the generator they are given and
never change an argument. "EEP's table" is the table of the released search of arXiv 2407.00945
(github imagination-research/EEP at 39df572).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_evo.genomes.genome import Genome, LayerGenome, Matrix
from moe_evo.genomes.population import Individual, Population
from moe_evo.genomes.space import SearchSpace

MarginUnit = Literal["standard_errors", "fitness"]
Mask = npt.NDArray[np.bool_]

_REDRAWS = 64
_SMALLEST_ROW_SUM = 0.1


def random_pruning(space: SearchSpace, rng: np.random.Generator, *, even: bool = False) -> Genome:
    """A pruning drawn from the space (EEP's table, init): uniformly, where every layer's numbers are given.

    Otherwise the numbers are drawn first. even: all layers have the same ones.
    """
    genes = []
    kept, top_k = _drawn_numbers(space, rng, even=even)
    for group, layers in enumerate(space.layer_groups):
        keys = rng.random(space.shape.num_experts[layers[0]])
        genes.append(_keep_highest(space, keys, kept[group], top_k[group]))
    return space.genome(genes)


def narrowed(parent: Genome, space: SearchSpace, rng: np.random.Generator) -> Genome:
    """A pruning of `space` whose experts `parent` keeps too, drawn uniformly, as far as it keeps enough."""
    genes = []
    kept, top_k = _drawn_numbers(space, rng)
    for group, layers in enumerate(space.layer_groups):
        keys = rng.random(space.shape.num_experts[layers[0]])
        keys[list(parent.layers[layers[0]].kept)] += 1.0
        genes.append(_keep_highest(space, keys, kept[group], top_k[group]))
    return space.genome(genes)


def swap_mutation(
    parent: Genome,
    space: SearchSpace,
    rng: np.random.Generator,
    *,
    layer_rate: float,
    swap_rate: float,
    first_group: int = 0,
) -> Genome:
    """Give slots of a pruning other experts (EEP's table, pruning mutation).

    first_group: layer groups before it stay as they are, where a later one can change.

    Each layer group is active with probability `layer_rate`, redrawn until one is. Each slot of an
    active group takes with probability `swap_rate` an expert that no slot uses, within its expert
    group. At least one slot does, so the child differs from its parent, except in a space that holds
    nothing else: there the parent is returned.
    """
    genes = list(space.genes(parent))
    assert all(gene.is_pruning for gene in genes), "swap_mutation acts on prunings"
    swappable = [index for index, gene in enumerate(genes) if gene.num_kept < gene.num_experts]
    swappable = [index for index in swappable if index >= first_group] or swappable
    if not swappable:
        return parent
    active = np.array(swappable)[_at_least_one(len(swappable), layer_rate, rng)]
    sizes = [genes[group].num_kept for group in active]
    released = rng.random(sum(sizes)) < swap_rate
    if not released.any():  # 60-74 % of the released search's children equal their parent
        released[rng.integers(released.size)] = True
    for group, leaves in zip(active, np.split(released, np.cumsum(sizes)[:-1]), strict=True):
        if leaves.any():
            kept = np.array(genes[group].kept)
            keys = rng.random(genes[group].num_experts)  # unused experts come first, in random order,
            keys[kept] -= 1.0  # a released one stays only where no unused one is left,
            keys[kept[~leaves]] += 3.0  # and what was not released stays
            genes[group] = _keep_highest(space, keys, genes[group].num_kept, genes[group].top_k)
    return space.genome(genes)


def gaussian_mutation(
    parent: Genome,
    space: SearchSpace,
    rng: np.random.Generator,
    *,
    layer_rate: float,
    entry_rate: float,
    sigma: float,
    first_group: int = 0,
) -> Genome:
    """Add noise to entries of W_EM and W_RM (EEP's table, merging mutation).

    first_group: layer groups before it stay as they are.

    Each of the 2G matrices is active with probability `layer_rate`, redrawn until one is; each entry
    of an active matrix gets + sigma N(0, 1) with probability `entry_rate`. At least one entry changes.
    """
    genes = space.genes(parent)
    matrices = [matrix for gene in genes for matrix in (gene.expert_merging, gene.router_mapping)]
    active = 2 * first_group + np.flatnonzero(_at_least_one(len(matrices) - 2 * first_group, layer_rate, rng))
    old = np.concatenate([matrices[index].ravel() for index in active])
    chosen = rng.random(old.size) < entry_rate
    if not chosen.any():
        chosen[rng.integers(old.size)] = True
    new = (old + np.where(chosen, sigma * rng.standard_normal(old.size), 0.0)).astype(np.float32)
    if np.array_equal(new, old):  # a sigma that float32 rounds away
        first = int(chosen.argmax())
        new[first] = np.nextafter(old[first], np.float32(np.inf))
    ends = np.cumsum([matrices[index].size for index in active])[:-1]
    for index, entries in zip(active, np.split(new, ends), strict=True):
        matrices[index] = entries.reshape(matrices[index].shape)
    pairs = zip(genes, matrices[::2], matrices[1::2], strict=True)
    return space.genome([LayerGenome(merging, mapping, gene.top_k) for gene, merging, mapping in pairs])


def row_crossover(
    first: Genome,
    second: Genome,
    space: SearchSpace,
    rng: np.random.Generator,
    *,
    layer_rate: float,
    bias: float,
    first_group: int = 0,
) -> Genome:
    """Mix two genomes row by row (EEP's table, crossover).

    first_group: layer groups before it are those of `first`.

    Each matrix is active with probability `layer_rate`, redrawn until one is. An active matrix takes
    each row from `first` with probability `bias`, an inactive one is taken whole with the same
    probability. W_EM and W_RM are mixed independently, except where the layer is a pruning in both
    parents: there W_RM follows W_EM, and a slot whose expert is taken twice gets a random unused one
    of the two parents, so the child is a pruning too.
    """
    pairs = list(zip(space.genes(first), space.genes(second), strict=True))
    tied = [one.is_pruning and other.is_pruning for one, other in pairs]
    active = iter(_at_least_one(2 * len(pairs[first_group:]) - sum(tied[first_group:]), layer_rate, rng))
    genes = []
    for group, (one, other) in enumerate(pairs):
        if group < first_group:
            genes.append(one)
        elif tied[group]:
            rows = _rows_of_first(one.num_kept, bool(next(active)), bias, rng)
            genes.append(_crossed_pruning(space, one, other, rows, rng))
        else:
            merging_rows = _rows_of_first(one.num_kept, bool(next(active)), bias, rng)
            mapping_rows = _rows_of_first(one.num_kept, bool(next(active)), bias, rng)
            merging = np.where(merging_rows[:, None], one.expert_merging, other.expert_merging)
            mapping = np.where(mapping_rows[:, None], one.router_mapping, other.router_mapping)
            genes.append(LayerGenome(merging, mapping, one.top_k))
    return space.genome(genes)


def layer_crossover(
    first: Genome, second: Genome, space: SearchSpace, rng: np.random.Generator, *, bias: float, first_group: int = 0
) -> Genome:
    """Take each layer group whole, from `first` with probability `bias`, else from `second`.

    first_group: those before it are from `first`.
    """
    pairs = list(zip(space.genes(first), space.genes(second), strict=True))
    from_first = rng.random(len(pairs)) < bias
    from_first[:first_group] = True
    return space.genome([one if own else other for (one, other), own in zip(pairs, from_first, strict=True)])


def normalise_rows(genome: Genome) -> Genome:
    """Divide each row of every W_EM by its sum (EEP's table, row normalisation).

    A row whose sum is near zero stays as it is: dividing would blow its entries up.
    """
    return Genome(tuple(map(_normalised, genome.layers)))


def parent_pool(
    population: Population, margin: float, minimum: int, unit: MarginUnit = "standard_errors"
) -> tuple[Individual, ...]:
    """The individuals whose fitness is within the margin of the best, at least `minimum`, by rank.

    unit: the margin counts standard errors of the best fitness, or units of fitness. The pool depends
    on who is in the population, not on the order in which they came.
    """
    if not len(population):
        return ()
    best = population.best.evaluation
    scale = best.standard_error if unit == "standard_errors" else 1.0
    threshold = best.fitness - margin * scale - 1e-9  # 0.57 - 0.03 is above 0.54 in floating point
    return population.ranked[: max(int((population.fitness >= threshold).sum()), minimum)]


def _at_least_one(size: int, rate: float, rng: np.random.Generator) -> Mask:
    """(size,) flags that are true with probability `rate`, redrawn until one is."""
    for _ in range(_REDRAWS):
        flags = rng.random(size) < rate
        if flags.any():
            return flags
    flags[rng.integers(size)] = True  # at a rate so small, two at once would be rarer still
    return flags


def _drawn_numbers(space: SearchSpace, rng: np.random.Generator, *, even: bool = False) -> tuple[list[int], list[int]]:
    """How many experts each layer group keeps, and its top_k."""
    kept, top_k = (bounds.drawn(1, rng, even=even)[0].tolist() for bounds in (space.kept, space.active))
    return kept, top_k


def _keep_highest(space: SearchSpace, keys: npt.NDArray[np.float64], num_kept: int, top_k: int) -> LayerGenome:
    """The pruning that keeps the experts with the highest keys (E,), equally many an expert group."""
    by_group = keys.reshape(space.shape.num_expert_groups, -1)
    slots = num_kept // space.shape.num_expert_groups
    order = np.argsort(-by_group, axis=1, kind="stable")[:, :slots]
    experts = order + by_group.shape[1] * np.arange(by_group.shape[0])[:, None]
    return LayerGenome.from_kept(experts.ravel().tolist(), keys.size, top_k)


def _rows_of_first(num_rows: int, active: bool, bias: float, rng: np.random.Generator) -> Mask:
    return np.broadcast_to(rng.random(num_rows if active else 1) < bias, num_rows)


def _crossed_pruning(
    space: SearchSpace,
    one: LayerGenome,
    other: LayerGenome,
    rows: Mask,
    rng: np.random.Generator,
) -> LayerGenome:
    kept = np.array([one.kept, other.kept])
    keys = np.full(one.num_experts, -1.0)
    keys[kept] = rng.random(kept.shape)  # only the parents' experts stand in for one taken twice
    keys[np.where(rows, kept[0], kept[1])] = 2.0
    return _keep_highest(space, keys, one.num_kept, one.top_k)


def _normalised(layer: LayerGenome) -> LayerGenome:
    sums: Matrix = layer.expert_merging.sum(axis=1, keepdims=True)
    sums[np.abs(sums) < _SMALLEST_ROW_SUM] = 1.0
    return LayerGenome(layer.expert_merging / sums, layer.router_mapping, layer.top_k)
