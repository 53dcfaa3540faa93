"""Hill climbing: the best pruning so far with one expert exchanged for another."""

from __future__ import annotations

import numpy as np

from moe_evo.config.search import SearchConfig
from moe_evo.genomes.operators import random_pruning, swap_mutation
from moe_evo.genomes.population import Candidate
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import ArchiveSearch, Phase
from moe_evo.searches.enumeration import unseen_pruning

_NUM_DRAWN = 10
_TRIES = 16


class Climber(ArchiveSearch):
    """Ten random prunings, then swaps in the best; where those were all tried, any pruning that was not."""

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        super().__init__()
        self._space = space
        self._seed = config.seed

    @staticmethod
    def phases(config: SearchConfig, *, can_prune: bool) -> list[Phase]:
        num_drawn = min(_NUM_DRAWN, config.evaluations)
        return [
            Phase("random prunings", "climbed", num_drawn, only_prunes=True),
            Phase("swaps in the best", "climbed", config.evaluations - num_drawn, only_prunes=True),
        ]

    @property
    def phase(self) -> str:
        return "drawing" if self._archive.next_number < _NUM_DRAWN else "climbing"

    def _next(self) -> Candidate | None:
        number = self._archive.next_number
        rng = np.random.default_rng([self._seed, number])
        for _ in range(_TRIES):
            candidate = self._drawn(number, rng)
            if candidate.genome not in self._archive:
                return candidate
        genome = unseen_pruning(self._space, self._archive, rng)
        return None if genome is None else Candidate(number, genome, "random_pruning")

    def _drawn(self, number: int, rng: np.random.Generator) -> Candidate:
        if self.phase == "drawing" or not len(self.population):
            return Candidate(number, random_pruning(self._space, rng), "random_pruning")
        best = self.population.best
        swapped = swap_mutation(best.genome, self._space, rng, layer_rate=0.0, swap_rate=0.0)
        return Candidate(number, swapped, "swap_mutation", (best.number,))
