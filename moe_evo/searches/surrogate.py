"""A search that learns from every evaluation: a Gaussian process over prunings proposes what to score next.

Candidates come in batches. Before each, a posterior is fitted to all that was scored (posterior.py) and a pool of
prunings is made around those with the best expected scores (proposals.py). Each candidate is the best of the pool in a
draw from the posterior (Thompson sampling), so that what is not known well is tried, too. A part of the budget can go
into repair of the best pruning (repair.py).
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
from moe_evo.genomes.population import Candidate, Individual, Population
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import ArchiveSearch, Phase
from moe_evo.searches.beginning import Beginning
from moe_evo.searches.enumeration import num_prunings, unseen_pruning
from moe_evo.searches.masks import MaskSpace, Numbers
from moe_evo.searches.posterior import FeatureMaker, Features, Posterior, centre_and_scale, fit_weights
from moe_evo.searches.proposals import Places, Pool, proposals
from moe_evo.searches.repair import REPAIR, Repair

_TRIES = 32
_FEWEST_KNOWN = 8
_NUM_ELITES = 15
_MOST_FITTED = 400  # scores by which the posterior's weights are fitted
_GROWTH = 1.25  # they are fitted anew when so many times as many scores are known


class _Scored:
    """The prunings that were scored, in the order in which they were told, with all that a fit needs of them.

    numbers: of the candidates, all that were noticed. inner: (N, N), see posterior.py. scores, examples: (N,), and on
    how many examples each score rests. All but the numbers are brought up to date by `before`.
    """

    def __init__(self, masks: MaskSpace, features: FeatureMaker) -> None:
        self._masks = masks
        self._features = features
        self._given = 0
        self._waiting: list[Individual] = []
        self.numbers = np.zeros(0, dtype=np.int64)
        self.masks = masks.masks([])
        self.inner = np.zeros((0, 0))
        self.scores = np.zeros(0)
        self.examples = np.zeros(0)

    def notice(self, population: Population) -> None:
        """Take note of what has been told since the last call."""
        new = [one for one in population.individuals[self._given :] if one.genome.is_pruning]
        self._given = len(population)
        self._waiting += new
        self.numbers = np.append(self.numbers, [one.number for one in new]).astype(np.int64)

    def before(self, number: int) -> Places:
        """Places of the candidates before that number, in the order of their numbers."""
        if self._waiting:
            self._add(self._waiting)
            self._waiting = []
        order = np.argsort(self.numbers)
        return order[self.numbers[order] < number]

    def _add(self, new: Sequence[Individual]) -> None:
        self.masks = np.concatenate([self.masks, self._masks.masks([one.genome for one in new])])
        features = self._features(self.masks)
        rows = features[-len(new) :].inner(features)
        old = len(self.inner)
        self.inner = np.block([[self.inner, rows[:, :old].T], [rows[:, :old], rows[:, old:]]])
        self.scores = np.append(self.scores, [one.evaluation.fitness for one in new])
        self.examples = np.append(self.examples, [max(one.evaluation.num_examples, 1) for one in new])


@dataclass(frozen=True)
class _Batch:
    """What a batch of candidates is drawn from.

    mean, root: moments of the pool's scores. parents: by number. genomes: of the pool, as far as they are made.
    """

    pool: Pool
    mean: Numbers
    root: Numbers
    parents: Sequence[tuple[int, ...]]
    genomes: dict[int, Genome]


class SurrogateSearch(ArchiveSearch):
    """Finds prunings, and repairs the best one.

    wider: good prunings that keep more experts; every second initial candidate keeps only experts of one of them.
    seeds: the genomes of `config.init_methods`, by method, which are among the initial candidates. priors: what
    one-shot criteria think of every expert, (E,) a MoE layer, by name; how far each is right is learned. likeness: how
    alike two experts are, (E, E) a MoE layer, for repair.

    The batch of candidate n begins with candidate f <= n; n depends on the outcomes of the candidates before f.
    """

    def __init__(
        self,
        space: SearchSpace,
        config: SearchConfig,
        wider: Sequence[Genome] = (),
        seeds: Mapping[str, Genome] = MappingProxyType({}),
        priors: Mapping[str, Sequence[npt.NDArray[np.float64]]] = MappingProxyType({}),
        likeness: Sequence[npt.NDArray[np.float64]] = (),
    ) -> None:
        super().__init__()
        self.space = space
        self.options = config.surrogate
        self.num_warmup = num_warmup(config)
        self.num_pruning = config.evaluations - num_repair(config)
        self._seed = config.seed
        self._num_prunings = num_prunings(space)
        self._repairs = num_repair(config) > 0
        self._repair = Repair(
            space,
            config.seed,
            start=min(self.num_pruning, self._num_prunings),
            num_initial=min(config.surrogate.num_warmup, num_repair(config) // 2),
            size=config.surrogate.batch,
            pool=config.surrogate.pool,
            likeness=likeness,
        )
        self._masks = MaskSpace(space)
        self._features = FeatureMaker(self._masks, [priors[name] for name in sorted(priors)])
        self._beginning = Beginning(space, self.num_warmup, config.init_shares, wider, seeds)
        self._scored = _Scored(self._masks, self._features)
        self._batch: tuple[tuple[int, int], _Batch] | None = None  # the last one, by first candidate and scores known
        self._weights: dict[tuple[int, ...], Numbers] = {}  # by the candidates to which they were fitted

    @staticmethod
    def phases(config: SearchConfig, *, can_prune: bool) -> list[Phase]:
        first, repair = num_warmup(config), num_repair(config)
        phases = [
            Phase("initial prunings", "surrogate", first, only_prunes=True),
            Phase("proposed prunings", "surrogate", config.evaluations - repair - first, only_prunes=True),
        ]
        if repair:
            phases.append(Phase("repair", "surrogate, repaired", repair, own_operators=(REPAIR,)))
        return phases

    @staticmethod
    def parameters(config: SearchConfig) -> dict[str, Any]:
        """The options that a tracker records for this search, beside the config's general ones."""
        return {"surrogate": asdict(config.surrogate)}

    @property
    def phase(self) -> str:
        """'initial', 'proposed' or 'repair': what the next candidate belongs to."""
        number = self._archive.next_number
        if self._repairs and (number >= self.num_pruning or self._archive.num_prunings >= self._num_prunings):
            return "repair"
        return "initial" if number < self.num_warmup else "proposed"

    def _next(self) -> Candidate | None:
        number = self._archive.next_number
        rng = np.random.default_rng([self._seed, number])
        proposed = None
        if self.phase == "repair":
            proposed = self._repair.candidate(number, self._archive, rng)
        elif self.phase == "proposed":
            proposed = self._proposed(number, rng)
        if proposed is not None:
            return proposed
        for _ in range(_TRIES):
            candidate = self._beginning.candidate(number, self._archive, rng, partial(self._mutant, rng=rng))
            candidate = candidate or Candidate(number, random_pruning(self.space, rng), "random_pruning")
            if candidate.genome not in self._archive:
                return candidate
        genome = unseen_pruning(self.space, self._archive, rng)
        return None if genome is None else Candidate(number, genome, "random_pruning")

    def _mutant(self, genome: Genome, rng: np.random.Generator) -> Genome:
        return swap_mutation(genome, self.space, rng, layer_rate=0.25, swap_rate=0.15)

    def _proposed(self, number: int, rng: np.random.Generator) -> Candidate | None:
        """The best of the pool in a draw from the posterior; None where too little is known, or all was asked."""
        first = number - (number - self.num_warmup) % self.options.batch
        self._scored.notice(self.population)
        num_known = int((self._scored.numbers < first).sum())
        if num_known < _FEWEST_KNOWN:
            return None
        key = first, num_known
        if self._batch is None or self._batch[0] != key:
            self._batch = key, self._new_batch(first, self._scored.before(first))
        batch = self._batch[1]
        drawn = batch.mean + batch.root @ rng.standard_normal(len(batch.mean))
        for place in np.argsort(-drawn, kind="stable").tolist():
            if place not in batch.genomes:
                batch.genomes[place] = self._masks.genome(batch.pool.masks[place])
            if batch.genomes[place] not in self._archive:
                return Candidate(number, batch.genomes[place], batch.pool.operators[place], batch.parents[place])
        return None

    def _new_batch(self, first: int, known: Places) -> _Batch:
        scored = self._scored
        masks, inner, scores = scored.masks[known], scored.inner[np.ix_(known, known)], scored.scores[known]
        features = self._features(masks)
        noise = scored.examples[known].max() / scored.examples[known]
        weights = self._fitted(scored.numbers[known], inner, features, scores, noise)
        posterior = Posterior(inner, features, scores, noise, weights)
        elites = np.argsort(-posterior.of_known, kind="stable")[:_NUM_ELITES]
        rng = np.random.default_rng([self._seed, first, 1])
        pool = proposals(self._masks, posterior, masks, elites, self.options.pool, rng)
        mean, root = posterior.moments(self._features(pool.masks))
        numbers = scored.numbers[known].tolist()
        return _Batch(pool, mean, root, [tuple(numbers[place] for place in places) for places in pool.parents], {})

    def _fitted(self, numbers: Places, inner: Numbers, features: Features, scores: Numbers, noise: Numbers) -> Numbers:
        """The posterior's weights, found from a part of the scores: the first so many, which seldom changes."""
        size = _FEWEST_KNOWN
        while size * _GROWTH <= min(len(scores), _MOST_FITTED):
            size = int(size * _GROWTH)
        key = tuple(numbers[:size].tolist())
        if key not in self._weights:
            centre, scale = centre_and_scale(scores[:size])
            part = slice(size)
            scaled = (scores[part] - centre) / scale
            self._weights[key] = fit_weights(inner[part, part], features[part], scaled, noise[part])
        return self._weights[key]


def num_warmup(config: SearchConfig) -> int:
    """Candidates before the first proposed one: at most half of the prunings."""
    return min(config.surrogate.num_warmup, max((config.evaluations - num_repair(config)) // 2, 1))


def num_repair(config: SearchConfig) -> int:
    """Evaluations that go into repair: less than the budget."""
    return int(config.surrogate.repair * config.evaluations)
