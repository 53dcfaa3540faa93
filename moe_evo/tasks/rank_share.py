"""One rank's share of the examples, in as many batches as every other rank has.

Ranks that divide examples among them must still run equally many forward passes, so that the one with
the fewest batches repeats one and drops what comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from moe_evo.tasks.base import Batch

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class RankShare(Generic[B]):
    """batches: what this rank runs, in order. num_counted: only the first so many are of its share."""

    batches: tuple[B, ...]
    num_counted: int


def rank_share(
    rank: int, size: int, numbers: Sequence[int], make: Callable[[Sequence[int]], Sequence[B]]
) -> RankShare[B]:
    """Every size-th of the examples `numbers`, from the rank-th on, in the batches that `make` makes of them."""
    of_ranks = [tuple(make(numbers[first::size])) for first in range(size)]
    own = of_ranks[rank]
    num_missing = max(map(len, of_ranks)) - len(own)
    repeated = (own or tuple(make(numbers[:1])))[:1]
    return RankShare(own + repeated * num_missing, len(own))
