"""Non-dominated points of several objectives, all maximised: who survives, and how much a point improves a front.

The hypervolume of a front is the volume between it and a reference point that is worse in every objective. moocore is
imported where it is used, as a search is looked up long before it is run.
"""

from __future__ import annotations

import numpy as np

from moe_evo.genomes.bounds import Counts, Numbers

_MOST_COMPARED = 40  # points of a front, where some are chosen by their hypervolume
_MARGIN = 0.1  # by which the reference point is below a front, as a share of the front's range


def front_of(points: Numbers) -> Counts:
    """Places of the points (N, M) that no other one dominates, by the first objective; of equal points the first."""
    if points.shape[1] == 1:
        return np.array([points[:, 0].argmax()])
    from moocore import is_nondominated

    places = np.flatnonzero(is_nondominated(-points))
    return places[np.lexsort(points[places].T[::-1])]


def survivors(points: Numbers, number: int) -> Counts:
    """Places of the `number` best points (N, M), the best first, as NSGA-II chooses them (Deb et al. 2002).

    Front after front, and within one those first that are furthest from their neighbours.
    """
    if points.shape[1] == 1:
        return np.argsort(-points[:, 0], kind="stable")[:number]
    from moocore import pareto_rank

    ranks = pareto_rank(-points)
    distances = np.zeros(len(points))
    for rank in np.unique(ranks):  # moocore counts from 0, its first versions from 1
        distances[ranks == rank] = crowding_distances(points[ranks == rank])
    return np.lexsort((-distances, ranks))[:number]


def crowding_distances(points: Numbers) -> Numbers:
    """(N,) how far the neighbours of each point (N, M) are apart, summed over objectives; infinite at the ends."""
    distances = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        found = values[order]
        spread = float(found[-1] - found[0]) or 1.0
        distances[order[1:-1]] += (found[2:] - found[:-2]) / spread
        distances[order[[0, -1]]] = np.inf
    return distances


def reference_point(front: Numbers) -> Numbers:
    """(M,) a little below the worst of a front (F, M) in every objective."""
    low, high = front.min(axis=0), front.max(axis=0)
    reference: Numbers = low - _MARGIN * np.where(high > low, high - low, 1.0)
    return reference


def improvements(points: Numbers, front: Numbers, reference: Numbers) -> Numbers:
    """(P,) by how much each point (P, M) would increase the hypervolume of a front (F, M).

    Below 0 where it would not: the less, the further the point is from that.
    """
    clipped = np.clip(points[:, None], reference, None)
    clipped = np.clip(np.minimum(clipped, front), reference, None)
    whole = np.clip(points - reference, 0.0, None).prod(axis=1)
    scale = np.clip(front, reference, None).max(axis=0) - reference
    missing = ((front - points[:, None]) / np.where(scale > 0, scale, 1.0)).min(axis=2).max(axis=1)
    is_new = (whole > 0) & (missing < 0)
    gains: Numbers = -np.maximum(missing, 0.0)
    gains[is_new] = whole[is_new] - _volumes(clipped[is_new], front, reference)
    return gains


def spread(points: Numbers, number: int) -> Counts:
    """Places of at most `number` points of a front (F, M), in order: without them its hypervolume would shrink most.

    The best point of each objective is among them, if there is room for all of these.
    """
    reference, left = reference_point(points), sorted(survivors(points, _MOST_COMPARED).tolist())
    ends = set(points.argmax(axis=0).tolist()) if number >= points.shape[1] else set()
    while len(left) > number:
        without = [[one for one in left if one != gone] for gone in left if gone not in ends]
        volumes = [hypervolume(points[rest], reference) for rest in without]
        left = without[int(np.argmax(volumes))]
    return np.array(left, dtype=np.int64)


def hypervolume(front: Numbers, reference: Numbers) -> float:
    """The volume that the points (F, M) dominate above the reference point."""
    from moocore import hypervolume as volume

    return float(volume(-front, ref=-reference))


def _volumes(clipped: Numbers, front: Numbers, reference: Numbers) -> Numbers:
    """(P,) the part of the box below each point that the front dominates. clipped: (P, F, M) the front in each box."""
    if front.shape[1] == 1:
        found: Numbers = (clipped[..., 0] - reference[0]).max(axis=1)
        return found
    if front.shape[1] > 2:
        return np.array([hypervolume(one, reference) for one in clipped])
    order = np.lexsort((-front[:, 1], front[:, 0]))
    above = clipped[:, order] - reference
    # from the right: so high is the highest of the points that are at least as far to the right
    heights = np.maximum.accumulate(above[:, ::-1, 1], axis=1)[:, ::-1]
    volumes: Numbers = (np.diff(above[..., 0], axis=1, prepend=0.0) * heights).sum(axis=1)
    return volumes
