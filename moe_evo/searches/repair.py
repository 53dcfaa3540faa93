"""Repair of a good pruning: each kept expert gets a scale, and a share of the dropped expert that is most like it.

Two numbers a kept expert, not a whole row of `expert_merging`, so that some hundred evaluations are enough to learn
which numbers are good: from a Gaussian process over them (smooth.py). The router is not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_evo.genomes.bounds import Numbers
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Individual, Population
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import Archive
from moe_evo.searches.smooth import SmoothPosterior

REPAIR = "repair"
"""The operator of every candidate that repairs a pruning, which is its parent."""

_SCALE_STEP = 0.07  # logarithm of an expert's scale at a number of 1; its output is about cubic in its weights
_SHARE_STEP = 0.08  # share of the other expert at a number of 1
_LARGEST_SHARE = 0.9  # the kept expert stays the dominant one
_FEWEST_KNOWN = 8
_NUM_ELITES = 5
_SHARES = (0.5, 0.25)  # of the proposals: steps from an elite at random, steps uphill; the rest is between two elites
_STEPS, _CLIMB, _NEAR, _AROUND = (0.1, 0.3, 0.6), 0.7, 0.1, 0.2  # their lengths


class Repairs:
    """The repairs of one pruning as vectors of numbers (D,), one or two a kept expert; 0 is the pruning itself.

    likeness: how alike two experts are, (E, E) a MoE layer; without it the dropped experts are dealt out in order.
    Where a layer keeps all experts, there are none to take in.
    """

    def __init__(self, space: SearchSpace, pruning: Genome, likeness: Sequence[Numbers] = ()) -> None:
        self._space = space
        self._genes = space.genes(pruning)
        self._partners: list[list[int]] = []
        for layers, gene in zip(space.layer_groups, self._genes, strict=True):
            alike = np.mean([likeness[layer] for layer in layers], axis=0) if len(likeness) else None
            self._partners.append(_partners(gene, alike))
        sizes = [(gene.num_kept, len(own)) for gene, own in zip(self._genes, self._partners, strict=True)]
        self._ends = np.cumsum(np.ravel(sizes))
        self.size = int(self._ends[-1])

    def genome(self, numbers: Numbers) -> Genome:
        """The pruning with numbers (D,): scales of a layer's kept experts, then their shares, and so on."""
        parts = iter(np.split(numbers, self._ends[:-1]))
        genes = []
        for gene, partners in zip(self._genes, self._partners, strict=True):
            scales, shares = np.exp(_SCALE_STEP * next(parts)), _SHARE_STEP * next(parts)
            merging = gene.expert_merging.astype(np.float64)
            merging[np.arange(len(partners)), partners] = np.clip(shares, -_LARGEST_SHARE, _LARGEST_SHARE)
            scaled = (scales[:, None] * merging).astype(np.float32)
            genes.append(LayerGenome(scaled, gene.router_mapping, gene.top_k))
        return self._space.genome(genes)

    def numbers(self, genome: Genome) -> Numbers:
        """The inverse of `genome`, up to rounding."""
        found = []
        for gene, old, partners in zip(self._space.genes(genome), self._genes, self._partners, strict=True):
            merging, slots = gene.expert_merging.astype(np.float64), np.arange(gene.num_kept)
            scales = merging[slots, list(old.kept)]
            found.append(np.log(scales) / _SCALE_STEP)
            found.append((merging / scales[:, None])[slots[: len(partners)], partners] / _SHARE_STEP)
        return np.concatenate(found)


def _partners(gene: LayerGenome, alike: Numbers | None) -> list[int]:
    """For each slot the dropped expert most like the kept one, or none for any slot where no expert is dropped."""
    dropped = [expert for expert in range(gene.num_experts) if expert not in gene.kept]
    if not dropped:
        return []
    if alike is None:
        return [dropped[slot % len(dropped)] for slot in range(gene.num_kept)]
    return [dropped[int(alike[expert, dropped].argmax())] for expert in gene.kept]


