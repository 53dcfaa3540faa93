"""Prunings as arrays of bits: the same prunings, and variation that stays among them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.masks import MaskSpace
from moe_evo.searches.steps import Masks
from moe_evo.testing.searches import SPACES, space_of

FREE = {
    "free": space_of([8] * 3, {"min": 2, "max": 6}, expert_groups=2),
    "free top_k": space_of([8] * 3, 4, top_k=3, varies_top_k=True),
    "both free": space_of([6] * 4, {"min": 2, "max": 6}, top_k=2, num_layer_groups=2, varies_top_k=True),
}
ALL = SPACES | FREE
VARYING = {name: space for name, space in ALL.items() if MaskSpace(space).varying}


@pytest.fixture(params=ALL)
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return ALL[request.param]


@pytest.fixture(params=VARYING)
def varying(request: pytest.FixtureRequest) -> SearchSpace:
    return VARYING[request.param]


def assert_inside(found: Masks, masks: MaskSpace) -> None:
    assert not (found & ~masks.exists).any()
    for one in found[:100]:
        genome = masks.genome(one)
        masks.space.check(genome)
        np.testing.assert_array_equal(masks.masks([genome])[0], one)


def exchanged(before: Masks, after: Masks) -> np.ndarray:
    return (before & ~after).sum(axis=(1, 2))


def test_masks_and_genomes_are_the_same_prunings(space: SearchSpace) -> None:
    masks, rng = MaskSpace(space), np.random.default_rng(0)
    genomes = [random_pruning(space, rng) for _ in range(20)]
    found = masks.masks(genomes)
    assert_inside(found, masks)
    assert [masks.genome(one) for one in found] == genomes


def test_random_masks_are_prunings_of_the_space_that_keep_every_expert_equally_often(space: SearchSpace) -> None:
    masks = MaskSpace(space)
    found = masks.drawn(4000, np.random.default_rng(1))
    assert_inside(found, masks)
    np.testing.assert_allclose(found.mean(axis=0), masks.shares, atol=0.05)


def test_swaps_exchange_as_many_experts_as_asked(space: SearchSpace) -> None:
    masks, rng = MaskSpace(space), np.random.default_rng(2)
    before = masks.drawn(200, rng)
    swaps = rng.integers(0, 5, 200)
    after = masks.swapped(before, swaps, rng)
    assert_inside(after, masks)
    own = masks.kept.segments
    limit = np.minimum(before[:, own].sum(axis=-1), (~before & masks.exists)[:, own].sum(axis=-1)).sum(axis=-1)
    np.testing.assert_array_equal(exchanged(before, after), np.minimum(swaps, limit))
    np.testing.assert_array_equal(before.sum(axis=-1), after.sum(axis=-1))


def test_swaps_by_worth_make_the_exchanges_that_gain_most(space: SearchSpace) -> None:
    masks, rng = MaskSpace(space), np.random.default_rng(3)
    before = masks.drawn(50, rng)
    worths = rng.normal(size=before.shape)
    one, most = (masks.swapped(before, np.full(50, number), rng, worths) for number in (1, 1000))
    assert_inside(one, masks)
    for old, new, worth in zip(before, one, worths, strict=True):
        gains = [
            worth[segment, enters] - worth[segment, leaves]
            for segment, exists in enumerate(masks.exists[masks.kept.segments])
            for leaves in np.flatnonzero(old[segment])
            for enters in np.flatnonzero(~old[segment] & exists)
        ]
        if gains:
            assert worth[new].sum() - worth[old].sum() == pytest.approx(max(gains))
    if not masks.varying:
        assert (exchanged(before, most) == masks.num_changes).all()


def test_crossings_keep_what_both_parents_keep_and_take_nothing_from_elsewhere(space: SearchSpace) -> None:
    masks, rng = MaskSpace(space), np.random.default_rng(4)
    first, second = masks.drawn(100, rng), masks.drawn(100, rng)
    child = masks.crossed(first, second, rng)
    assert_inside(child, masks)
    if not masks.varying:
        assert (child >= (first & second)).all() and (child <= (first | second)).all()


def test_a_child_is_brought_back_to_the_budget_by_its_parents_experts() -> None:
    masks, rng = MaskSpace(SPACES["shared"]), np.random.default_rng(5)
    first, second = masks.drawn(300, rng), masks.drawn(300, rng)
    child = masks.crossed(first, second, rng)
    assert (masks.kept.totals(child) == 16).all()
    foreign = (child & ~(first | second)).sum(axis=(1, 2))
    assert foreign.mean() < 0.2 and len({tuple(one) for one in masks.kept.numbers(child).tolist()}) > 20


def test_even_prunings_have_the_same_numbers_in_every_layer(varying: SearchSpace) -> None:
    masks, rng = MaskSpace(varying), np.random.default_rng(6)
    worths = rng.normal(size=(50, *masks.exists.shape))
    for found in (masks.drawn(50, rng, even=True), masks.best(worths, rng, even=True)):
        assert_inside(found, masks)
        for steps in masks.varying:
            assert all(len(set(numbers)) == 1 for numbers in steps.numbers(found).tolist())


def test_moves_change_the_numbers_of_layers_and_keep_their_sum_where_as_many_leave(varying: SearchSpace) -> None:
    masks, rng = MaskSpace(varying), np.random.default_rng(7)
    before = masks.drawn(200, rng)
    for steps in masks.varying:
        taken = steps.taken(before).sum(axis=1)
        moves = np.minimum(1, np.minimum(taken, steps.bounds.steps.sum() - taken))
        for worths in (None, rng.normal(size=before.shape)):
            after = masks.moved(before, steps, moves, moves, rng, worths)
            assert_inside(after, masks)
            np.testing.assert_array_equal(steps.totals(before), steps.totals(after))
            assert (steps.numbers(before) != steps.numbers(after)).any()


def test_moves_by_worth_take_the_least_and_bring_the_most() -> None:
    masks, rng = MaskSpace(space_of([6] * 3, {"mean": 3, "min": 1, "max": 5})), np.random.default_rng(8)
    before = masks.drawn(100, rng)
    worths = rng.normal(size=before.shape)
    one = np.ones(100, dtype=np.int64)
    after = masks.moved(before, masks.kept, one, one, rng, worths)
    for old, new, worth in zip(before, after, worths, strict=True):
        counts = old.sum(axis=-1)
        enters = max(worth[segment][~old[segment]].max() for segment in range(3) if counts[segment] < 5)
        leaves = min(worth[segment][old[segment]].min() for segment in range(3) if counts[segment] > 1)
        assert worth[new].sum() - worth[old].sum() == pytest.approx(enters - leaves)


def test_the_best_of_a_shared_budget_are_the_highest_keys_of_all_layers_within_bounds() -> None:
    """Against trying every way to share 6 experts among 3 layers of 1 to 3 each."""
    space = space_of([4] * 3, {"mean": 2, "min": 1, "max": 3})
    masks, rng = MaskSpace(space), np.random.default_rng(9)
    keys = rng.normal(size=(40, 3, 4))
    found = masks.best(keys, rng)
    assert_inside(found, masks)
    shares = [one for one in product((1, 2, 3), repeat=3) if sum(one) == 6]
    sums = (-np.sort(-keys, axis=-1)).cumsum(axis=-1)
    totals = [
        max(sum(one[layer, number - 1] for layer, number in enumerate(share)) for share in shares) for one in sums
    ]
    np.testing.assert_allclose((keys * found).sum(axis=(1, 2)), totals)


def test_scores_of_experts_are_put_where_the_experts_are() -> None:
    ragged, grouped, shared = (MaskSpace(SPACES[name]) for name in ("ragged", "group-limited", "layer groups"))
    scores = [np.arange(4.0), 10 + np.arange(8.0), 20 + np.arange(6.0)]
    np.testing.assert_array_equal(ragged.by_segment(scores)[ragged.exists], np.concatenate(scores))
    scores = [np.arange(8.0) + 10 * layer for layer in range(3)]
    np.testing.assert_array_equal(grouped.by_segment(scores).ravel(), np.concatenate(scores))
    scores = [np.arange(8.0) + layer for layer in range(6)]
    np.testing.assert_array_equal(shared.by_segment(scores), [np.arange(8) + 1, np.arange(8) + 4])
