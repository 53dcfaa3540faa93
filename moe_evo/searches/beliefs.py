"""`Beliefs`: what is known of all objectives together, and `Ranking`: which prunings of a pool a batch takes.

Every objective that is learned has a posterior of its own; the others are known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_evo.genomes.bounds import Counts, Numbers
from moe_evo.searches.fronts import front_of, improvements, reference_point
from moe_evo.searches.posterior import Features, Posterior


class Beliefs:
    """The posteriors (T) of the learned objectives of prunings, of which N are scored.

    known: (N, K) the other objectives of those. expected: (N, T + K), without the noise of the scores.
    """

    def __init__(self, posteriors: Sequence[Posterior], known: Numbers) -> None:
        self._posteriors = posteriors
        self.expected: Numbers = np.column_stack([*(one.of_known for one in posteriors), known])

    def worths(self, number: int, rng: np.random.Generator) -> Numbers:
        """(number, D) drawn worths of the experts, see `Posterior.worths`, in random mixtures of the objectives."""
        worths = [one.worths(number, rng) for one in self._posteriors]
        if len(worths) == 1:
            return worths[0]
        shares = rng.dirichlet(np.ones(len(worths)), number)
        mixed: Numbers = np.einsum("nt,tnd->nd", shares, np.array(worths))
        return mixed

    def ranking(self, asked: Features, known: Numbers) -> Ranking:
        """Of a pool of P prunings with these features; known: (P, K) their other objectives."""
        moments = [one.moments(asked) for one in self._posteriors]
        front = self.expected[front_of(self.expected)]
        return Ranking([mean for mean, _ in moments], [root for _, root in moments], known, front)


class Ranking:
    """The order in which each candidate of a batch would take the prunings of a pool.

    A candidate takes the pruning that would increase the hypervolume of the front most, in a draw from the posteriors
    (Thompson sampling). What the candidates before it took counts as part of the front, so that a batch is spread.

    means, roots: T times (P,) and (P, P). known: (P, K). front: (F, T + K).
    """

    def __init__(self, means: Sequence[Numbers], roots: Sequence[Numbers], known: Numbers, front: Numbers) -> None:
        self._means, self._roots, self._known = means, roots, known
        self._front = front
        self._reference = reference_point(front)
        self._taken: set[int] = set()
        self._orders: list[Counts] = []

    def order(self, place: int, seeds: Sequence[Sequence[int]]) -> Counts:
        """(P,) places in the pool, for candidate `place` of the batch; seeds: of the candidates up to it."""
        for seed in seeds[len(self._orders) : place + 1]:
            rng = np.random.default_rng(seed)
            drawn = [
                mean + root @ rng.standard_normal(len(mean))
                for mean, root in zip(self._means, self._roots, strict=True)
            ]
            points = np.column_stack([*drawn, self._known])
            order = np.argsort(-improvements(points, self._front, self._reference), kind="stable")
            first = next((one for one in order.tolist() if one not in self._taken), 0)
            self._taken.add(first)
            self._front = np.concatenate([self._front, points[first : first + 1]])
            self._orders.append(order)
        return self._orders[place]
