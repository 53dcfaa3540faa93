"""Operators: children stay in the space, differ from their parents and follow the rates given."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.operators import (
    gaussian_mutation,
    layer_crossover,
    narrowed,
    normalise_rows,
    parent_pool,
    random_pruning,
    row_crossover,
    swap_mutation,
)
from moe_evo.genomes.population import Candidate, Evaluation, Individual, Population
from moe_evo.genomes.space import ModelShape, SearchSpace

many = settings(derandomize=True, deadline=None, max_examples=60, database=None)
RATES = st.floats(0.01, 1.0)


def _space(num_layers=3, num_experts=8, num_kept=4, expert_groups=1, **options) -> SearchSpace:
    shape = ModelShape(
        "mixtral", (num_experts,) * num_layers, (1,) * num_layers, tuple(range(num_layers)), expert_groups
    )
    return SearchSpace.build(shape, num_kept=num_kept, **options)


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Spaces with ragged num_kept, shared genes or group-limited routers."""
    num_layers, expert_groups = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 2, 3]))
    size = draw(st.integers(1, 5))
    per_group = st.integers(1, size)
    if draw(st.booleans()):
        num_kept = [draw(per_group) * expert_groups for _ in range(num_layers)]
        return _space(num_layers, size * expert_groups, num_kept, expert_groups)
    groups, num_kept = draw(st.integers(1, num_layers)), draw(per_group) * expert_groups
    return _space(num_layers, size * expert_groups, num_kept, expert_groups, num_layer_groups=groups)


rngs = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def _assert_pruning_of(space: SearchSpace, genome: Genome) -> None:
    assert genome.is_pruning
    space.check(genome)
    for layers in space.layer_groups:
        assert len({genome.layers[layer] for layer in layers}) == 1
    for group, layers in enumerate(space.layer_groups):
        kept = genome.kept[layers[0]]
        assert all(low < high for low, high in pairwise(kept))
        assert all(expert in space.expert_group(group, slot) for slot, expert in enumerate(kept))


def _swaps(parent: Genome, child: Genome) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(parent.kept, child.kept, strict=True))


@many
@given(spaces(), rngs)
def test_random_prunings_are_sorted_distinct_and_within_the_expert_groups(space, rng):
    _assert_pruning_of(space, random_pruning(space, rng))


def test_random_prunings_keep_every_expert_equally_often():
    space, rng = _space(1, 8, 4, expert_groups=2), np.random.default_rng(0)
    kept = np.array([random_pruning(space, rng).kept[0] for _ in range(4000)])
    shares = np.bincount(kept.ravel()) / 4000
    np.testing.assert_allclose(shares, 0.5, atol=0.03)


@many
@given(spaces(), rngs, RATES, st.floats(0, 1))
def test_a_swap_mutation_is_a_pruning_of_the_space_with_at_least_one_real_swap(space, rng, layer_rate, rate):
    parent = random_pruning(space, rng)
    before = parent.digest
    child = swap_mutation(parent, space, rng, layer_rate=layer_rate, swap_rate=rate)
    _assert_pruning_of(space, child)
    assert (_swaps(parent, child) >= 1) == space.can_prune
    assert parent.digest == before and Genome(parent.layers).digest == before


def test_a_swap_mutation_with_rate_zero_swaps_exactly_one_slot_anywhere():
    space, rng = _space(3, 6, 2), np.random.default_rng(1)
    parent = random_pruning(space, rng)
    children = [swap_mutation(parent, space, rng, layer_rate=1.0, swap_rate=0.0) for _ in range(900)]
    assert {_swaps(parent, child) for child in children} == {1}
    assert len(set(children)) == 3 * 2 * 4  # layers, slots, unused experts


def test_swap_mutations_change_the_share_of_slots_that_the_rates_say():
    space, rng = _space(40, 64, 16), np.random.default_rng(2)
    parent = random_pruning(space, rng)
    children = [swap_mutation(parent, space, rng, layer_rate=0.25, swap_rate=0.15) for _ in range(60)]
    share = np.mean([_swaps(parent, child) for child in children]) / (40 * 16)
    assert share == pytest.approx(0.25 * 0.15, rel=0.1)


