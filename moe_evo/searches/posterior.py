"""A Gaussian process over the score of a pruning: what the evaluations so far tell of all prunings.

The covariance of two prunings is a_0 + a_1 s + a_2 s^2 + sum_c b_c u_c u'_c. s is the inner product of their centred
masks: about 1 for equal prunings, 0 on the average. So the second term is a weight for every expert and the third one
for every pair of experts. u_c is what a one-shot criterion c thinks of a pruning, or a number that prunings differ in,
such as all experts kept. A score has noise of variance v divided by its share of the examples, and scores on one sample
of the examples have noise in common, in the same way w. Scores are centred and scaled before; a_0 is what is not known
of their mean.

SciPy is imported where it is used, as a search is looked up long before it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moe_evo.genomes.bounds import Numbers
from moe_evo.searches.masks import MaskSpace
from moe_evo.searches.steps import Masks, Steps

_MEAN_VARIANCE = 1.0  # a_0
_SMALLEST, _LARGEST = 1e-4, 20.0  # of the weights that are fitted
_STARTS = (1.0, 0.5, 0.3, 0.1)  # a_1, a_2, v, w
_START_OF_OPINION = 0.3  # every b_c
_STEPS = 30
_JITTER = 1e-8


@dataclass(frozen=True)
class Features:
    """What the covariance needs of P prunings.

    bits: (P, D) 0 or 1, whose products are counts that float32 holds exactly. shared: (P,) their products with the
    centre (D,), the mean of the bits over all prunings. opinions: (P, C), the products of the centred bits with
    criteria (D, C). scale: of the products of centred bits.
    """

    bits: npt.NDArray[np.float32]
    shared: Numbers
    opinions: Numbers
    criteria: Numbers
    centre: Numbers
    scale: float

    def __len__(self) -> int:
        return len(self.bits)

    def inner(self, other: Features) -> Numbers:
        """s, (P, Q)."""
        counts = (self.bits @ other.bits.T).astype(np.float64)
        mean = self.centre @ self.centre
        inner: Numbers = (counts - (self.shared[:, None] - mean) - other.shared) * self.scale
        return inner

    def __getitem__(self, rows: slice) -> Features:
        return replace(self, bits=self.bits[rows], shared=self.shared[rows], opinions=self.opinions[rows])


class FeatureMaker:
    """Features of a space's prunings. priors: scores (E,) a MoE layer of one-shot criteria; only their order counts."""

    def __init__(self, space: MaskSpace, priors: Sequence[Sequence[Numbers]] = ()) -> None:
        self._centre = space.shares.ravel()
        self._scale = 1 / max(float(self._centre.sum() - self._centre @ self._centre), 1e-9)
        opinions = [_ranked(space, space.by_segment(scores)) for scores in priors]
        opinions += [_total(space, one) for one in space.varying if one.bounds.total is None]
        self._criteria = np.array([one.ravel() for one in opinions]).reshape(-1, space.exists.size).T
        self._mean = self._centre @ self._criteria

    def __call__(self, masks: Masks) -> Features:
        bits = masks.reshape(len(masks), -1).astype(np.float32)
        opinions = bits @ self._criteria - self._mean
        return Features(bits, bits @ self._centre, opinions, self._criteria, self._centre, self._scale)


def _ranked(space: MaskSpace, scores: Numbers) -> Numbers:
    """(S, W) ranks of the scores in their segment, scaled so that random prunings vary by about 1."""
    is_better = np.sign(scores[:, :, None] - scores[:, None, :])
    ranks = np.where(space.exists, (is_better * space.exists[:, None]).sum(axis=-1), 0.0)
    variance = (ranks**2 * space.shares * (1 - space.shares)).sum()
    scaled: Numbers = ranks / np.sqrt(max(float(variance), 1e-12))
    return scaled


def _total(space: MaskSpace, steps: Steps) -> Numbers:
    """(S, W) by which a pruning's opinion is the sum of its numbers, scaled so that random prunings vary by about 1."""
    found = np.zeros(space.exists.shape)
    found[steps.segments] = 1.0
    spread = float(steps.bounds.steps.sum()) * steps.bounds.step / np.sqrt(12)  # of a number drawn between its bounds
    return np.where(space.exists, found / spread, 0.0)


@dataclass(frozen=True)
class Noise:
    """What the noise of N scores is in proportion to: own, (N, N) diagonal, and common, (N, N)."""

    own: Numbers
    common: Numbers

    @classmethod
    def of(cls, examples: Numbers, samples: npt.NDArray[np.int64]) -> Noise:
        """examples: (N,) how many a score rests on. samples: (N,) of which sample they are; -1 for no sample."""
        spread = np.sqrt(examples.max() / examples)
        same = (samples[:, None] == samples) & (samples >= 0)
        return cls(np.diag(spread**2), same * np.outer(spread, spread))

    def __getitem__(self, rows: slice) -> Noise:
        return Noise(self.own[rows, rows], self.common[rows, rows])

    def covariance(self, weights: Numbers) -> Numbers:
        total: Numbers = weights[2] * self.own + weights[3] * self.common
        total[np.diag_indices_from(total)] += _JITTER
        return total


