"""Numbers between bounds, against trying all of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moe_evo.genomes.bounds import Bounds

CASES = {
    "shared": Bounds((1, 1, 1), (4, 4, 4), total=7),
    "in steps": Bounds((2, 2, 4), (6, 8, 4), step=2, total=12),
    "free": Bounds((1, 2), (3, 3)),
    "fixed": Bounds.fixed([3, 1]),
    "at the bottom": Bounds((1, 1), (4, 4), total=2),
}


@pytest.fixture(params=CASES)
def bounds(request: pytest.FixtureRequest) -> Bounds:
    return CASES[request.param]


def all_of(bounds: Bounds) -> list[tuple[int, ...]]:
    ranges = [range(low, most + 1, bounds.step) for low, most in zip(bounds.fewest, bounds.most, strict=True)]
    return [one for one in product(*ranges) if bounds.total in (None, sum(one))]


def test_the_order_visits_all_numbers_once_and_begins_again(bounds: Bounds) -> None:
    wanted = all_of(bounds)
    found = [wanted[0]]
    for _ in range(len(wanted)):
        found.append(bounds.following(found[-1]))
    assert found == [*wanted, wanted[0]]


def test_drawn_numbers_are_within_the_bounds_and_any_may_come(bounds: Bounds) -> None:
    drawn = [tuple(one) for one in bounds.drawn(3000, np.random.default_rng(0)).tolist()]
    assert set(drawn) == set(all_of(bounds))
    assert all(map(bounds.holds, drawn))


def test_numbers_out_of_the_bounds_are_not_held(bounds: Bounds) -> None:
    inside = set(all_of(bounds))
    for one in product(range(10), repeat=len(bounds.fewest)):
        assert bounds.holds(one) == (one in inside)


def test_even_numbers_are_the_same_in_all_layer_groups() -> None:
    assert (Bounds((1, 1, 1), (4, 4, 4), total=9).drawn(5, np.random.default_rng(1), even=True) == 3).all()
    drawn = Bounds((2, 2), (6, 6), step=2).drawn(100, np.random.default_rng(2), even=True)
    assert {tuple(one) for one in drawn.tolist()} == {(2, 2), (4, 4), (6, 6)}


def test_layers_go_apart_further_than_by_chance_alone() -> None:
    bounds = Bounds((1,) * 10, (64,) * 10, total=320)
    assert bounds.drawn(200, np.random.default_rng(3)).std() > 6  # 4 for experts drawn alike


def test_the_highest_steps_are_taken_one_after_the_other() -> None:
    bounds = Bounds((1, 1), (3, 2))
    gains = np.array([[[5.0, 1.0], [4.0, 3.0]]])
    assert [bounds.highest(gains, np.array([wanted])).tolist()[0] for wanted in range(4)] == [
        [0, 0], [1, 0], [1, 1], [2, 1],
    ]  # fmt: skip
