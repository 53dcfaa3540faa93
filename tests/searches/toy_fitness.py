"""A toy task with a known best pruning and a smooth merging objective, scored like a real one.

Each layer has a hidden subset of experts and, near it, a hidden target for the column sums of W_EM and
of W_RM. An example is right where its margin is positive; the margin falls with the weighted squared
distance to the targets, with a term between neighbouring layers and a taste of its own for experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import Search

NUM_EXAMPLES = 200


class ToyTask:
    """Fitness is the share of right examples, with the mean log-likelihood as the tie-break."""

    def __init__(self, space: SearchSpace, seed: int, *, noise: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        layers, experts = space.shape.num_layers, space.shape.num_experts[0]
        self.hidden = np.argsort(rng.random((layers, experts)), axis=1)[:, : space.num_kept[0]]
        one_hot = np.zeros((layers, experts))
        np.put_along_axis(one_hot, self.hidden, 1.0, axis=1)
        self._targets = one_hot + rng.normal(0, 0.2, (2, layers, experts))
        weights = rng.exponential(1.0, (layers, experts))
        self._weights = weights / weights.sum()
        self._between = rng.normal(0, 0.1, (layers - 1, experts, experts)) / (layers * experts)
        self._taste = rng.normal(0, noise / np.sqrt(layers * experts), (2 * NUM_EXAMPLES, layers * experts))
        self._offsets = rng.logistic(0.35, 0.15, 2 * NUM_EXAMPLES)

    @property
    def best_pruning(self) -> list[list[int]]:
        return [sorted(layer) for layer in self.hidden.tolist()]

    def margins(self, genome: Genome) -> np.ndarray:
        """(2 * NUM_EXAMPLES,) margins: the search examples, then as many that the search never sees."""
        merging = np.array([layer.expert_merging.sum(axis=0) for layer in genome.layers])
        mapping = np.array([layer.router_mapping.sum(axis=0) for layer in genome.layers])
        distance = np.mean([merging - self._targets[0], mapping - self._targets[1]], axis=0)
        spread = (merging - mapping - self._targets[0] + self._targets[1]) / 2
        loss = (self._weights * (distance**2 + spread**2)).sum()
        loss += np.einsum("la,lab,lb->", merging[:-1], self._between, merging[1:])
        return self._offsets - loss + self._taste @ merging.ravel()

    def evaluate(self, genome: Genome) -> Evaluation:
        margins = self.margins(genome)[:NUM_EXAMPLES]
        share = float((margins > 0).mean())
        log_likelihood = -float(np.log1p(np.exp(-10 * margins)).mean())
        error = float(np.sqrt(share * (1 - share) / NUM_EXAMPLES))
        return Evaluation(share, log_likelihood, error, NUM_EXAMPLES)

    def unseen_share(self, genome: Genome) -> float:
        return float((self.margins(genome)[NUM_EXAMPLES:] > 0).mean())


def run(search: Search, evaluate: Callable[[Genome], Evaluation], evaluations: int) -> Search:
    """Ask and tell one by one until the budget is spent or nothing is left."""
    for _ in range(evaluations):
        for candidate in search.ask(1):
            search.tell([scored(candidate, evaluate)])
    return search


def scored(candidate: Candidate, evaluate: Callable[[Genome], Evaluation]) -> Individual:
    return Individual(candidate, evaluate(candidate.genome))
