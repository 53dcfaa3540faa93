"""Running statistics of one search, for curves over the number of evaluations."""

from __future__ import annotations

from bisect import insort
from collections import Counter

import numpy as np

from moe_evo.genomes.population import ACTIVE_EXPERTS, Evaluation, Individual, RankKey, mean_active_experts

_BEST = 20
_FAILED: RankKey = (False, -np.inf, 0.0)


class SearchStatistics:
    """Statistics updated by one individual at a time, in the order in which they finished.

    The cost of an update does not grow with the number of individuals. evaluations: how many are finished, failures
    included. position: place of each candidate, by its number, in the order of finishing, from 1.
    """

    def __init__(self) -> None:
        self.evaluations = 0
        self.failures = 0
        self.best: Individual | None = None
        self.position: dict[int, int] = {}
        self._rank_keys: dict[int, RankKey] = {}
        self._top: list[tuple[RankKey, int, Individual]] = []
        self._mean = self._squares = 0.0
        self._digests: set[str] = set()
        self._children: Counter[str] = Counter()
        self._successes: Counter[str] = Counter()

    def add(self, individual: Individual) -> dict[str, float]:
        """Add an individual, and return the new statistics by their names in `experiments/wandb.md`."""
        self.evaluations += 1
        self.position[individual.number] = self.evaluations
        self._digests.add(individual.genome.digest)
        outcome = individual.outcome
        values = {
            "evaluations": self.evaluations,
            "phase": float(not individual.genome.is_pruning),
            "evaluation_s": outcome.duration_s,
            "population/unique_share": len(self._digests) / self.evaluations,
        }
        if isinstance(outcome, Evaluation):
            values |= {
                "fitness": outcome.fitness,
                "tie_break": outcome.tie_break,
                "standard_error": outcome.standard_error,
            }
            active = mean_active_experts(outcome.metrics)
            values |= {} if active is None else {ACTIVE_EXPERTS: active}
            self._join(individual, outcome)
        else:
            self.failures += 1
        values["failures"] = self.failures
        values |= self._success(individual)
        if self.best is not None:
            values |= {"best/fitness": self.best.evaluation.fitness, "best/number": self.best.number}
            values |= self._spread()
        return values

    def _join(self, individual: Individual, outcome: Evaluation) -> None:
        self._rank_keys[individual.number] = outcome.rank_key
        delta = outcome.fitness - self._mean
        self._mean += delta / len(self._rank_keys)
        self._squares += delta * (outcome.fitness - self._mean)  # Welford 1962
        insort(self._top, (outcome.rank_key, -individual.number, individual), key=lambda entry: entry[:2])
        del self._top[:-_BEST]
        self.best = self._top[-1][2]

    def _success(self, individual: Individual) -> dict[str, float]:
        """The share of the children of this individual's operator that are better than each of their parents."""
        operator, parents = individual.candidate.operator, individual.candidate.parents
        known = [self._rank_keys[parent] for parent in parents if parent in self._rank_keys]
        if not known:
            return {}
        self._children[operator] += 1
        self._successes[operator] += self._rank_keys.get(individual.number, _FAILED) > max(known)
        return {f"operators/{operator}": self._successes[operator] / self._children[operator]}

    def _spread(self) -> dict[str, float]:
        top = [individual for *_, individual in self._top]
        layers = {(index, layer.digest) for one in top for index, layer in enumerate(one.genome.layers)}
        return {
            "population/std": float(np.sqrt(self._squares / len(self._rank_keys))),
            "population/best20_std": float(np.std([one.evaluation.fitness for one in top])),
            "population/best20_unique_layers": len(layers) / sum(len(one.genome.layers) for one in top),
        }
