"""The Gaussian process over prunings, against scikit-learn's and against draws."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Kernel

from moe_evo.searches.masks import MaskSpace
from moe_evo.searches.posterior import FeatureMaker, Features, Noise, Posterior, fit_weights
from moe_evo.testing.searches import SPACES, space_of

SPACE = MaskSpace(space_of([8] * 3, 4))
PRIORS = [[np.arange(8.0)] * 3, [np.arange(8.0)[::-1], np.zeros(8), np.arange(8.0)]]
MAKE = FeatureMaker(SPACE, PRIORS)
WEIGHTS = np.array([0.7, 0.4, 0.05, 0.02, 0.3, 0.2])  # a_1, a_2, v, w, b_1, b_2
RNG = np.random.default_rng(8)
EXAMPLES = np.array([100.0, 50.0] * 10)
SPREAD = np.array([1.0, np.sqrt(2)] * 10)
SAMPLES = np.arange(20) // 10  # ten scores on each of two samples
NOISE = Noise.of(EXAMPLES, SAMPLES)
OF_NOISE = WEIGHTS[2] * np.diag(SPREAD**2) + WEIGHTS[3] * (SAMPLES[:, None] == SAMPLES) * np.outer(SPREAD, SPREAD)


class Covariance(Kernel):
    """The formula of posterior.py's first lines, row by row."""

    def __init__(self) -> None:
        pass

    def __call__(self, X, Y=None, eval_gradient=False):
        Y = X if Y is None else Y
        return np.array([[self._of(one, other) for other in Y] for one in X])

    def _of(self, one, other):
        centre = SPACE.shares.ravel()
        s = (one - centre) @ (other - centre) / (centre * (1 - centre)).sum()
        opinions = [one @ MAKE._criteria[:, c] * (other @ MAKE._criteria[:, c]) for c in range(2)]
        return 1 + WEIGHTS[0] * s + WEIGHTS[1] * s**2 + WEIGHTS[4:] @ opinions

    def diag(self, X):
        return np.diag(self(X))

    def is_stationary(self):
        return False


