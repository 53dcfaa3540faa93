"""How many examples finalists see: sequential halving in numbers, without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

_FEWEST_EXAMPLES = 25  # of a task, in a part of the validation split
_PART = 4  # a part is a quarter of the split
_FEWEST_HALVED = 4


def num_parts(num_finalists: int, num_examples: Sequence[int]) -> int:
    """On how many parts of the validation split the finalists are halved, before the rest sees all of it.

    num_examples: of the validation split of each task.
    """
    if num_finalists < _FEWEST_HALVED or min(num_examples) < _PART * _FEWEST_EXAMPLES:
        return 0
    return 2


def cost(num_finalists: int, num_examples: Sequence[int], *, merges: bool, fewest: int = 1) -> int:
    """How many evaluations on the whole validation split the choice among finalists takes, at most.

    merges: whether there are merged genomes, so that the best pruning may stay beside the better half. fewest: how many
    stay at least.
    """
    seen, left = 0.0, num_finalists
    for _ in range(num_parts(num_finalists, num_examples)):
        seen += left / _PART
        left = min(left, max((left + 1) // 2, fewest) + merges)
    return math.ceil(seen) + left


def part_size(num_examples: Sequence[int]) -> int:
    """Examples a task in a part."""
    return min(num_examples) // _PART