@dataclass(frozen=True)
class _Batch:
    """What a batch of candidates is drawn from.

    parent: the pruning that is repaired, which has these repairs. asked: (P, D) of them among which each candidate is
    chosen; mean and root are moments of their scores. P is 0 where too little is known to choose.
    """

    parent: Individual
    repairs: Repairs
    asked: Numbers
    mean: Numbers
    root: Numbers


class Repair:
    """Proposes repairs of the best pruning.

    start: number of the first repair. num_initial: repairs that are drawn at random first. size: candidates between
    two fits. pool: repairs among which each candidate is chosen. likeness: see `Repairs`. The batch of candidate n
    begins with candidate f <= n; n depends on the outcomes of the candidates before f.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int,
        *,
        start: int,
        num_initial: int,
        size: int,
        pool: int,
        likeness: Sequence[Numbers] = (),
    ) -> None:
        self._space, self._seed, self._likeness = space, seed, likeness
        self._start, self._num_initial, self._size, self._pool = start, num_initial, size, pool
        self._batch: tuple[tuple[int, int], _Batch] | None = None  # the last one, by first candidate and scores known

    def candidate(self, number: int, archive: Archive, rng: np.random.Generator) -> Candidate | None:
        """The repair with this number; None where no pruning is known."""
        first = number - (number - self._start) % self._size
        known = [one for one in archive.population if one.number < first]
        key = first, len(known)
        if self._batch is None or self._batch[0] != key:
            prunings = Population(tuple(known)).prunings.complete
            if not len(prunings):
                return None
            self._batch = key, self._new_batch(first, prunings.best, known)
        batch = self._batch[1]
        parents = (batch.parent.number,)
        drawn = batch.mean + batch.root @ rng.standard_normal(len(batch.mean))
        for place in np.argsort(-drawn, kind="stable").tolist():
            genome = batch.repairs.genome(batch.asked[place])
            if genome not in archive:
                return Candidate(number, genome, REPAIR, parents)
        return Candidate(number, batch.repairs.genome(rng.standard_normal(batch.repairs.size)), REPAIR, parents)

    def _new_batch(self, first: int, parent: Individual, known: Sequence[Individual]) -> _Batch:
        repairs = Repairs(self._space, parent.genome, self._likeness)
        # those of another pruning, which was the best before, tell nothing of this one
        own = [one for one in known if one.candidate.operator == REPAIR and one.candidate.parents == (parent.number,)]
        own = sorted([parent, *own], key=lambda one: one.number)
        if first - self._start < self._num_initial or len(own) < _FEWEST_KNOWN:
            return _Batch(parent, repairs, np.zeros((0, repairs.size)), np.zeros(0), np.zeros((0, 0)))
        numbers = np.array([repairs.numbers(one.genome) for one in own])
        scores = np.array([one.evaluation.fitness for one in own])
        examples = np.array([max(one.evaluation.num_examples, 1) for one in own])
        posterior = SmoothPosterior(numbers, scores, examples.max() / examples)
        elites = numbers[np.argsort(-posterior.of_known, kind="stable")[:_NUM_ELITES]]
        asked = _proposals(elites, posterior.uphill, self._pool, np.random.default_rng([self._seed, first, 1]))
        return _Batch(parent, repairs, asked, *posterior.moments(asked))


def _proposals(elites: Numbers, uphill: Numbers, number: int, rng: np.random.Generator) -> Numbers:
    """(number, D) repairs near the best known ones (M, D), some of them in the direction `uphill` (D,)."""
    size = elites.shape[1]
    stepping, climbing = (int(share * number) for share in _SHARES)
    steps = rng.choice(_STEPS, (stepping, 1)) * rng.standard_normal((stepping, size))
    climbs = _CLIMB * rng.standard_normal((climbing, 1)) * uphill + _NEAR * rng.standard_normal((climbing, size))
    pairs = rng.choice(len(elites), (2, number - stepping - climbing))
    between = elites[pairs].mean(axis=0) + _AROUND * rng.standard_normal((pairs.shape[1], size))
    moved = rng.choice(elites, stepping + climbing) + np.concatenate([steps, climbs])
    return np.concatenate([moved, between])
