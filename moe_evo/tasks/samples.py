"""Samples of a split: some of its examples, by a name from which every process finds the same ones.

`search/75/12` is sample 12 of 75 examples a task of the search split. Samples with consecutive numbers have no example
in common until the split is used up; then it is divided anew. Each has about equally many examples of every label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moe_evo.tasks.examples import Example

_SEPARATOR = "/"


@dataclass(frozen=True)
class Sample:
    """Sample `number`, from 0, of `size` examples a task. scoring: one of `SCORINGS`, whose examples these are."""

    scoring: str
    size: int
    number: int

    def __str__(self) -> str:
        return _SEPARATOR.join((self.scoring, str(self.size), str(self.number)))

    @classmethod
    def read(cls, name: str) -> Sample | None:
        """The sample of this name, or None where the name is that of a whole split."""
        scoring, *numbers = name.split(_SEPARATOR)
        return cls(scoring, *map(int, numbers)) if numbers else None

    def of(self, examples: Sequence[Example]) -> list[int]:
        """The numbers of a task's examples that are in the sample, ascending: all where the task has no more."""
        if self.size >= len(examples):
            return list(range(len(examples)))
        round_, place = divmod(self.number, len(examples) // self.size)
        order = _order(tuple(one.label for one in examples), self.size, round_)
        return sorted(order[place * self.size : (place + 1) * self.size].tolist())


def scoring_of(name: str) -> str:
    """The scoring whose examples, or a sample of them, the name stands for."""
    return name.partition(_SEPARATOR)[0]


def without_number(name: str) -> str:
    """The name of a sample without its number, which is equal for samples of one size; other names as they are."""
    return name.rpartition(_SEPARATOR)[0] or name


@lru_cache(maxsize=64)  # asked again for every genome
def _order(labels: tuple[int | None, ...], size: int, round_: int) -> npt.NDArray[np.int64]:
    """A random order in which every stretch has about equally many examples of each label."""
    rng = np.random.default_rng([len(labels), size, round_])
    of_example, position = np.array([-1 if one is None else one for one in labels]), np.zeros(len(labels))
    for label in dict.fromkeys(of_example.tolist()):
        alike = np.flatnonzero(of_example == label)
        position[alike] = (rng.permutation(len(alike)) + rng.random()) / len(alike)
    return np.argsort(position, kind="stable")
