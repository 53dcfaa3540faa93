"""Neurons into groups of equal size: k-means whose assignments are the cheapest that fill all groups equally."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_MOST_ROUNDS = 30


def balanced_clusters(points: Array, num_clusters: int, rng: np.random.Generator) -> Array:
    """Balanced k-means: (E, n / E) indices of the points (n, D) of each cluster, in ascending order.

    Begins with k-means++ and ends when no assignment changes. n must be a multiple of E.
    """
    centroids = _spread_points(points, num_clusters, rng)
    labels = balanced_assignment(_distances(points, centroids))
    for _ in range(_MOST_ROUNDS):
        centroids = np.stack([points[labels == cluster].mean(axis=0) for cluster in range(num_clusters)])
        previous, labels = labels, balanced_assignment(_distances(points, centroids))
        if np.array_equal(labels, previous):
            break
    return np.argsort(labels, kind="stable").reshape(num_clusters, -1)


def balanced_assignment(costs: Array) -> Array:
    """The cluster (n,) of each point that makes the sum of costs (n, E) smallest with n / E points in every cluster.

    Every point begins where it is cheapest. Then points move along cheapest chains of clusters, from one that has too
    many to one that has too few. This is the successive shortest path algorithm of minimum-cost flows on a graph with
    one node a cluster, so the result is exact.
    """
    num_points, num_clusters = costs.shape
    assert num_points % num_clusters == 0, "clusters of equal size"
    size = num_points // num_clusters
    labels: Array = costs.argmin(axis=1)
    counts = np.bincount(labels, minlength=num_clusters)
    moves = np.full((num_clusters, num_clusters), np.inf)  # the cheapest move of one point from row to column
    movers = np.zeros((num_clusters, num_clusters), dtype=np.int64)  # the point that makes it
    changed = list(range(num_clusters))
    while (counts != size).any():
        for cluster in changed:
            _note_moves(cluster, costs, labels, moves, movers)
        changed = _cheapest_chain(moves, counts, size)
        points = [int(movers[start, end]) for start, end in pairwise(changed)]
        labels[points] = changed[1:]
        counts[changed[0]] -= 1
        counts[changed[-1]] += 1
    return labels


def _note_moves(cluster: int, costs: Array, labels: Array, moves: Array, movers: Array) -> None:
    """Write into `moves` and `movers` which point of the cluster moves at the lowest cost to each other cluster."""
    members = np.flatnonzero(labels == cluster)
    if len(members) == 0:
        moves[cluster] = np.inf
        return
    extra = costs[members] - costs[members, cluster][:, None]
    best = extra.argmin(axis=0)
    moves[cluster] = extra[best, np.arange(costs.shape[1])]
    movers[cluster] = members[best]
    moves[cluster, cluster] = np.inf


def _cheapest_chain(moves: Array, counts: Array, size: int) -> list[int]:
    """Clusters from one with more than `size` points to one with fewer, such that the moves between cost least.

    Bellman-Ford from all clusters that have too many: moves may have negative costs, but no circle of them has.
    """
    num_clusters = len(counts)
    total = np.where(counts > size, 0.0, np.inf)
    before = np.full(num_clusters, -1)
    for _ in range(num_clusters - 1):
        through = total[:, None] + moves
        nearest = through.argmin(axis=0)
        cheaper = through[nearest, np.arange(num_clusters)]
        # sums of the same moves may differ in their last bits, which must not make a circle
        is_better = cheaper < total - 1e-12 * np.abs(cheaper)
        if not is_better.any():
            break
        total = np.where(is_better, cheaper, total)
        before = np.where(is_better, nearest, before)
    chain = [int(np.where(counts < size, total, np.inf).argmin())]
    while before[chain[-1]] >= 0:
        chain.append(int(before[chain[-1]]))
    return chain[::-1]


def _distances(points: Array, centroids: Array) -> Array:
    """Squared Euclidean distances (n, E)."""
    squares = np.square(points).sum(axis=1)[:, None] + np.square(centroids).sum(axis=1)
    return np.asarray(squares - 2.0 * (points @ centroids.T), dtype=np.float64)


def _spread_points(points: Array, number: int, rng: np.random.Generator) -> Array:
    """k-means++: (number, D) of the points, each drawn with a chance that grows with its distance to the others."""
    chosen = [int(rng.integers(len(points)))]
    nearest = _distances(points, points[chosen])[:, 0].clip(min=0.0)
    for _ in range(number - 1):
        weights = nearest if nearest.sum() > 0 else np.ones(len(points))
        chosen.append(int(rng.choice(len(points), p=weights / weights.sum())))
        nearest = np.minimum(nearest, _distances(points, points[chosen[-1:]])[:, 0].clip(min=0.0))
    return points[chosen]