def test_swap_mutations_replace_no_more_slots_than_there_are_unused_experts():
    space, rng = _space(5, 8, 7), np.random.default_rng(3)
    parent = random_pruning(space, rng)
    child = swap_mutation(parent, space, rng, layer_rate=1.0, swap_rate=1.0)
    _assert_pruning_of(space, child)
    assert _swaps(parent, child) == 5


@many
@given(spaces(), rngs, RATES, st.floats(0, 1), st.sampled_from([1e-12, 0.065, 1.0]))
def test_a_gaussian_mutation_changes_an_entry_and_stays_in_the_space(space, rng, layer_rate, rate, sigma):
    parent = random_pruning(space, rng)
    child = gaussian_mutation(parent, space, rng, layer_rate=layer_rate, entry_rate=rate, sigma=sigma)
    space.check(child)
    assert child != parent
    assert space.genome(space.genes(child)) == child


def _differences(space, parent, child):
    """(2G, K, E) changes of every matrix of every layer group."""
    pairs = list(zip(space.genes(parent), space.genes(child), strict=True))
    merging = [new.expert_merging - old.expert_merging for old, new in pairs]
    mapping = [new.router_mapping - old.router_mapping for old, new in pairs]
    return np.array(merging + mapping)


def test_gaussian_mutations_change_the_share_of_entries_that_the_rates_say_by_sigma():
    space, rng = _space(40, 16, 8), np.random.default_rng(4)
    parent = random_pruning(space, rng)
    rates = {"layer_rate": 0.25, "entry_rate": 0.2, "sigma": 0.065}
    changes = np.array([_differences(space, parent, gaussian_mutation(parent, space, rng, **rates)) for _ in range(20)])
    active = changes.any(axis=(2, 3))
    assert active.mean() == pytest.approx(0.25, rel=0.1)
    assert (changes[active] != 0).mean() == pytest.approx(0.2, rel=0.03)
    assert changes[changes != 0].std() == pytest.approx(0.065, rel=0.03)
    assert abs(changes[changes != 0].mean()) < 0.001
    both = active[:, :40] & active[:, 40:]  # W_EM and W_RM are drawn apart
    assert both.mean() == pytest.approx(0.25**2, rel=0.35)


def test_a_gaussian_mutation_with_rate_zero_changes_one_entry():
    space, rng = _space(), np.random.default_rng(5)
    parent = random_pruning(space, rng)
    child = gaussian_mutation(parent, space, rng, layer_rate=1e-9, entry_rate=0.0, sigma=0.065)
    assert (_differences(space, parent, child) != 0).sum() == 1


@many
@given(spaces(), rngs, RATES, st.floats(0, 1))
def test_row_crossover_of_prunings_never_duplicates_an_expert(space, rng, layer_rate, bias):
    first, second = random_pruning(space, rng), random_pruning(space, rng)
    child = row_crossover(first, second, space, rng, layer_rate=layer_rate, bias=bias)
    _assert_pruning_of(space, child)
    for one, other, kept in zip(first.kept, second.kept, child.kept, strict=True):
        assert set(kept) <= set(one) | set(other)


def test_row_crossover_of_prunings_takes_rows_of_the_first_with_the_probability_given():
    space, rng = _space(100, 16, 8), np.random.default_rng(11)
    even, odd = (Genome.from_kept([range(first, 16, 2)] * 100, 16, 1) for first in (0, 1))
    for bias in (0.0, 0.6, 1.0):
        child = row_crossover(even, odd, space, rng, layer_rate=1.0, bias=bias)
        assert (np.array(child.kept) % 2 == 0).mean() == pytest.approx(bias, abs=0.05)
    child = row_crossover(even, odd, space, rng, layer_rate=0.01, bias=0.6)
    whole = [layer in (even.layers[0], odd.layers[0]) for layer in child.layers]
    assert np.mean(whole) > 0.9


