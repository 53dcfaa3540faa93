"""Grouping experts, against brute force and scikit-learn, with ties and equal points."""

from __future__ import annotations

import itertools
import warnings

import brute_force_merges as oracle
import numpy as np
import pytest
from scipy.cluster.hierarchy import average, fcluster
from scipy.spatial.distance import pdist, squareform
from sklearn.cluster import SpectralClustering

from moe_evo.criteria.grouping import (
    agglomerated,
    centroid_groups,
    dominant_groups,
    k_means,
    spectral_groups,
)

GROUPINGS = (agglomerated, centroid_groups, dominant_groups, spectral_groups)


def plain(groups):
    return [(group.dominant, list(group.members)) for group in groups]


@pytest.mark.parametrize("seed", range(20))
def test_agglomeration_equals_brute_force_and_scipys_own_cut(seed):
    rng = np.random.default_rng(seed)
    features, votes = rng.normal(size=(9, 4)), rng.permutation(9).astype(float)
    for number in range(1, 10):
        groups = agglomerated(number, votes, squareform(pdist(features)))
        assert plain(groups) == oracle.agglomeration(number, votes, features)
        labels = fcluster(average(pdist(features)), number, criterion="maxclust")
        assert len({labels[member] for group in groups for member in group.members[:1]}) == number


def test_equal_distances_still_give_as_many_groups_as_asked_for():
    for number in range(1, 7):
        groups = agglomerated(number, np.arange(6.0), np.zeros((6, 6)))
        assert len(groups) == number


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_groups_divide_the_experts_and_are_led_by_the_member_with_most_votes(grouping):
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 12, 40):
        points = rng.normal(size=(size, 3))
        pairs = squareform(pdist(points)) if size > 1 else np.zeros((1, 1))
        votes = rng.integers(0, 4, size).astype(float)
        for number in {1, size // 2 or 1, size}:
            groups = grouping(number, votes, pairs + (grouping in (dominant_groups, spectral_groups)))
            assert len(groups) == number
            assert sorted(itertools.chain.from_iterable(group.members for group in groups)) == list(range(size))
            assert [group.dominant for group in groups] == sorted(group.dominant for group in groups)
            for group in groups:
                assert votes[group.dominant] == votes[list(group.members)].max()


@pytest.mark.parametrize("seed", range(10))
def test_spectral_groups_equal_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(4), 4))
    logits = rng.normal(size=(4, 200))[truth] + 0.4 * rng.normal(size=(16, 200))
    alike = (np.corrcoef(logits) + 1) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = SpectralClustering(4, affinity="precomputed", random_state=0).fit_predict(alike)
    votes = rng.random(16)
    groups = spectral_groups(4, votes, alike)
    expected = oracle.led([list(np.flatnonzero(found == label)) for label in range(4)], votes)
    assert plain(groups) == [(dominant, [int(one) for one in members]) for dominant, members in expected]
    assert all(len({truth[member] for member in group.members}) == 1 for group in groups)


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_the_least_cost_of_all_partitions(seed):
    points = np.random.default_rng(seed).normal(size=(8, 3))

    def cost(clusters):
        return sum(((points[one] - points[one].mean(axis=0)) ** 2).sum() for one in clusters)

    for number in (2, 3, 5):
        labels = k_means(points, number)
        found = cost([np.flatnonzero(labels == label) for label in range(number)])
        assert found == pytest.approx(min(map(cost, oracle.partitions(8, number))))


def test_equal_points_are_divided_into_as_many_groups_as_asked_for():
    assert len(set(k_means(np.ones((6, 2)), 4))) == 4


def test_the_first_centroid_takes_an_eighth_of_the_experts_and_most_stay_alone():
    rng = np.random.default_rng(0)
    groups = centroid_groups(96, np.arange(128.0), squareform(pdist(rng.normal(size=(128, 3)))))
    sizes = sorted((len(group.members) for group in groups), reverse=True)
    assert sizes[:4] == [16, 16, 3, 1] and len(groups[-1].members) == 16