def _of_experts(inner: Numbers, first: Features, second: Features, weights: Numbers) -> Numbers:
    """(P, Q) of the covariance what every expert adds by itself; weights: a_1, a_2, v, w, b_c, ..."""
    total: Numbers = weights[0] * inner + (first.opinions * weights[4:]) @ second.opinions.T
    return total


def fit_weights(inner: Numbers, features: Features, scores: Numbers, noise: Noise) -> Numbers:
    """The weights (a_1, a_2, v, w, b_c, ...) under which the scores (N,) are most probable.

    inner: (N, N). Draws each weight a little towards 1, so that one of which the scores say nothing stays near it.
    """
    from scipy.linalg import cho_solve, cholesky
    from scipy.optimize import minimize

    opinions = [np.outer(one, one) for one in features.opinions.T]
    terms = [inner, inner**2, noise.own, noise.common, *opinions]
    size = len(scores)

    def cost(logs: Numbers) -> tuple[float, Numbers]:
        weights = np.exp(logs)
        matrix = _MEAN_VARIANCE + sum(weight * term for weight, term in zip(weights, terms, strict=True))
        matrix[np.diag_indices(size)] += _JITTER
        factor = cholesky(matrix, lower=True, check_finite=False)
        inverse = cho_solve((factor, True), np.eye(size), check_finite=False)
        solved = inverse @ scores
        slope = inverse - np.outer(solved, solved)
        slopes = np.array([(slope * term).sum() for term in terms])
        value = scores @ solved / 2 + np.log(np.diag(factor)).sum() + 0.01 * logs @ logs
        return float(value), slopes * weights / 2 + 0.02 * logs

    start = np.log([*_STARTS, *[_START_OF_OPINION] * len(opinions)])
    bounds = [(np.log(_SMALLEST), np.log(_LARGEST))] * len(start)
    if not noise.common.any():
        start[3], bounds[3] = np.log(_SMALLEST), (np.log(_SMALLEST), np.log(_SMALLEST))
    found = minimize(cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS})
    weights: Numbers = np.exp(found.x)
    return weights


class Posterior:
    """The scores of prunings, given those (N,) of N known ones. of_known: (N,) their expected scores.

    inner: (N, N). weights: of `fit_weights`, for scores centred and scaled.
    """

    def __init__(self, inner: Numbers, known: Features, scores: Numbers, noise: Noise, weights: Numbers) -> None:
        from scipy.linalg import cho_factor, cho_solve, cholesky

        self._known = known
        self._weights = weights
        self._centre, self._scale = centre_and_scale(scores)
        self._scores = (scores - self._centre) / self._scale
        of_noise = noise.covariance(weights)
        rest = _MEAN_VARIANCE + weights[1] * inner**2 + of_noise  # what no expert has by itself
        self._of_rest: Numbers = cholesky(rest, lower=True, check_finite=False)
        self._factor = cho_factor(rest + _of_experts(inner, known, known, weights), lower=True, check_finite=False)
        self._solved: Numbers = cho_solve(self._factor, self._scores, check_finite=False)
        # what is not noise of the known scores themselves
        self.of_known: Numbers = scores - self._scale * (of_noise @ self._solved)

    def moments(self, asked: Features) -> tuple[Numbers, Numbers]:
        """(P,) expected scores, and a root (P, P) of their covariance: root @ root.T."""
        from scipy.linalg import cholesky, solve_triangular

        across = self._across(asked, self._known)
        explained = solve_triangular(self._factor[0], across.T, lower=True, check_finite=False)
        left = self._across(asked, asked) - explained.T @ explained
        left[np.diag_indices_from(left)] += 1e-6
        root: Numbers = cholesky(left, lower=True, check_finite=False)
        return self._centre + self._scale * (across @ self._solved), self._scale * root

    def worths(self, number: int, rng: np.random.Generator) -> Numbers:
        """(number, D): what each expert adds to the score by itself, drawn given the scores.

        In units of the scores' deviation; the same number may be added to all experts of a segment. A draw from the
        prior is corrected by how far it is from the known scores (Matheron's rule).
        """
        from scipy.linalg import cho_solve

        known, own, opinion = self._known, self._weights[0] * self._known.scale, self._weights[4:]
        drawn = np.sqrt(own) * rng.standard_normal((number, known.bits.shape[1])).astype(np.float32)
        trusted = np.sqrt(opinion) * rng.standard_normal((number, len(opinion)))
        imagined = drawn @ known.bits.T - (drawn @ known.centre)[:, None] + trusted @ known.opinions.T
        imagined += rng.standard_normal((number, len(known))) @ self._of_rest.T
        missing = cho_solve(self._factor, (self._scores - imagined).T, check_finite=False).T
        drawn += own * (missing.astype(np.float32) @ known.bits - missing.sum(axis=1, keepdims=True) * known.centre)
        trusted += opinion * (missing @ known.opinions)
        worths: Numbers = drawn + trusted @ known.criteria.T
        return worths

    def _across(self, first: Features, second: Features) -> Numbers:
        inner = first.inner(second)
        pairs: Numbers = _MEAN_VARIANCE + self._weights[1] * inner**2
        return pairs + _of_experts(inner, first, second, self._weights)


def centre_and_scale(scores: Numbers) -> tuple[float, float]:
    """Mean and standard deviation; 1 in place of a deviation of 0."""
    spread = float(scores.std())
    return float(scores.mean()), spread if spread > 1e-12 else 1.0
