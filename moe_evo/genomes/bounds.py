"""`Bounds`: a number for each layer group that a search may choose, such as how many experts the group keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_TILT = 0.25  # how far layer groups differ where numbers are drawn: they go apart by about this share of their range


@dataclass(frozen=True)
class Bounds:
    """A number for each of G layer groups, from `fewest` to `most` in steps of `step`.

    total: the sum of all numbers; None where any sum is allowed.
    """

    fewest: tuple[int, ...]
    most: tuple[int, ...]
    step: int = 1
    total: int | None = None

    @classmethod
    def fixed(cls, numbers: Sequence[int]) -> Bounds:
        """The bounds that hold only these numbers."""
        return cls(tuple(numbers), tuple(numbers))

    @property
    def varies(self) -> bool:
        return self.fewest != self.most

    @cached_property
    def steps(self) -> Counts:
        """(G,) how many steps each number can be above its fewest."""
        steps: Counts = (np.array(self.most) - np.array(self.fewest)) // self.step
        return steps

    @property
    def taken(self) -> int | None:
        """How many steps all numbers together are above their fewest; None where that may differ."""
        if not self.varies:
            return 0
        return None if self.total is None else (self.total - sum(self.fewest)) // self.step

    def holds(self, numbers: Sequence[int]) -> bool:
        """Whether these G numbers are within the bounds."""
        above = [(one - low) % self.step == 0 for one, low in zip(numbers, self.fewest, strict=True)]
        inside = all(low <= one <= high for low, one, high in zip(self.fewest, numbers, self.most, strict=True))
        return inside and all(above) and self.total in (None, sum(numbers))

    def drawn(self, number: int, rng: np.random.Generator, *, even: bool = False) -> Counts:
        """(number, G) drawn at random; even: all layer groups have the same number."""
        if not self.varies:
            return np.tile(np.array(self.fewest), (number, 1))
        if even:
            return self._even(number, rng)
        keys = -np.sort(-rng.random((number, len(self.steps), int(self.steps.max()))))
        keys += rng.uniform(-_TILT, _TILT, (number, len(self.steps), 1))
        return np.array(self.fewest) + self.step * self.highest(keys, self.sums(number, rng))

    def sums(self, number: int, rng: np.random.Generator) -> Counts:
        """(number,) steps above the fewest that all layer groups together take; drawn where any sum is allowed."""
        if self.taken is not None:
            return np.full(number, self.taken)
        return rng.integers(0, int(self.steps.sum()) + 1, number)

    def highest(self, gains: Numbers, wanted: Counts) -> Counts:
        """(P, G) how many steps each layer group takes, if the `wanted` (P,) steps of most gain are taken.

        gains: (P, G, B) of the first step of a layer group, the second, ...; it must not rise from one to the next.
        Those that are not finite are not taken, nor those beyond a group's steps.
        """
        exists = np.arange(gains.shape[-1]) < self.steps[:, None]
        flat = np.where(exists & np.isfinite(gains), -gains, np.inf).reshape(len(gains), -1)
        is_taken = (places(flat) < wanted[:, None]) & np.isfinite(flat)
        taken: Counts = is_taken.reshape(gains.shape).sum(axis=-1)
        return taken

    def following(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """The next numbers in lexicographic order; after the last come the first."""
        above = [(one - low) // self.step for one, low in zip(numbers, self.fewest, strict=True)]
        most, taken = self.steps.tolist(), self.taken
        for place in reversed(range(len(above))):
            rest = None if taken is None else taken - sum(above[:place]) - above[place] - 1
            fits = rest is None or 0 <= rest <= sum(most[place + 1 :])
            if above[place] < most[place] and fits:
                above[place:] = [above[place] + 1, *_smallest(most[place + 1 :], rest)]
                break
        else:
            above = _smallest(most, taken)
        return tuple(low + self.step * one for low, one in zip(self.fewest, above, strict=True))

    def _even(self, number: int, rng: np.random.Generator) -> Counts:
        if self.total is None:
            level = rng.integers(0, int(self.steps.min()) + 1, number)[:, None]
            return np.array(self.fewest) + self.step * level
        return np.full((number, len(self.fewest)), self.total // len(self.fewest))


def _smallest(most: Sequence[int], total: int | None) -> list[int]:
    """The lexicographically first numbers from 0 to `most` with this sum."""
    found: list[int] = []
    for place in range(len(most)):
        beyond = sum(most[place + 1 :])
        found.append(0 if total is None else max(total - sum(found) - beyond, 0))
    return found


def places(values: npt.NDArray[Any]) -> Counts:
    """The place of each value in ascending order along the last axis."""
    order = values.argsort(axis=-1, kind="stable")
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.broadcast_to(np.arange(values.shape[-1]), order.shape), axis=-1)
    return found
