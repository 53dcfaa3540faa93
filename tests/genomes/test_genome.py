"""Genomes: values that do not depend on how they were written down, and that nothing can change."""

import pickle

import numpy as np
import pytest

from moe_evo.errors import GenomeError
from moe_evo.genomes.genome import Genome, LayerGenome


def _merged(seed: int = 0, num_kept: int = 2, num_experts: int = 4) -> LayerGenome:
    rng = np.random.default_rng(seed)
    return LayerGenome(rng.normal(size=(num_kept, num_experts)), rng.normal(size=(num_kept, num_experts)), 1)


def test_the_order_in_which_kept_experts_are_named_does_not_matter():
    assert LayerGenome.from_kept([3, 0, 1], 5, 2) == LayerGenome.from_kept([0, 1, 3], 5, 2)
    one_hot = np.eye(5)[[3, 0, 1]]
    assert LayerGenome(one_hot, one_hot, 2).kept == (0, 1, 3)
    assert LayerGenome(one_hot, one_hot, 2).digest == LayerGenome.from_kept([0, 1, 3], 5, 2).digest


def test_rows_of_a_merged_layer_keep_their_order():
    merging, mapping = np.eye(4)[[2, 0]], np.eye(4)[[0, 2]]
    layer = LayerGenome(merging, mapping, 1)
    assert not layer.is_pruning
    np.testing.assert_array_equal(layer.expert_merging, merging)


def test_one_hot_rows_that_repeat_an_expert_are_no_pruning():
    twice = np.eye(4)[[1, 1]]
    assert not LayerGenome(twice, twice, 1).is_pruning


def test_negative_zero_does_not_change_the_digest():
    merging = np.array([[1.0, 0.0], [0.5, 1.0]])
    negative = np.array([[1.0, -0.0], [0.5, 1.0]])
    assert LayerGenome(merging, merging, 1) == LayerGenome(negative, merging, 1)


@pytest.mark.parametrize("change", ["expert_merging", "router_mapping", "top_k"])
def test_every_part_of_a_layer_changes_the_digest(change):
    layer = _merged()
    parts = {
        "expert_merging": layer.expert_merging,
        "router_mapping": layer.router_mapping,
        "top_k": layer.top_k,
    }
    parts[change] = parts[change] + 1
    assert LayerGenome(**parts).digest != layer.digest


def test_the_digest_is_the_same_in_every_process_and_version():
    assert Genome.from_kept([[0, 3], [1, 2]], 4, 2).digest == "9486c7236ccf9e7b1dd826ca4073a78d"


def test_the_order_of_layers_changes_the_digest():
    assert Genome((_merged(0), _merged(1))) != Genome((_merged(1), _merged(0)))


def test_pickling_keeps_value_and_freezes_again():
    genome = Genome((_merged(), LayerGenome.from_kept([1, 2], 4, 1)))
    loaded = pickle.loads(pickle.dumps(genome))
    assert loaded == genome and hash(loaded) == hash(genome)
    for layer in loaded.layers:
        assert not layer.expert_merging.flags.writeable and not layer.router_mapping.flags.writeable


def test_arrays_of_a_genome_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        _merged().expert_merging[0, 0] = 1
    with pytest.raises(AttributeError):
        _merged().top_k = 2


def test_the_constructor_copies_its_arrays():
    merging = np.eye(3, dtype=np.float32)
    layer = LayerGenome(merging, merging, 1)
    merging[0, 0] = 7
    assert layer.expert_merging[0, 0] == 1 and merging.flags.writeable


def test_keeping_every_expert_is_the_identity():
    assert LayerGenome.from_kept(range(4), 4, 2).is_identity
    assert not LayerGenome.from_kept(range(3), 4, 2).is_identity
    assert not _merged(num_kept=4).is_identity


def test_kept_names_the_largest_entry_of_each_slot_in_magnitude():
    layer = LayerGenome([[0.2, -0.9, 0.1], [0.0, 0.1, 0.7]], np.ones((2, 3)), 1)
    assert layer.kept == (1, 2)
    assert not layer.is_pruning


def test_numbers_for_all_layers_may_be_given_once():
    assert Genome.from_kept([[0], [1]], 3, 1) == Genome.from_kept([[0], [1]], [3, 3], [1, 1])
    assert Genome.from_kept([[0], [1, 2]], 3, 1).num_kept == (1, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LayerGenome(np.ones(3), np.ones(3), 1), r"shape \(3,\)"),
        (lambda: LayerGenome(np.ones((0, 3)), np.ones((0, 3)), 1), r"shape \(0, 3\)"),
        (lambda: LayerGenome([[np.nan, 1]], [[0, 1]], 1), "NaN or infinity"),
        (lambda: LayerGenome(np.ones((3, 2)), np.ones((3, 2)), 1), "at most all"),
        (lambda: LayerGenome(np.ones((1, 2)), np.ones((1, 3)), 1), "router_mapping: got shape"),
        (lambda: LayerGenome(np.eye(2), np.eye(2), 3), "top_k: got 3 with 2"),
        (lambda: LayerGenome(np.eye(2), np.eye(2), 0), "top_k: got 0"),
        (lambda: LayerGenome.from_kept([0, 0], 4, 1), "at most once"),
        (lambda: LayerGenome.from_kept([4], 4, 1), "experts 0 to 3"),
        (lambda: LayerGenome.from_kept([-1], 4, 1), "experts 0 to 3"),
        (lambda: LayerGenome.from_kept([], 4, 1), "experts 0 to 3"),
        (lambda: Genome(()), "no layers"),
        (lambda: Genome.from_kept([[0], [1]], [4], 1), "2 layers, 1 num_experts"),
    ],
)
def test_a_malformed_genome_is_an_error_that_says_what_was_got(build, message):
    with pytest.raises(GenomeError, match=message):
        build()
