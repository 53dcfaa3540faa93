"""`Steps`: the numbers that a search space gives its layer groups, read from masks and turned into counts of bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_evo.genomes.bounds import Bounds, Counts, Numbers

Masks = npt.NDArray[np.bool_]


class Steps:
    """How many bits are set in the segments of G layer groups, of which `parts` (S / G) segments belong to each.

    segments: where they stand among all segments of a mask. layers: how many MoE layers each layer group has.
    is_ordered: the bits of a segment are set one after the other.
    """

    def __init__(
        self, bounds: Bounds, segments: slice, parts: int, layers: Sequence[int], *, is_ordered: bool = False
    ) -> None:
        self.bounds = bounds
        self.segments = segments
        self.is_ordered = is_ordered
        self._parts = parts
        self._layers = np.array(layers)
        self._fewest = np.array(bounds.fewest)
        self._bits = bounds.step // parts if bounds.varies else 0  # of a segment, in one step

    def counts(self, numbers: Counts) -> Counts:
        """(P, S) bits set in each segment, where the layer groups have the numbers (P, G)."""
        return np.repeat(numbers // self._parts, self._parts, axis=1)

    def counts_of_steps(self, steps: Counts) -> Counts:
        """(P, S) bits in the steps (P, G)."""
        return np.repeat(steps * self._bits, self._parts, axis=1)

    def numbers(self, masks: Masks) -> Counts:
        """(P, G) of masks (P, all segments, W)."""
        set_bits = masks[:, self.segments].sum(axis=-1)
        numbers: Counts = set_bits.reshape(len(masks), len(self._layers), -1).sum(axis=-1)
        return numbers

    def taken(self, masks: Masks) -> Counts:
        """(P, G) how many steps each number is above its fewest."""
        taken: Counts = (self.numbers(masks) - self._fewest) // self.bounds.step
        return taken

    def totals(self, masks: Masks) -> Numbers:
        """(P,) sums of the numbers over all MoE layers."""
        totals: Numbers = (self.numbers(masks) @ self._layers).astype(np.float64)
        return totals

    def highest(self, keys: Numbers, sums: Counts) -> Counts:
        """(P, S) bits set in each segment, where the steps of highest keys (P, S, W) are taken, `sums` (P,) in all."""
        values = keys if self.is_ordered else -np.sort(-keys, axis=-1)
        first = self._fewest.repeat(self._parts) // self._parts
        steps = self.bounds.highest(self.gains(values, first), sums)
        return self.counts(self._fewest + self.bounds.step * steps)

    def gains(self, values: Numbers, first: Counts | int = 0) -> Numbers:
        """(P, G, B) what each step gains, one after the other.

        values: (P, S, W) of the bits in the order in which they are set. first: (S,) the first bit of the first step.
        A step gains at most what the one before it did.
        """
        most, size = int(self.bounds.steps.max()), values.shape[-1]
        places = np.atleast_1d(first)[:, None] + np.arange(most * self._bits)
        padded = np.concatenate([values, np.full((*values.shape[:-1], 1), -np.inf)], axis=-1)
        places = np.broadcast_to(np.minimum(places, size), (*values.shape[:-1], places.shape[-1]))
        bits = np.take_along_axis(padded, places, axis=-1)
        by_group = bits.reshape(len(values), len(self._layers), self._parts, most, self._bits)
        gains: Numbers = np.minimum.accumulate(by_group.sum(axis=(2, 4)), axis=-1)
        return gains
