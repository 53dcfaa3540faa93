"""Prunings as arrays of bits: the same prunings, and variation that stays among them."""

from __future__ import annotations

import numpy as np
import pytest

from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.masks import Masks, MaskSpace
from moe_evo.testing.searches import SPACES


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return SPACES[request.param]


def assert_inside(found: Masks, masks: MaskSpace) -> None:
    assert (found.sum(axis=-1) == masks.kept).all()
    assert not (found & ~masks.exists).any()


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
    for one in found[:20]:
        space.check(masks.genome(one))
    np.testing.assert_allclose(found.mean(axis=0), masks.shares, atol=0.05)


def test_swaps_exchange_as_many_experts_as_asked(space: SearchSpace) -> None:
    masks, rng = MaskSpace(space), np.random.default_rng(2)
    before = masks.drawn(200, rng)
    swaps = rng.integers(0, 5, 200)
    after = masks.swapped(before, swaps, rng)
    assert_inside(after, masks)
    np.testing.assert_array_equal(exchanged(before, after), np.minimum(swaps, masks.num_changes))


def test_swaps_by_worth_make_the_exchanges_that_gain_most(space: SearchSpace) -> None:
    masks, rng = MaskSpace(space), np.random.default_rng(3)
    before = masks.drawn(50, rng)
    worths = rng.normal(size=before.shape)
    one, most = (masks.swapped(before, np.full(50, number), rng, worths) for number in (1, 1000))
    assert_inside(one, masks)
    for old, new, worth in zip(before, one, worths, strict=True):
        gains = [
            worth[segment, enters] - worth[segment, leaves]
            for segment, exists in enumerate(masks.exists)
            for leaves in np.flatnonzero(old[segment])
            for enters in np.flatnonzero(~old[segment] & exists)
        ]
        if gains:
            assert worth[new].sum() - worth[old].sum() == pytest.approx(max(gains))
    assert (exchanged(before, most) == masks.num_changes).all()


def test_crossings_keep_what_both_parents_keep_and_take_nothing_from_elsewhere(space: SearchSpace) -> None:
    masks, rng = MaskSpace(space), np.random.default_rng(4)
    first, second = masks.drawn(100, rng), masks.drawn(100, rng)
    child = masks.crossed(first, second, rng)
    assert_inside(child, masks)
    assert (child >= (first & second)).all() and (child <= (first | second)).all()


def test_scores_of_experts_are_put_where_the_experts_are() -> None:
    ragged, grouped, shared = (MaskSpace(SPACES[name]) for name in ("ragged", "group-limited", "layer groups"))
    scores = [np.arange(4.0), 10 + np.arange(8.0), 20 + np.arange(6.0)]
    np.testing.assert_array_equal(ragged.by_segment(scores)[ragged.exists], np.concatenate(scores))
    scores = [np.arange(8.0) + 10 * layer for layer in range(3)]
    np.testing.assert_array_equal(grouped.by_segment(scores).ravel(), np.concatenate(scores))
    scores = [np.arange(8.0) + layer for layer in range(6)]
    np.testing.assert_array_equal(shared.by_segment(scores), [np.arange(8) + 1, np.arange(8) + 4])
