"""Balanced clusters, against SciPy's assignment and planted clusters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moe_evo.models.carve.clusters import balanced_assignment, balanced_clusters


@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize(("num_points", "num_clusters"), [(4, 4), (12, 3), (40, 8), (60, 2), (96, 16)])
def test_an_assignment_costs_as_little_as_the_best_one(num_points: int, num_clusters: int, has_ties: bool) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        costs = (
            rng.integers(0, 4, (num_points, num_clusters)) if has_ties else rng.normal(size=(num_points, num_clusters))
        )
        costs = costs.astype(np.float64)
        labels = balanced_assignment(costs)
        assert (np.bincount(labels, minlength=num_clusters) == num_points // num_clusters).all()
        seats = np.repeat(costs, num_points // num_clusters, axis=1)
        rows, columns = linear_sum_assignment(seats)
        assert costs[np.arange(num_points), labels].sum() == pytest.approx(seats[rows, columns].sum(), abs=1e-9)


def test_a_cluster_that_draws_every_point_gives_most_of_them_away() -> None:
    costs = np.ones((30, 3))
    costs[:, 1] = np.arange(30) / 100
    labels = balanced_assignment(costs)
    assert sorted(np.flatnonzero(labels == 1)) == list(range(10))


def test_planted_clusters_of_equal_size_are_found_from_any_seed() -> None:
    planted = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 16))
    noise = np.random.default_rng(1).normal(size=(64, 8))
    points = 10.0 * np.eye(8)[planted] + 0.1 * noise
    expected = {frozenset(np.flatnonzero(planted == one).tolist()) for one in range(4)}
    for seed in range(5):
        found = balanced_clusters(points, 4, np.random.default_rng(seed))
        assert found.shape == (4, 16) and {frozenset(one.tolist()) for one in found} == expected


def test_equal_points_are_divided_too() -> None:
    found = balanced_clusters(np.ones((12, 3)), 4, np.random.default_rng(0))
    assert sorted(found.ravel().tolist()) == list(range(12)) and found.shape == (4, 3)