@many
@given(spaces(), rngs)
def test_a_crossover_of_equal_parents_is_the_parent(space, rng):
    parent = random_pruning(space, rng)
    assert row_crossover(parent, parent, space, rng, layer_rate=0.5, bias=0.5) == parent
    assert layer_crossover(parent, parent, space, rng, bias=0.5) == parent


@many
@given(spaces(), rngs, RATES)
def test_row_crossover_of_merged_genomes_takes_whole_rows_of_either_parent(space, rng, layer_rate):
    rates = {"layer_rate": 1.0, "entry_rate": 1.0, "sigma": 1.0}
    first, second = (gaussian_mutation(random_pruning(space, rng), space, rng, **rates) for _ in range(2))
    child = row_crossover(first, second, space, rng, layer_rate=layer_rate, bias=0.6)
    space.check(child)
    for name in ("expert_merging", "router_mapping"):
        for parts in zip(first.layers, second.layers, child.layers, strict=True):
            one, other, new = (getattr(layer, name) for layer in parts)
            assert ((new == one).all(axis=1) | (new == other).all(axis=1)).all()


def test_row_crossover_mixes_the_two_matrices_of_merged_genomes_independently():
    space, rng = _space(50, 8, 8), np.random.default_rng(6)
    ones, twos = (Genome((LayerGenome(np.full((8, 8), n), np.full((8, 8), n), 1),) * 50) for n in (1, 2))
    child = row_crossover(ones, twos, space, rng, layer_rate=1.0, bias=0.6)
    merging = np.array([layer.expert_merging[:, 0] == 1 for layer in child.layers])
    mapping = np.array([layer.router_mapping[:, 0] == 1 for layer in child.layers])
    assert merging.mean() == pytest.approx(0.6, abs=0.06)
    assert mapping.mean() == pytest.approx(0.6, abs=0.06)
    assert (merging & mapping).mean() == pytest.approx(0.36, abs=0.06)


def test_row_crossover_takes_inactive_matrices_whole():
    space, rng = _space(200, 8, 8), np.random.default_rng(7)
    ones, twos = (Genome((LayerGenome(np.full((8, 8), n), np.full((8, 8), n), 1),) * 200) for n in (1, 2))
    child = row_crossover(ones, twos, space, rng, layer_rate=0.01, bias=0.6)
    shares = np.array([(layer.expert_merging == 1).mean() for layer in child.layers])
    assert np.isin(shares, [0, 1]).mean() > 0.95
    assert shares.mean() == pytest.approx(0.6, abs=0.1)


@many
@given(spaces(), rngs, st.floats(0, 1))
def test_layer_crossover_takes_each_layer_group_whole(space, rng, bias):
    first, second = random_pruning(space, rng), random_pruning(space, rng)
    child = layer_crossover(first, second, space, rng, bias=bias)
    _assert_pruning_of(space, child)
    for one, other, new in zip(first.layers, second.layers, child.layers, strict=True):
        assert new in (one, other)


def test_layer_crossover_takes_the_first_parent_with_the_probability_given():
    space, rng = _space(60, 32, 8), np.random.default_rng(8)
    first, second = random_pruning(space, rng), random_pruning(space, rng)
    children = [layer_crossover(first, second, space, rng, bias=0.6) for _ in range(50)]
    share = np.mean([[new == one for new, one in zip(c.layers, first.layers, strict=True)] for c in children])
    assert share == pytest.approx(0.6, abs=0.03)


def test_normalised_rows_sum_to_one_and_rows_near_zero_stay():
    merging = np.array([[2.0, 1.0, 1.0], [1.0, -0.99, 0.0], [-0.5, 0.0, 0.0]])
    mapping = np.full((3, 3), 7.0)
    layer = normalise_rows(Genome((LayerGenome(merging, mapping, 1),))).layers[0]
    expected = np.array([[0.5, 0.25, 0.25], [1.0, -0.99, 0.0], [1.0, 0.0, 0.0]], dtype=np.float32)
    np.testing.assert_array_equal(layer.expert_merging, expected)
    np.testing.assert_array_equal(layer.router_mapping, mapping)


