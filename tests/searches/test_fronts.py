"""Non-dominated points: against brute force, moocore and the definitions."""

from __future__ import annotations

import moocore
import numpy as np
import pytest

from moe_evo.searches.fronts import (
    crowding_distances,
    front_of,
    hypervolume,
    improvements,
    reference_point,
    spread,
    survivors,
)

OBJECTIVES = (1, 2, 3, 4)


def points_of(number: int, objectives: int, seed: int = 0, *, coarse: bool = False) -> np.ndarray:
    points = np.random.default_rng([seed, objectives]).random((number, objectives))
    return np.round(points, 1) if coarse else points


def dominates(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one >= other).all() and (one > other).any())


@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_a_front_holds_what_nothing_dominates_each_once(objectives: int) -> None:
    points = points_of(60, objectives, coarse=True)
    found = front_of(points)
    wanted = [one for one in points if not any(dominates(other, one) for other in points)]
    np.testing.assert_array_equal(np.unique(points[found], axis=0), np.unique(wanted, axis=0))
    assert len(np.unique(points[found], axis=0)) == len(found)
    assert (np.diff(points[found, 0]) >= 0).all()


@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_the_gain_of_a_point_is_the_difference_of_hypervolumes(objectives: int) -> None:
    points = points_of(200, objectives, seed=1) * 1.4 - 0.2
    front = points_of(20, objectives, seed=2)
    front = front[front_of(front)]
    reference = reference_point(front)
    assert (reference < front).all()
    found = improvements(points, front, reference)
    before = hypervolume(front, reference)
    wanted = [hypervolume(np.vstack([front, one]), reference) - before for one in points]
    np.testing.assert_allclose(np.maximum(found, 0), wanted, atol=1e-12)
    assert (found[np.array(wanted) > 1e-9] > 0).all() and (found > 0).any()


def test_of_points_that_gain_nothing_the_nearer_one_is_before_the_other() -> None:
    front = np.array([[0.0, 1.0], [1.0, 0.0]])
    near, far, new = improvements(np.array([[0.9, -0.05], [0.2, -0.8], [0.5, 0.5]]), front, reference_point(front))
    assert far < near <= 0 < new


def survivors_by_definition(points: np.ndarray, number: int) -> set[int]:
    """Deb et al. 2002: front after front, the last one by crowding distance."""
    left, kept = set(range(len(points))), []
    while len(kept) < number:
        front = [one for one in sorted(left) if not any(dominates(points[other], points[one]) for other in left)]
        room = number - len(kept)
        distances = crowding_distances(points[front])
        kept += [front[place] for place in np.argsort(-distances, kind="stable")[:room]]
        left -= set(front)
    return set(kept)


@pytest.mark.parametrize("objectives", OBJECTIVES[1:])
@pytest.mark.parametrize("number", [1, 5, 20, 39, 40])
def test_survivors_are_those_of_the_definition(objectives: int, number: int) -> None:
    points = points_of(40, objectives, seed=3)
    found = survivors(points, number)
    assert set(found.tolist()) == survivors_by_definition(points, number) and len(found) == number
    ranks = moocore.pareto_rank(-points)[found]
    assert (np.diff(ranks) >= 0).all()


def test_with_one_objective_the_best_survive() -> None:
    points = points_of(30, 1)
    np.testing.assert_array_equal(survivors(points, 7), np.argsort(-points[:, 0])[:7])


def test_crowding_distances_are_those_of_the_paper() -> None:
    points = np.array([[0.0, 4.0], [1.0, 3.0], [3.0, 1.0], [4.0, 0.0]])
    np.testing.assert_allclose(crowding_distances(points), [np.inf, 1.5, 1.5, np.inf])
    np.testing.assert_allclose(crowding_distances(np.array([[1.0, 2.0]])), [np.inf])
    np.testing.assert_allclose(crowding_distances(np.ones((4, 2)))[1:3], 0)


def test_a_spread_keeps_the_ends_and_leaves_out_what_adds_least() -> None:
    front = np.array([[0.0, 1.0], [0.5, 0.75], [0.51, 0.74], [0.8, 0.5], [1.0, 0.0]])
    assert spread(front, 4).tolist() in ([0, 1, 3, 4], [0, 2, 3, 4])
    assert spread(front, 10).tolist() == [0, 1, 2, 3, 4]
    assert {0, 4} <= set(spread(front, 3).tolist())


def test_the_spread_of_a_long_front_is_found_in_time() -> None:
    angle = np.linspace(0, np.pi / 2, 500)
    found = spread(np.column_stack([np.cos(angle), np.sin(angle)]), 10)
    assert len(found) == 10 and {0, 499} <= set(found.tolist())
