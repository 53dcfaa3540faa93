"""A Gaussian process over vectors of real numbers: what the scores known so far tell of a smooth function.

The covariance of x and x' (D,) is 1 + a (x.x' / D + l^2 exp(-|x - x'|^2 / (2 l^2 D))): a slope, and bends over a
length l. Scores are centred and scaled before; they have noise of variance v divided by their share of the examples.
a, l and v are those of a small grid under which the scores are most probable.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from moe_evo.genomes.bounds import Numbers
from moe_evo.searches.posterior import centre_and_scale

_SLOPES, _LENGTHS, _NOISES = (0.3, 1.0, 3.0), (1.0, 2.0, 4.0, 8.0), (1e-3, 3e-2)
_JITTER = 1e-6


class SmoothPosterior:
    """The scores of vectors, given those (N,) of known ones (N, D).

    of_known: (N,) expected scores. uphill: (D,) the direction in which they rise on the whole, of length sqrt(D), or 0.
    """

    def __init__(self, known: Numbers, scores: Numbers, noise: Numbers) -> None:
        """noise: (N,) by which v is multiplied."""
        from scipy.linalg import cho_solve, cholesky

        self._known = known
        self._centre, self._scale = centre_and_scale(scores)
        scaled = (scores - self._centre) / self._scale
        best = -np.inf
        for slope, length, spread in product(_SLOPES, _LENGTHS, _NOISES):
            matrix = _covariance(known, known, slope, length)
            matrix[np.diag_indices_from(matrix)] += spread * noise
            factor: Numbers = cholesky(matrix, lower=True)
            solved: Numbers = cho_solve((factor, True), scaled)
            evidence = -scaled @ solved / 2 - np.log(np.diag(factor)).sum()
            if evidence > best:
                best, self._weights, self._factor, self._solved = evidence, (slope, length), factor, solved
                self.of_known: Numbers = scores - self._scale * spread * noise * solved
        rise: Numbers = known.T @ self._solved
        self.uphill: Numbers = rise * np.sqrt(len(rise)) / max(float(np.linalg.norm(rise)), 1e-12)

    def moments(self, asked: Numbers) -> tuple[Numbers, Numbers]:
        """(P,) expected scores of vectors (P, D), and a root (P, P) of their covariance: root @ root.T."""
        from scipy.linalg import cholesky, solve_triangular

        across = _covariance(asked, self._known, *self._weights)
        explained = solve_triangular(self._factor, across.T, lower=True)
        left = _covariance(asked, asked, *self._weights) - explained.T @ explained
        left[np.diag_indices_from(left)] += _JITTER
        root: Numbers = cholesky(left, lower=True)
        return self._centre + self._scale * (across @ self._solved), self._scale * root


def _covariance(first: Numbers, second: Numbers, slope: float, length: float) -> Numbers:
    size = first.shape[1]
    inner = first @ second.T / size
    squares = [(one**2).sum(axis=1) / size for one in (first, second)]
    distances = np.maximum(squares[0][:, None] + squares[1] - 2 * inner, 0.0)
    covariance: Numbers = 1 + slope * (inner + length**2 * np.exp(-distances / (2 * length**2)))
    return covariance