@many
@given(spaces(), rngs)
def test_normalising_a_pruning_changes_nothing(space, rng):
    parent = random_pruning(space, rng)
    assert normalise_rows(parent) == parent


@pytest.mark.parametrize("seed", range(3))
def test_operators_depend_on_the_generator_alone(seed):
    space = _space(4, 8, 4)
    first, second = random_pruning(space, np.random.default_rng(9)), space.shape.identity()
    second = random_pruning(space, np.random.default_rng(10))
    operators = [
        lambda rng: random_pruning(space, rng),
        lambda rng: swap_mutation(first, space, rng, layer_rate=0.5, swap_rate=0.5),
        lambda rng: gaussian_mutation(first, space, rng, layer_rate=0.5, entry_rate=0.5, sigma=0.1),
        lambda rng: row_crossover(first, second, space, rng, layer_rate=0.5, bias=0.5),
        lambda rng: layer_crossover(first, second, space, rng, bias=0.5),
    ]
    for operator in operators:
        assert operator(np.random.default_rng(seed)) == operator(np.random.default_rng(seed))


def _population(fitness, standard_error=0.0):
    genome = Genome.from_kept([[0]], 2, 1)
    return Population(
        tuple(
            Individual(Candidate(number, genome, "random_pruning"), Evaluation(value, 0.0, standard_error))
            for number, value in enumerate(fitness)
        )
    )


@pytest.mark.parametrize(
    ("margin", "minimum", "unit", "numbers"),
    [
        (1.0, 1, "standard_errors", [2, 0]),
        (2.0, 1, "standard_errors", [2, 0, 3]),
        (0.0, 1, "standard_errors", [2]),
        (0.0, 3, "standard_errors", [2, 0, 3]),
        (0.03, 1, "fitness", [2, 0]),
        (0.03, 9, "fitness", [2, 0, 3, 1]),
    ],
)
def test_parents_are_those_within_the_margin_and_at_least_the_minimum_by_rank(margin, minimum, unit, numbers):
    pool = parent_pool(_population([0.54, 0.2, 0.57, 0.48], 0.05), margin, minimum, unit)
    assert [one.number for one in pool] == numbers


def test_an_empty_population_has_no_parents():
    assert parent_pool(Population(), 1.0, 2) == ()


def test_a_narrowed_pruning_keeps_only_experts_of_its_parent():
    wide, narrow = _space(num_kept=6), _space(num_kept=3)
    rng = np.random.default_rng(0)
    parent = random_pruning(wide, rng)
    children = {narrowed(parent, narrow, rng) for _ in range(30)}
    assert len(children) > 10
    for child in children:
        narrow.check(child)
        assert all(set(few) <= set(many) for few, many in zip(child.kept, parent.kept, strict=True))


@many
@given(spaces(), rngs, RATES, st.data())
def test_groups_before_the_first_stay_those_of_the_parent(space, rng, rate, data):
    first_group = data.draw(st.integers(0, len(space.layer_groups) - 1))
    one, other = random_pruning(space, rng), random_pruning(space, rng)
    merged = gaussian_mutation(one, space, rng, layer_rate=1.0, entry_rate=1.0, sigma=0.1)
    swapped = swap_mutation(one, space, rng, layer_rate=rate, swap_rate=rate, first_group=first_group)
    children = [
        (
            merged,
            gaussian_mutation(merged, space, rng, layer_rate=rate, entry_rate=rate, sigma=0.1, first_group=first_group),
        ),
        (one, row_crossover(one, other, space, rng, layer_rate=rate, bias=0.5, first_group=first_group)),
        (merged, row_crossover(merged, other, space, rng, layer_rate=rate, bias=0.5, first_group=first_group)),
        (one, layer_crossover(one, other, space, rng, bias=0.5, first_group=first_group)),
    ]
    later = [gene for gene in space.genes(one)[first_group:] if gene.num_kept < gene.num_experts]
    if later:  # else an earlier group is all that a swap can change
        children.append((one, swapped))
        assert swapped != one
    for parent, child in children:
        space.check(child)
        assert space.genes(child)[:first_group] == space.genes(parent)[:first_group]
    assert children[0][1] != merged
