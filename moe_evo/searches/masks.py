"""Prunings of a search space as arrays of bits, so that thousands are made and compared at once.

A segment is a part of a genome in which a fixed number of experts is kept: a layer group, or under a group-limited
router one group of its experts. Masks are (P, S, W): pruning, segment, expert; W is the size of the largest segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import SearchSpace

Masks = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float64]


class MaskSpace:
    """The prunings of a space, as masks.

    sizes, kept: (S,) experts of each segment, and how many of them are kept. exists: (S, W) which places are experts.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._firsts = [layers[0] for layers in space.layer_groups]
        self._parts = space.shape.num_expert_groups
        self.sizes = np.repeat([space.shape.num_experts[layer] // self._parts for layer in self._firsts], self._parts)
        self.kept = np.repeat([space.num_kept[layer] // self._parts for layer in self._firsts], self._parts)
        self.exists: Masks = np.arange(self.sizes.max()) < self.sizes[:, None]

    @property
    def num_changes(self) -> int:
        """How many kept experts can be exchanged for others at once."""
        return int(np.minimum(self.kept, self.sizes - self.kept).sum())

    @property
    def shares(self) -> Numbers:
        """(S, W): how often an expert is kept in a random pruning."""
        return np.where(self.exists, (self.kept / self.sizes)[:, None], 0.0)

    def masks(self, genomes: Sequence[Genome]) -> Masks:
        """(N, S, W) of prunings of this space."""
        found = np.zeros((len(genomes), *self.exists.shape), dtype=bool)
        for number, genome in enumerate(genomes):
            for place, layer in enumerate(self._firsts):
                experts = np.array(genome.layers[layer].kept)
                size = self.sizes[place * self._parts]
                found[number, place * self._parts + experts // size, experts % size] = True
        return found

    def genome(self, mask: Masks) -> Genome:
        """The pruning with the mask (S, W)."""
        genes = []
        for layer, rows in zip(self._firsts, np.split(mask, len(self._firsts)), strict=True):
            size = self._space.shape.num_experts[layer] // self._parts
            kept = np.flatnonzero(rows[:, :size]).tolist()
            genes.append(LayerGenome.from_kept(kept, size * self._parts, self._space.top_k[layer]))
        return self._space.genome(genes)

    def by_segment(self, scores: Sequence[Numbers]) -> Numbers:
        """(S, W) of one score for every expert, given as (E,) a MoE layer: the mean over the layers of a group."""
        found = np.zeros(self.exists.shape)
        for place, layers in enumerate(self._space.layer_groups):
            mean = np.mean([scores[layer] for layer in layers], axis=0).reshape(self._parts, -1)
            found[place * self._parts : (place + 1) * self._parts, : mean.shape[1]] = mean
        return found

    def keep_highest(self, keys: Numbers) -> Masks:
        """The prunings (P, S, W) that keep the experts with the highest keys (P, S, W) of each segment."""
        kept: Masks = _places(np.where(self.exists, -keys, np.inf)) < self.kept[:, None]
        return kept

    def drawn(self, number: int, rng: np.random.Generator) -> Masks:
        """(number, S, W) prunings drawn uniformly."""
        return self.keep_highest(rng.random((number, *self.exists.shape)))

    def swapped(
        self,
        masks: Masks,
        swaps: npt.NDArray[np.int64],
        rng: np.random.Generator,
        worths: Numbers | None = None,
    ) -> Masks:
        """Exchange `swaps` (P,) kept experts of each pruning (P, S, W) for others of the same segment.

        worths: what each expert (P, S, W) is thought to be worth; the exchanges that gain most are made. Without it,
        any are. Fewer are made where there are no more.
        """
        keys = rng.random(masks.shape) if worths is None else worths
        leaving = np.where(masks, keys, np.inf)  # the least worth leaves first,
        entering = np.where(masks | ~self.exists, np.inf, -keys)  # and the most worth enters first
        # what the first exchange in a segment gains, the second, ...
        gains = -np.sort(entering, axis=-1) - np.sort(leaving, axis=-1)
        if worths is None:
            gains = np.where(np.isfinite(gains), rng.random(masks.shape), -np.inf)
        flat = gains.reshape(len(masks), -1)
        made = (_places(-flat) < swaps[:, None]) & np.isfinite(flat)
        number = made.reshape(masks.shape).sum(axis=-1, keepdims=True)
        swapped: Masks = (masks & (_places(leaving) >= number)) | (_places(entering) < number)
        return swapped

    def crossed(self, first: Masks, second: Masks, rng: np.random.Generator) -> Masks:
        """Mix pairs of prunings (P, S, W): half of the pairs segment by segment, half expert by expert."""
        by_segment = np.where(rng.random(first.shape[:2])[..., None] < 0.5, first, second)
        by_expert = self.keep_highest(rng.random(first.shape) + first.astype(np.float64) + second)
        return np.where(rng.random(len(first))[:, None, None] < 0.5, by_segment, by_expert)


def _places(values: Numbers) -> npt.NDArray[np.int64]:
    """The place of each value in ascending order along the last axis."""
    order = values.argsort(axis=-1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(values.shape[-1]), order.shape), axis=-1)
    return places