class Noisy(Covariance):
    """The covariance of rows that are told by their places; the first twenty have noise."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __call__(self, X, Y=None, eval_gradient=False):
        Y = X if Y is None else Y
        total = super().__call__(self.rows[X[:, 0].astype(int)], self.rows[Y[:, 0].astype(int)])
        noise = np.pad(OF_NOISE, (0, len(self.rows) - 20))
        return total + noise[np.ix_(X[:, 0].astype(int), Y[:, 0].astype(int))]


@pytest.fixture(scope="module")
def known() -> Features:
    return MAKE(SPACE.drawn(20, np.random.default_rng(0)))


@pytest.fixture(scope="module")
def asked() -> Features:
    return MAKE(SPACE.drawn(15, np.random.default_rng(1)))


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    return 0.7 + 0.1 * np.random.default_rng(2).normal(size=20)


@pytest.fixture(scope="module")
def posterior(known: Features, scores: np.ndarray) -> Posterior:
    return Posterior(known.inner(known), known, scores, NOISE, WEIGHTS)


def alone(number: int) -> Noise:
    """The noise of so many scores, each on all examples."""
    return Noise.of(np.full(number, 100.0), np.full(number, -1))


def test_moments_are_those_of_scikit_learn(
    posterior: Posterior, known: Features, asked: Features, scores: np.ndarray
) -> None:
    scaled = (scores - scores.mean()) / scores.std()
    rows = np.concatenate([known.bits, asked.bits]).astype(float)
    places = np.arange(len(rows))[:, None].astype(float)
    process = GaussianProcessRegressor(Noisy(rows), alpha=1e-8, optimizer=None)
    process.fit(places[: len(known)], scaled)
    mean, covariance = process.predict(places[len(known) :], return_cov=True)
    found, root = posterior.moments(asked)
    np.testing.assert_allclose(found, scores.mean() + scores.std() * mean, atol=1e-6)
    np.testing.assert_allclose(root @ root.T, scores.std() ** 2 * covariance, atol=1e-6)
    np.testing.assert_allclose(posterior.moments(known)[0], posterior.of_known, atol=1e-6)


@pytest.mark.parametrize("name", SPACES)
def test_equal_prunings_have_product_one_and_the_mean_over_all_is_zero(name: str) -> None:
    space = MaskSpace(SPACES[name])
    if not space.num_changes:
        return
    features = FeatureMaker(space)(space.drawn(3000, np.random.default_rng(0)))
    inner = features[:200].inner(features)
    # where numbers vary, prunings are not all as far from the mean
    np.testing.assert_allclose(np.diag(inner), 1, atol=0.5 if space.varying else 1e-6)
    assert abs(np.diag(inner).mean() - 1) < 0.05 and abs(inner.mean()) < 0.02


def test_opinions_vary_by_about_one_and_only_their_order_counts() -> None:
    masks = SPACE.drawn(2000, np.random.default_rng(3))
    other = FeatureMaker(SPACE, [[np.exp(one) for one in prior] for prior in PRIORS])
    np.testing.assert_array_equal(MAKE(masks).opinions, other(masks).opinions)
    assert MAKE(masks).opinions.std(axis=0) == pytest.approx([1, 1], abs=0.15)
    assert MAKE(masks).opinions.mean(axis=0) == pytest.approx([0, 0], abs=0.1)


def test_experts_that_a_criterion_likes_equally_have_one_rank() -> None:
    space = MaskSpace(SPACES["ragged"])
    features = FeatureMaker(space, [[np.array([2.0, 1, 1, 0]), np.zeros(8), np.arange(6.0)]])(space.drawn(1, RNG))
    found = features.criteria.reshape(space.exists.shape)
    np.testing.assert_allclose(found[0, :4] / found[0, 0], [1, 0, 0, -1], atol=1e-9)
    assert not found[1].any() and not found[~space.exists].any()
    np.testing.assert_allclose(np.diff(found[2, :6]), found[2, 1] - found[2, 0])


def test_drawn_worths_have_the_moments_of_the_experts_weights(posterior: Posterior, known: Features) -> None:
    """Against conditioning the joint Gaussian of weights and scores by hand."""
    prior = WEIGHTS[0] * known.scale * np.eye(24) + (known.criteria * WEIGHTS[4:]) @ known.criteria.T
    centred = known.bits - known.centre
    rest = 1 + WEIGHTS[1] * known.inner(known) ** 2 + OF_NOISE + 1e-8 * np.eye(20)
    gain = prior @ centred.T @ np.linalg.inv(rest + centred @ prior @ centred.T)
    covariance = prior - gain @ centred @ prior
    within = np.eye(24) - np.kron(np.eye(3), np.full((8, 8), 1 / 8))  # what is equal in a segment means nothing
    drawn = posterior.worths(40_000, np.random.default_rng(4)) @ within
    np.testing.assert_allclose(drawn.mean(axis=0), within @ gain @ posterior._scores, atol=0.01)
    np.testing.assert_allclose(np.cov(drawn.T), within @ covariance @ within, atol=0.01)


def test_the_fitted_weights_tell_single_experts_pairs_and_noise_apart() -> None:
    rng = np.random.default_rng(5)
    space = MaskSpace(space_of([8] * 4, 4))
    features = FeatureMaker(space)(space.drawn(250, rng))
    inner = features.inner(features)
    vectors = (features.bits - features.centre) * np.sqrt(features.scale)
    linear = vectors @ rng.normal(size=32)
    pairs = np.einsum("nd,de,ne->n", vectors, rng.normal(size=(32, 32)), vectors)
    noise = rng.normal(size=250)

    def fitted(scores: np.ndarray) -> np.ndarray:
        return fit_weights(inner, features, (scores - scores.mean()) / scores.std(), alone(250))

    for place, scores in enumerate((linear + 0.1 * noise, pairs + 0.1 * noise, noise + 0.1 * linear)):
        weights = fitted(scores)
        assert weights.argmax() == place, weights


def test_a_right_opinion_gets_weight_and_a_wrong_one_none() -> None:
    rng = np.random.default_rng(6)
    worth = rng.normal(size=(3, 8))
    features = FeatureMaker(SPACE, [list(worth), list(rng.normal(size=(3, 8)))])(SPACE.drawn(60, rng))
    scores = features.bits @ worth.ravel() + 0.1 * rng.normal(size=60)
    weights = fit_weights(features.inner(features), features, (scores - scores.mean()) / scores.std(), alone(60))
    assert weights[4] > 0.1 > weights[5]


def test_a_score_of_fewer_examples_counts_less(known: Features, scores: np.ndarray) -> None:
    def at_the_first(noise: float) -> float:
        examples = np.where(np.arange(20) == 0, 100 / noise, 100.0)
        changed = scores + np.where(np.arange(20) == 0, 1.0, 0.0)
        found = Posterior(known.inner(known), known, changed, Noise.of(examples, np.full(20, -1)), WEIGHTS)
        return float(found.of_known[0])

    assert at_the_first(1.0) > at_the_first(100.0) + 0.1


def test_what_a_whole_sample_is_better_by_is_taken_for_its_own(known: Features, scores: np.ndarray) -> None:
    """An easy sample lifts ten scores together; each on a sample of its own, they would be ten good prunings."""
    weights = WEIGHTS.copy()
    weights[3] = 1.0
    easy = scores + np.where(SAMPLES == 0, 0.2, 0.0)

    def lead(samples: np.ndarray) -> float:
        found = Posterior(known.inner(known), known, easy, Noise.of(EXAMPLES, samples), weights).of_known
        return float(found[:10].mean() - found[10:].mean())

    assert lead(SAMPLES) < lead(np.arange(20)) - 0.05
