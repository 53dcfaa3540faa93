"""Prunings of a search space as arrays of bits, so that thousands are made and compared at once.

A segment is a part of a genome in which a number of experts is kept: a layer group, or under a group-limited router
one group of its experts. Where top_k is searched, too, every layer group has one more segment: its first top_k bits are
set. Masks are (P, S, W): pruning, segment, bit; W is the size of the largest segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from moe_evo.genomes.bounds import Counts, Numbers, places
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.steps import Masks, Steps

_NUM_DRAWN = 1000  # prunings from which shares are computed where numbers vary


class MaskSpace:
    """The prunings of a space, as masks.

    space: whose prunings they are. kept, active: the segments of experts, and those of top_k, which exist only where
    it varies. sizes: (S,) bits of each segment. exists: (S, W) which bits there are.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self._firsts = [layers[0] for layers in space.layer_groups]
        self._parts = space.shape.num_expert_groups
        layers = [len(numbers) for numbers in space.layer_groups]
        self._num_segments = len(layers) * self._parts  # of experts
        self.kept = Steps(space.kept, slice(0, self._num_segments), self._parts, layers)
        self.active = Steps(space.active, slice(self._num_segments, None), 1, layers, is_ordered=True)
        self.varying = [one for one in (self.kept, self.active) if one.bounds.varies]
        sizes = np.repeat([space.shape.num_experts[layer] // self._parts for layer in self._firsts], self._parts)
        self.sizes = np.concatenate([sizes, space.active.most if self.active in self.varying else []]).astype(np.int64)
        self.exists: Masks = np.arange(self.sizes.max()) < self.sizes[:, None]
        kept = np.repeat([space.num_kept[layer] // self._parts for layer in self._firsts], self._parts)
        self._counts = np.concatenate([kept, self.sizes[self._num_segments :]])  # (S,) where nothing varies

    @property
    def num_changes(self) -> int:
        """How many experts of a pruning with even numbers can be exchanged for others at once."""
        return int(np.minimum(self._counts, self.sizes - self._counts).sum())

    @cached_property
    def shares(self) -> Numbers:
        """(S, W): how often a bit is set in a random pruning; the same for all experts of a segment."""
        counts = self._drawn_counts(_NUM_DRAWN, np.random.default_rng(0), even=False)
        shares = np.where(self.exists, (counts.mean(axis=0) / self.sizes)[:, None], 0.0)
        own = self.active.segments
        shares[own] = (np.arange(self.exists.shape[-1]) < counts[:, own, None]).mean(axis=0)
        return shares

    def masks(self, genomes: Sequence[Genome]) -> Masks:
        """(N, S, W) of prunings of this space."""
        found = np.zeros((len(genomes), *self.exists.shape), dtype=bool)
        top_ks = np.zeros((len(genomes), len(self._firsts)), dtype=np.int64)
        for number, genome in enumerate(genomes):
            kept = genome.kept
            for place, layer in enumerate(self._firsts):
                experts = np.array(kept[layer])
                size = self.sizes[place * self._parts]
                found[number, place * self._parts + experts // size, experts % size] = True
                top_ks[number, place] = genome.top_k[layer]
        if self.active in self.varying:
            found[:, self.active.segments] = np.arange(found.shape[-1]) < top_ks[..., None]
        return found

    def genome(self, mask: Masks) -> Genome:
        """The pruning with the mask (S, W)."""
        genes = []
        top_ks = mask[self.active.segments].sum(axis=-1).tolist() or self.space.active.most
        parts = np.split(mask[self.kept.segments], len(self._firsts))
        for layer, rows, top_k in zip(self._firsts, parts, top_ks, strict=True):
            size = self.space.shape.num_experts[layer] // self._parts
            kept = np.flatnonzero(rows[:, :size]).tolist()
            genes.append(LayerGenome.from_kept(kept, size * self._parts, top_k))
        return self.space.genome(genes)

    def by_segment(self, scores: Sequence[Numbers]) -> Numbers:
        """(S, W) of one score for every expert, given as (E,) a MoE layer: the mean over the layers of a group."""
        found = np.zeros(self.exists.shape)
        for place, layers in enumerate(self.space.layer_groups):
            mean = np.mean([scores[layer] for layer in layers], axis=0).reshape(self._parts, -1)
            found[place * self._parts : (place + 1) * self._parts, : mean.shape[1]] = mean
        return found

    def keep_highest(self, keys: Numbers, counts: Counts) -> Masks:
        """The prunings (P, S, W) that set `counts` (P, S) bits of each segment: those of experts with highest keys."""
        ranked = np.where(self.exists, -keys, np.inf)
        ranked[:, self.active.segments] = np.arange(keys.shape[-1])
        kept: Masks = places(ranked) < counts[..., None]
        return kept

    def best(self, keys: Numbers, rng: np.random.Generator, *, even: bool = False) -> Masks:
        """The prunings (P, S, W) of highest keys (P, S, W); how many bits are set in all is drawn where it may vary.

        even: all layer groups have the same numbers.
        """
        if even:
            return self.keep_highest(keys, self._drawn_counts(len(keys), rng, even=True))
        return self.keep_highest(keys, self._counts_by(keys, self.kept.bounds.sums(len(keys), rng), rng))

    def drawn(self, number: int, rng: np.random.Generator, *, even: bool = False) -> Masks:
        """(number, S, W) random prunings. even: all layer groups have the same numbers."""
        counts = self._drawn_counts(number, rng, even=even)
        return self.keep_highest(rng.random((number, *self.exists.shape)), counts)

    def swapped(
        self,
        masks: Masks,
        swaps: Counts,
        rng: np.random.Generator,
        worths: Numbers | None = None,
    ) -> Masks:
        """Exchange `swaps` (P,) kept experts of each pruning (P, S, W) for others of the same segment.

        worths: what each expert (P, S, W) is thought to be worth; the exchanges that gain most are made. Without it,
        any are. Fewer are made where there are no more.
        """
        keys = rng.random(masks.shape) if worths is None else worths
        leaving, entering = self._orders(masks, keys)
        entering[:, self.active.segments] = np.inf
        # what the first exchange in a segment gains, the second, ...
        gains = -np.sort(entering, axis=-1) - np.sort(leaving, axis=-1)
        if worths is None:
            gains = np.where(np.isfinite(gains), rng.random(masks.shape), -np.inf)
        flat = gains.reshape(len(masks), -1)
        made = (places(-flat) < swaps[:, None]) & np.isfinite(flat)
        number = made.reshape(masks.shape).sum(axis=-1, keepdims=True)
        swapped: Masks = (masks & (places(leaving) >= number)) | (places(entering) < number)
        return swapped

    def moved(
        self,
        masks: Masks,
        steps: Steps,
        added: Counts,
        removed: Counts,
        rng: np.random.Generator,
        worths: Numbers | None = None,
    ) -> Masks:
        """Add `added` (P,) steps to numbers of layer groups of each pruning (P, S, W), and take `removed` from others.

        steps: one of `varying`. worths: as for `swapped`; the experts of most worth come in, those of least go out.
        Fewer steps are made where a number is at its bound.
        """
        own = steps.segments
        keys = rng.random(masks.shape) if worths is None else worths
        leaving, entering = (one[:, own] for one in self._orders(masks, keys))
        below = steps.taken(masks)
        counts = []
        for order, wanted, limit in ((entering, added, steps.bounds.steps - below), (leaving, removed, below)):
            gains = rng.random((*limit.shape, int(steps.bounds.steps.max())))
            if worths is not None:
                values = np.take_along_axis(worths[:, own], order.argsort(axis=-1, kind="stable"), axis=-1)
                gains = steps.gains(values if order is entering else -values)
            gains = np.where(np.arange(gains.shape[-1]) < limit[..., None], gains, -np.inf)
            counts.append(steps.counts_of_steps(steps.bounds.highest(gains, wanted))[..., None])
        enter, leave = counts
        if steps.is_ordered:  # a bit that leaves one that enters would tear the row of bits apart
            enter, leave = np.maximum(enter - leave, 0), np.maximum(leave - enter, 0)
        changed = masks.copy()
        changed[:, own] = (masks[:, own] & (places(leaving) >= leave)) | (places(entering) < enter)
        return changed

    def crossed(self, first: Masks, second: Masks, rng: np.random.Generator) -> Masks:
        """Mix pairs of prunings (P, S, W): half of the pairs segment by segment, half expert by expert.

        Where layers share a budget, the child of the former is brought back to it by the parents' experts.
        """
        from_first = rng.random(first.shape[:2]) < 0.5
        if self.varying:  # the groups of a router's experts keep equally many
            from_first[:, : self._num_segments] = from_first[:, : self._num_segments : self._parts].repeat(
                self._parts, 1
            )
        by_segment = np.where(from_first[..., None], first, second)
        keys = rng.random(first.shape) + first.astype(np.float64) + second
        counts = self._counts[None]
        if self.varying:
            sums = [self.kept.taken(one).sum(axis=1) for one in (first, second)]
            counts = self._counts_by(keys, np.where(rng.random(len(first)) < 0.5, *sums), rng)
            counts[:, self._num_segments :] = by_segment[:, self._num_segments :].sum(axis=-1)
        by_expert = self.keep_highest(keys, counts)
        crossed = np.where(rng.random(len(first))[:, None, None] < 0.5, by_segment, by_expert)
        if self.kept not in self.varying or self.kept.bounds.taken is None:
            return crossed
        missing = self.kept.bounds.taken - self.kept.taken(crossed).sum(axis=1)
        return self.moved(crossed, self.kept, np.maximum(missing, 0), np.maximum(-missing, 0), rng, keys)

    def _orders(self, masks: Masks, keys: Numbers) -> tuple[Numbers, Numbers]:
        """(P, S, W) by which the bits leave, those of the lowest keys first, and by which the others enter."""
        leaving = np.where(masks, keys, np.inf)
        entering = np.where(masks | ~self.exists, np.inf, -keys)
        if self.active in self.varying:
            own, order = self.active.segments, np.arange(keys.shape[-1])
            leaving[:, own] = np.where(masks[:, own], -order, np.inf)
            entering[:, own] = np.where(masks[:, own] | ~self.exists[own], np.inf, order)
        return leaving, entering

    def _drawn_counts(self, number: int, rng: np.random.Generator, *, even: bool) -> Counts:
        """(number, S) bits set in each segment, drawn at random."""
        if not self.varying:
            return self._counts[None]
        drawn = [one.counts(one.bounds.drawn(number, rng, even=even)) for one in (self.kept, self.active)]
        return np.concatenate(drawn, axis=1)[:, : len(self.sizes)]

    def _counts_by(self, keys: Numbers, sums: Counts, rng: np.random.Generator) -> Counts:
        """(P, S) bits set in each segment, where the highest keys are taken; sums: (P,) steps of the numbers kept."""
        keys = np.where(self.exists, keys, -np.inf)
        counts = np.broadcast_to(self._counts, keys.shape[:2]).copy()
        for one in self.varying:
            taken = sums if one is self.kept else one.bounds.sums(len(keys), rng)
            counts[:, one.segments] = one.highest(keys[:, one.segments], taken)
        return counts
