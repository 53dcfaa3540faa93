"""Group the experts of a layer by similarity, for merges. Pure functions of numpy arrays.

Each gets the number of groups, votes (n,) and a matrix (n, n) of similarities or distances. The expert with the most
votes in a group is its dominant one. Equal arrays always give equal groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_evo.criteria.sums import Sums

_STARTS = 64  # of k-means, which finds the nearest minimum only
_LARGEST_SHARE = 1 / 8  # of a layer's experts in one group: 16 of 128 in REAM


@dataclass(frozen=True)
class Group:
    """Experts that become one. dominant: the member that leads. members: ascending."""

    dominant: int
    members: tuple[int, ...]


def dominant_groups(num_groups: int, votes: Sums, alike: Sums) -> list[Group]:
    """The experts with the most votes, each with those of the rest that are most like it (M-SMoE, alg. 1)."""
    dominants = _first(votes, num_groups)
    labels = np.asarray(dominants)[alike[:, dominants].argmax(axis=1)]
    labels[dominants] = dominants
    return _by_label(labels, votes)


def agglomerated(num_groups: int, votes: Sums, distances: Sums) -> list[Group]:
    """Hierarchical clustering: the two groups with the least mean distance between members merge, and so on."""
    if len(votes) == 1:
        return [Group(0, (0,))]
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    tree = linkage(squareform(distances, checks=False), method="average")
    # fcluster cuts at a height, and so makes fewer groups than asked for where heights are equal
    return _by_label(cut_tree(tree, n_clusters=[num_groups])[:, 0], votes)


def spectral_groups(num_groups: int, votes: Sums, alike: Sums) -> list[Group]:
    """Normalised spectral clustering (Ng, Jordan and Weiss 2002); alike: none negative."""
    if num_groups == len(votes):
        return _by_label(np.arange(len(votes)), votes)
    from scipy.linalg import eigh

    root = 1 / np.sqrt(alike.sum(axis=1))
    last = len(votes) - 1
    _, vectors = eigh(root[:, None] * alike * root, subset_by_index=[last - num_groups + 1, last])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return _by_label(k_means(vectors / np.maximum(lengths, 1e-300), num_groups), votes)


def centroid_groups(num_groups: int, votes: Sums, distances: Sums) -> list[Group]:
    """REAM's groups: the experts with the most votes, one after the other, take the nearest free experts, up to a size.

    So a few groups are large, and most experts with many votes stay alone.
    """
    size = max(math.ceil(len(votes) * _LARGEST_SHARE), math.ceil(len(votes) / num_groups))
    centroids = _first(votes, num_groups)
    labels = np.full(len(votes), -1)
    labels[centroids] = centroids
    for centroid in centroids:
        free = np.flatnonzero(labels < 0)
        nearest = free[np.argsort(distances[centroid, free], kind="stable")][: size - 1]
        labels[nearest] = centroid
    return _by_label(labels, votes)


def k_means(points: npt.NDArray[np.float64], num_groups: int) -> npt.NDArray[np.int64]:
    """Labels (n,) of points (n, d) in exactly `num_groups` groups: the best of several starts, the same each time."""
    from scipy.cluster.vq import ClusterError, kmeans2

    best, least = _farthest_first(points, num_groups), np.inf
    rng = np.random.default_rng(0)
    for _ in range(_STARTS):
        start = points[rng.choice(len(points), num_groups, replace=False)]
        try:
            centres, labels = kmeans2(points, start, iter=100, minit="matrix", missing="raise")
        except ClusterError:  # a group lost its last point
            continue
        cost = float(np.square(points - centres[labels]).sum())
        if cost < least * (1 - 1e-9) and len(np.unique(labels)) == num_groups:
            best, least = labels.astype(np.int64), cost
    return best


def _farthest_first(points: npt.NDArray[np.float64], num_groups: int) -> npt.NDArray[np.int64]:
    """Labels around points far from one another; no group is empty, even if points are equal."""
    chosen = [0]
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    while len(chosen) < num_groups:
        nearest = distances[:, chosen].min(axis=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    labels = distances[:, chosen].argmin(axis=1)
    labels[chosen] = np.arange(num_groups)
    return np.asarray(labels, dtype=np.int64)


def _first(votes: Sums, number: int) -> list[int]:
    """The `number` experts with the most votes, in that order."""
    return [int(expert) for expert in np.argsort(-votes, kind="stable")[:number]]


def _by_label(labels: Sequence[int] | npt.NDArray[np.int64], votes: Sums) -> list[Group]:
    """Groups by ascending dominant, the member with the most votes."""
    groups = []
    for label in np.unique(labels):
        members = np.flatnonzero(np.asarray(labels) == label)
        groups.append(Group(int(members[votes[members].argmax()]), tuple(map(int, members))))
    return sorted(groups, key=lambda group: group.dominant)
