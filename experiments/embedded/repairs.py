"""Repairs of a pruning as vectors of a few numbers, and a Gaussian process over their scores; used by repair.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.searches.posterior import centre_and_scale

Numbers = npt.NDArray[np.float64]

SCALE_STEP = 0.07  # logarithm of an expert's scale at a number of 1; its output is about cubic in its weights
SHARE_STEP = 0.08  # share of the other expert at a number of 1
NUM_INITIAL, BATCH, POOL, NUM_ELITES = 20, 10, 600, 5


class Repairs:
    """Each kept expert gets a scale, and a share of the dropped expert most like it: numbers (2 L K,), of which 0 is
    the pruning itself. likeness: how alike two experts are, (E, E) a MoE layer. The router stays as it is."""

    def __init__(self, pruning: Genome, likeness: Sequence[Numbers]) -> None:
        self._pruning = pruning
        self._partners = []
        for layer, alike in zip(pruning.layers, likeness, strict=True):
            dropped = [expert for expert in range(layer.num_experts) if expert not in layer.kept]
            self._partners.append([dropped[int(alike[expert, dropped].argmax())] for expert in layer.kept])
        self.size = 2 * sum(map(len, self._partners))

    def genome(self, numbers: Numbers) -> Genome:
        """numbers: scales of all kept experts, layer by layer, then their shares."""
        scales, shares = np.split(numbers, 2)
        layers, first = [], 0
        for layer, partners in zip(self._pruning.layers, self._partners, strict=True):
            own = slice(first, first := first + len(partners))
            merging = layer.expert_merging.copy()
            merging[np.arange(len(partners)), partners] = SHARE_STEP * shares[own]
            merging *= np.exp(SCALE_STEP * scales[own])[:, None].astype(np.float32)
            layers.append(LayerGenome(merging, layer.router_mapping, layer.top_k))
        return Genome(tuple(layers))


class SmoothPosterior:
    """The scores of vectors, given those (N,) of known ones (N, D).

    The covariance of x and x' is 1 + a (x.x' / D + l^2 exp(-|x - x'|^2 / (2 l^2 D))), noise has variance v; a, l and v
    are those of a small grid under which the scores are most probable. of_known: (N,) expected scores. uphill: (D,)
    the direction in which they rise on the whole, of length sqrt(D).
    """

    def __init__(self, known: Numbers, scores: Numbers) -> None:
        from scipy.linalg import cho_solve, cholesky

        self._known = known
        centre, scale = centre_and_scale(scores)
        scaled = (scores - centre) / scale
        best = -np.inf
        for slope, length, noise in product((0.3, 1.0, 3.0), (1.0, 2.0, 4.0, 8.0), (1e-3, 3e-2)):
            matrix = _covariance(known, known, slope, length) + noise * np.eye(len(known))
            factor = cholesky(matrix, lower=True)
            solved = cho_solve((factor, True), scaled)
            evidence = -scaled @ solved / 2 - np.log(np.diag(factor)).sum()
            if evidence > best:
                best, self._weights, self._factor, self._solved = evidence, (slope, length), factor, solved
                self.of_known: Numbers = scores - scale * noise * solved
        rise = known.T @ self._solved
        self.uphill: Numbers = rise * np.sqrt(len(rise)) / max(float(np.linalg.norm(rise)), 1e-12)

    def moments(self, asked: Numbers) -> tuple[Numbers, Numbers]:
        """(P,) expected scores of vectors (P, D), scaled, and a root (P, P) of their covariance."""
        from scipy.linalg import cholesky, solve_triangular

        across = _covariance(asked, self._known, *self._weights)
        explained = solve_triangular(self._factor, across.T, lower=True)
        left = _covariance(asked, asked, *self._weights) - explained.T @ explained + 1e-6 * np.eye(len(asked))
        return across @ self._solved, cholesky(left, lower=True)


def _covariance(first: Numbers, second: Numbers, slope: float, length: float) -> Numbers:
    size = first.shape[1]
    inner = first @ second.T / size
    squares = [(one**2).sum(axis=1) / size for one in (first, second)]
    distances = np.maximum(squares[0][:, None] + squares[1] - 2 * inner, 0.0)
    covariance: Numbers = 1 + slope * (inner + length**2 * np.exp(-distances / (2 * length**2)))
    return covariance


def searched(
    score: Callable[[Numbers], Numbers], size: int, start: float, number: int, rng: np.random.Generator
) -> tuple[Numbers, Numbers]:
    """`number` trials and the start, best expected score first: vectors (N + 1, D) and their scores (N + 1,).

    score: of vectors (P, D). start: the score of 0. Random vectors come first, then Thompson draws among steps from
    the best ones.
    """
    numbers, scores = np.zeros((1, size)), np.array([start])
    while (left := number + 1 - len(scores)) > 0:
        if len(scores) <= NUM_INITIAL:
            asked = rng.standard_normal((min(NUM_INITIAL, left), size))
        else:
            posterior = SmoothPosterior(numbers, scores)
            elites = numbers[np.argsort(-posterior.of_known)[:NUM_ELITES]]
            pool = _proposals(elites, posterior.uphill, rng)
            mean, root = posterior.moments(pool)
            drawn = [int((mean + root @ rng.standard_normal(len(pool))).argmax()) for _ in range(min(BATCH, left))]
            asked = pool[drawn]
        numbers, scores = np.concatenate([numbers, asked]), np.concatenate([scores, score(asked)])
    order = np.argsort(-SmoothPosterior(numbers, scores).of_known)
    return numbers[order], scores[order]


def _proposals(elites: Numbers, uphill: Numbers, rng: np.random.Generator) -> Numbers:
    """(POOL, D) vectors near the best known ones: random steps, steps uphill, and what is between two of them."""
    half, quarter, size = POOL // 2, POOL // 4, len(uphill)
    steps = rng.choice((0.1, 0.3, 0.6), (half, 1)) * rng.standard_normal((half, size))
    climbs = 0.7 * rng.standard_normal((quarter, 1)) * uphill + 0.1 * rng.standard_normal((quarter, size))
    pairs = rng.choice(len(elites), (2, quarter))
    between = elites[pairs].mean(axis=0) + 0.2 * rng.standard_normal((quarter, size))
    return np.concatenate([rng.choice(elites, half + quarter) + np.concatenate([steps, climbs]), between])
