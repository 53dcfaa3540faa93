"""The prunings of a run that were scored, and what a Gaussian process makes of their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_evo.config.search import QUALITY
from moe_evo.genomes.bounds import Numbers
from moe_evo.genomes.population import Individual, Population
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.masks import MaskSpace
from moe_evo.searches.objectives import Objectives
from moe_evo.searches.posterior import FeatureMaker, Features, Noise, Posterior, centre_and_scale, fit_weights

FEWEST_SCORED = 8
"""With fewer scores there is no posterior."""
_MOST_FITTED = 400  # scores by which the posterior's weights are fitted
_GROWTH = 1.25  # they are fitted anew when so many times as many scores are known

Places = npt.NDArray[np.int64]


class Scored:
    """Prunings with their scores, in the order in which they were told.

    numbers: of the candidates, all that were noticed. masks: (N, S, W). inner: (N, N), see posterior.py. scores: (N, T)
    of the learned objectives. examples, samples: (N,), on how many examples each score rests, and on which sample of
    them (-1 for none). All but the numbers are brought up to date by `before`.
    """

    def __init__(self, masks: MaskSpace, features: FeatureMaker, objectives: Objectives) -> None:
        self._masks = masks
        self._features = features
        self._objectives = objectives
        self._given = 0
        self._waiting: list[Individual] = []
        self._weights: dict[tuple[int, ...], list[Numbers]] = {}  # by the candidates to which they were fitted
        self.numbers = np.zeros(0, dtype=np.int64)
        self.masks = masks.masks([])
        self.inner = np.zeros((0, 0))
        self.scores = np.zeros((0, 0))
        self.examples = np.zeros(0)
        self.samples = np.zeros(0, dtype=np.int64)

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

    def posteriors(self, known: Places) -> list[Posterior]:
        """What the scores at these places, at least `FEWEST_SCORED`, tell of all prunings, for each of T objectives."""
        inner, scores = self.inner[np.ix_(known, known)], self.scores[known]
        features = self._features(self.masks[known])
        noise = Noise.of(self.examples[known], self.samples[known])
        weights = self._fitted(self.numbers[known], inner, features, scores, noise)
        return [Posterior(inner, features, one, noise, own) for one, own in zip(scores.T, weights, strict=True)]

    def _add(self, new: Sequence[Individual]) -> None:
        self.masks = np.concatenate([self.masks, self._masks.masks([one.genome for one in new])])
        features = self._features(self.masks)
        rows = features[-len(new) :].inner(features)
        old = len(self.inner)
        self.inner = np.block([[self.inner, rows[:, :old].T], [rows[:, :old], rows[:, old:]]])
        found = [one.evaluation for one in new]
        scores = np.array([self._objectives.learned(one) for one in found])
        self.scores = np.concatenate([self.scores.reshape(-1, scores.shape[1]), scores])
        self.examples = np.append(self.examples, [max(one.num_examples, 1) for one in found])
        samples = [-1 if one.sample is None else one.sample for one in found]
        self.samples = np.append(self.samples, samples).astype(np.int64)

    def _fitted(
        self, numbers: Places, inner: Numbers, features: Features, scores: Numbers, noise: Noise
    ) -> list[Numbers]:
        """Each posterior's weights, found from a part of the scores: the first so many, which seldom changes."""
        size = FEWEST_SCORED
        while size * _GROWTH <= min(len(scores), _MOST_FITTED):
            size = int(size * _GROWTH)
        key = tuple(numbers[:size].tolist())
        if key not in self._weights:
            part, self._weights[key] = slice(size), []
            for one in scores[part].T:
                centre, scale = centre_and_scale(one)
                found = fit_weights(inner[part, part], features[part], (one - centre) / scale, noise[part])
                self._weights[key].append(found)
        return self._weights[key]


def expected_scores(space: SearchSpace, population: Population) -> dict[int, float]:
    """What each individual, by its candidate's number, can be expected to score on examples like the known ones."""
    expected = expected_points(space, population, Objectives([QUALITY]))[:, 0].tolist()
    return {one.number: score for one, score in zip(population, expected, strict=True)}


def expected_points(space: SearchSpace, population: Population, objectives: Objectives) -> Numbers:
    """(N, M) what can be expected of each individual's objectives on examples like the known ones.

    A pruning's own score is weighed against those of all prunings that have experts in common with it. Where there are
    too few of them, and for a genome that merges experts, it is the score itself.
    """
    points = objectives.points(population.individuals)
    if space.can_prune and len(population.prunings) >= FEWEST_SCORED:
        masks = MaskSpace(space)
        scored = Scored(masks, FeatureMaker(masks), objectives)
        scored.notice(population)
        rows = {one.number: row for row, one in enumerate(population)}
        known = scored.before(max(rows) + 1)
        found = [rows[number] for number in scored.numbers[known].tolist()]
        for column, posterior in enumerate(scored.posteriors(known)):
            points[found, column] = posterior.of_known
    return points
