"""Random search: prunings drawn uniformly without repeats, the baseline for every evolutionary search."""

from __future__ import annotations

import numpy as np

from moe_evo.config.search import SearchConfig
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.population import Candidate
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import ArchiveSearch, Phase
from moe_evo.searches.enumeration import unseen_pruning

_TRIES = 32


class RandomSearch(ArchiveSearch):
    """Best of N: every candidate is a random pruning, until the space holds no other."""

    varies_num_kept = True
    has_objectives = True

    def __init__(self, space: SearchSpace, config: SearchConfig) -> None:
        super().__init__()
        self.space = space
        self._seed = config.seed

    @staticmethod
    def phases(config: SearchConfig, *, can_prune: bool) -> list[Phase]:
        return [Phase("random prunings", "random, best of {evaluations}", config.evaluations, only_prunes=True)]

    @property
    def phase(self) -> str:
        return "random"

    def _next(self) -> Candidate | None:
        number = self._archive.next_number
        rng = np.random.default_rng([self._seed, number])
        draws = (random_pruning(self.space, rng) for _ in range(_TRIES))
        genome = next((one for one in draws if one not in self._archive), None)
        genome = genome or unseen_pruning(self.space, self._archive, rng)
        return None if genome is None else Candidate(number, genome, "random_pruning")
