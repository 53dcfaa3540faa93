"""A search that learns from every evaluation: a Gaussian process over prunings proposes what to score next.

Candidates come in batches. Before each, a posterior is fitted to all that was scored (posterior.py) and a pool of
prunings is made around those with the best expected scores (proposals.py). Each candidate is the best of the pool in a
draw from the posterior (Thompson sampling), so that what is not known well is tried, too. With several objectives it is
the one that improves their front most (beliefs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_evo.config.search import SearchConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import random_pruning, swap_mutation
from moe_evo.genomes.population import Candidate
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import ArchiveSearch, Phase
from moe_evo.searches.beginning import Beginning
from moe_evo.searches.beliefs import Beliefs, Ranking
from moe_evo.searches.enumeration import unseen_pruning
from moe_evo.searches.fronts import survivors
from moe_evo.searches.masks import MaskSpace
from moe_evo.searches.objectives import Objectives
from moe_evo.searches.posterior import FeatureMaker
from moe_evo.searches.proposals import Pool, proposals
from moe_evo.searches.scored import FEWEST_SCORED, Places, Scored

_TRIES = 32
_NUM_ELITES, _NUM_ON_FRONT = 15, 30  # from which a pool is made: with one objective, and with several


@dataclass(frozen=True)
class _Batch:
    """What a batch of candidates is drawn from.

    parents: by number. genomes: of the pool, as far as they are made.
    """

    pool: Pool
    ranking: Ranking
    parents: Sequence[tuple[int, ...]]
    genomes: dict[int, Genome]


class SurrogateSearch(ArchiveSearch):
    """Finds prunings.

    wider: good prunings that keep more experts; every second initial candidate keeps only experts of one of them.
    seeds: the genomes of `config.init_methods`, by method, which are among the initial candidates. priors: what
    one-shot criteria think of every expert, (E,) a MoE layer, by name; what each would keep is scored first, and how
    far it is right is learned.

    The batch of candidate n begins with candidate f <= n; n depends on the outcomes of the candidates before f.
    """

    varies_num_kept = True
    has_objectives = True

    def __init__(
        self,
        space: SearchSpace,
        config: SearchConfig,
        wider: Sequence[Genome] = (),
        seeds: Mapping[str, Genome] = MappingProxyType({}),
        priors: Mapping[str, Sequence[npt.NDArray[np.float64]]] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.space = space
        self.options = config.surrogate
        self.num_warmup = num_warmup(config)
        self._seed = config.seed
        self._masks = MaskSpace(space)
        self._features = FeatureMaker(self._masks, [priors[name] for name in sorted(priors)])
        self._opinions = [(name, self._masks.by_segment(priors[name])) for name in sorted(priors)]
        self._beginning = Beginning(space, self.num_warmup, config.init_shares, wider, seeds)
        self._objectives = Objectives(config.objectives)
        self._scored = Scored(self._masks, self._features, self._objectives)
        self._batch: tuple[tuple[int, int], _Batch] | None = None  # the last one, by first candidate and scores known

    @staticmethod
    def phases(config: SearchConfig, *, can_prune: bool) -> list[Phase]:
        first = num_warmup(config)
        return [
            Phase("initial prunings", "surrogate", first, only_prunes=True),
            Phase("proposed prunings", "surrogate", config.evaluations - first, only_prunes=True),
        ]

    @staticmethod
    def parameters(config: SearchConfig) -> dict[str, Any]:
        """The options that a tracker records for this search, beside the config's general ones."""
        return {"surrogate": asdict(config.surrogate)}

    @property
    def phase(self) -> str:
        """'initial' or 'proposed': what the next candidate belongs to."""
        return "initial" if self._archive.next_number < self.num_warmup else "proposed"

    def _next(self) -> Candidate | None:
        number = self._archive.next_number
        rng = np.random.default_rng([self._seed, number])
        proposed = self._proposed(number) if self.phase == "proposed" else None
        if proposed is not None:
            return proposed
        if number < len(self._opinions) and self.space.can_prune:
            name, scores = self._opinions[number]
            liked = self._masks.genome(self._masks.best(scores[None], rng, even=True)[0])
            if liked not in self._archive:
                return Candidate(number, liked, name)
        for _ in range(_TRIES):
            candidate = self._beginning.candidate(number, self._archive, rng, partial(self._mutant, rng=rng))
            even = number % 2 == 1  # where layers may differ, what treats all alike is always among the first ones
            candidate = candidate or Candidate(number, random_pruning(self.space, rng, even=even), "random_pruning")
            if candidate.genome not in self._archive:
                return candidate
        genome = unseen_pruning(self.space, self._archive, rng)
        return None if genome is None else Candidate(number, genome, "random_pruning")

    def _mutant(self, genome: Genome, rng: np.random.Generator) -> Genome:
        return swap_mutation(genome, self.space, rng, layer_rate=0.25, swap_rate=0.15)

    def _proposed(self, number: int) -> Candidate | None:
        """The best of the pool in a draw from the posterior; None where too little is known, or all was asked."""
        first = number - (number - self.num_warmup) % self.options.batch
        self._scored.notice(self.population)
        num_known = int((self._scored.numbers < first).sum())
        if num_known < FEWEST_SCORED:
            return None
        key = first, num_known
        if self._batch is None or self._batch[0] != key:
            self._batch = key, self._new_batch(first, self._scored.before(first))
        batch = self._batch[1]
        seeds = [[self._seed, one] for one in range(first, number + 1)]
        for place in batch.ranking.order(number - first, seeds).tolist():
            if place not in batch.genomes:
                batch.genomes[place] = self._masks.genome(batch.pool.masks[place])
            if batch.genomes[place] not in self._archive:
                return Candidate(number, batch.genomes[place], batch.pool.operators[place], batch.parents[place])
        return None

    def _new_batch(self, first: int, known: Places) -> _Batch:
        masks = self._scored.masks[known]
        beliefs = Beliefs(self._scored.posteriors(known), self._objectives.known(self._masks, masks))
        elites = survivors(beliefs.expected, _NUM_ELITES if self._objectives.is_single else _NUM_ON_FRONT)
        rng = np.random.default_rng([self._seed, first, 1])
        pool = proposals(self._masks, beliefs, masks, elites, self.options.pool, rng)
        ranking = beliefs.ranking(self._features(pool.masks), self._objectives.known(self._masks, pool.masks))
        numbers = self._scored.numbers[known].tolist()
        return _Batch(pool, ranking, [tuple(numbers[place] for place in places) for places in pool.parents], {})


def num_warmup(config: SearchConfig) -> int:
    """Candidates before the first proposed one: at most half of the budget."""
    return min(config.surrogate.num_warmup, max(config.evaluations // 2, 1))
