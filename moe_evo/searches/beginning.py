"""The initial candidates of a search: genomes of one-shot methods and their mutants, prunings of a wider run, and
random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_evo.config.search import RANDOM
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import narrowed
from moe_evo.genomes.population import Candidate
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import Archive

Mutate = Callable[[Genome], Genome]


class Beginning:
    """What the first `num_initial` candidates are.

    shares, seeds: shares of the initial candidates by method or 'random', and the genomes of the methods. wider: good
    prunings that keep more experts; every second initial candidate keeps only experts of one of them.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_initial: int,
        shares: Mapping[str, float],
        wider: Sequence[Genome],
        seeds: Mapping[str, Genome],
    ) -> None:
        self._space = space
        self._wider = tuple(wider)
        self._seeds = dict(seeds)
        self._origins = origins(shares, num_initial)

    def candidate(self, number: int, archive: Archive, rng: np.random.Generator, mutate: Mutate) -> Candidate | None:
        """The initial candidate of this number, or None where it is one to draw at random.

        mutate: makes another genome of a method's own, if that was asked before.
        """
        if not self._space.can_prune or number >= len(self._origins):
            return None
        method = self._origins[number]
        if method in self._seeds:
            genome = self._seeds[method]
            if genome not in archive:
                return Candidate(number, genome, method)
            return Candidate(number, mutate(genome), f"{method}_mutation", (archive.number_of(genome),))
        if self._wider and number % 2 == 0:
            parent = self._wider[number // 2 % len(self._wider)]
            return Candidate(number, narrowed(parent, self._space, rng), "narrowed")
        return None


def origins(shares: Mapping[str, float], num_initial: int) -> list[str]:
    """The source of each initial candidate: methods in their order by their shares, then 'random'."""
    names = sorted(shares, key=lambda name: name == RANDOM)  # stable: only 'random' moves
    ends = np.round(np.cumsum([shares[name] for name in names]) / sum(shares.values()) * num_initial).astype(int)
    return [name for name, number in zip(names, np.diff(ends, prepend=0), strict=True) for _ in range(number)]
