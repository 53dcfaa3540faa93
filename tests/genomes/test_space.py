"""Search spaces: what cannot work is refused when the space is built."""

import json

import numpy as np
import pytest

from moe_evo.errors import ConfigError, GenomeError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import ModelShape, SearchSpace, check_fits


def _shape(num_layers: int = 4, num_experts: int = 8, top_k: int = 2, **limits: int) -> ModelShape:
    layers = tuple(range(num_layers))
    return ModelShape("mixtral", (num_experts,) * num_layers, (top_k,) * num_layers, layers, **limits)


LIMITED = {"num_expert_groups": 4, "top_k_groups": 2, "min_kept_per_group": 2}


def test_defaults_are_the_models_top_k_and_genes_for_every_layer():
    space = SearchSpace.build(_shape(), num_kept=4)
    assert space.num_kept == (4, 4, 4, 4) and space.top_k == (2, 2, 2, 2)
    assert space.layer_groups == ((0,), (1,), (2,), (3,))


@pytest.mark.parametrize(
    ("num_layers", "num_groups", "sizes"),
    [(32, 4, [8, 8, 8, 8]), (5, 2, [2, 3]), (3, 1, [3]), (7, 3, [2, 3, 2])],
)
def test_layer_groups_are_consecutive_and_nearly_equal(num_layers, num_groups, sizes):
    space = SearchSpace.build(_shape(num_layers), num_kept=4, num_layer_groups=num_groups)
    assert [len(group) for group in space.layer_groups] == sizes
    assert [layer for group in space.layer_groups for layer in group] == list(range(num_layers))


def test_genes_and_genome_are_inverse():
    space = SearchSpace.build(_shape(), num_kept=2, num_layer_groups=2)
    genome = Genome.from_kept([[0, 1], [0, 1], [2, 5], [2, 5]], 8, 2)
    assert [gene.kept for gene in space.genes(genome)] == [(0, 1), (2, 5)]
    assert space.genome(space.genes(genome)) == genome


def test_a_list_gives_each_layer_its_own_num_kept():
    space = SearchSpace.build(_shape(), num_kept=[2, 4, 8, 3])
    assert space.num_kept == (2, 4, 8, 3) and space.can_prune


def test_a_space_that_keeps_all_experts_cannot_prune():
    space = SearchSpace.build(_shape(), num_kept=8)
    assert not space.can_prune
    space.check(space.shape.identity())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kept": 0}, "give 1 to 8"),
        ({"num_kept": 9}, "give 1 to 8"),
        ({"num_kept": 1}, "top_k 2"),
        ({"num_kept": 4, "top_k": 5}, "top_k 5"),
        ({"num_kept": 6, "multiple_of": 4}, "multiple of search.multiple_of 4"),
        ({"num_kept": [4, 4]}, "2 numbers, the model has 4"),
        ({"num_kept": 4, "num_layer_groups": 5}, "give 1 to 4"),
        ({"num_kept": 4, "num_layer_groups": 0}, "give 1 to 4"),
        ({"num_kept": [2, 4, 4, 4], "num_layer_groups": 2}, r"layers \[0, 1\] would share"),
    ],
)
def test_what_cannot_work_is_a_config_error(options, message):
    with pytest.raises(ConfigError, match=message):
        SearchSpace.build(_shape(), **options)


@pytest.mark.parametrize(
    ("num_kept", "top_k", "message"),
    [(10, 2, "multiple of 4, at least 8"), (4, 2, "at least 8"), (8, 6, "fewer than top_k 6")],
)
def test_a_group_limited_router_needs_enough_experts_in_each_group(num_kept, top_k, message):
    with pytest.raises(ConfigError, match=message):
        SearchSpace.build(_shape(num_experts=16, top_k=top_k, **LIMITED), num_kept=num_kept)


def test_slots_of_a_group_limited_router_stay_in_their_expert_group():
    space = SearchSpace.build(_shape(num_experts=16, **LIMITED), num_kept=8)
    assert [space.expert_group(0, slot).start for slot in range(8)] == [0, 0, 4, 4, 8, 8, 12, 12]
    assert SearchSpace.build(_shape(), num_kept=4).expert_group(0, 3) == range(8)


def test_a_pruning_across_expert_groups_does_not_fit():
    shape = _shape(1, 8, num_expert_groups=2)
    check_fits(Genome.from_kept([[0, 1, 4, 7]], 8, 2), shape)
    with pytest.raises(GenomeError, match="not 2 experts in each"):
        check_fits(Genome.from_kept([[0, 1, 2, 7]], 8, 2), shape)
    with pytest.raises(GenomeError, match="same number in each group"):
        check_fits(Genome.from_kept([[0, 1, 4]], 8, 2), shape)


def test_a_genome_of_another_space_or_model_is_refused():
    space = SearchSpace.build(_shape(2), num_kept=4)
    with pytest.raises(GenomeError, match=r"keeps \[2, 2\]"):
        space.check(Genome.from_kept([[0, 1], [0, 1]], 8, 2))
    with pytest.raises(GenomeError, match="3 MoE layers of 8"):
        space.check(Genome.from_kept([[0, 1]] * 3, 8, 2))
    one_hot = np.eye(4)
    with pytest.raises(GenomeError, match="use the model it was searched on"):
        space.genes(Genome((LayerGenome(one_hot, one_hot, 2),) * 2))


def test_a_space_is_plain_data_in_json():
    space = SearchSpace.build(_shape(), num_kept=4, num_layer_groups=2)
    assert json.loads(json.dumps(space.to_json()))["layer_groups"] == [[0, 1], [2, 3]]


SHARED = {"mean": 4, "min": 2, "max": 8}


def test_a_shared_budget_is_held_by_every_genome_with_that_sum_within_the_bounds():
    space = SearchSpace.build(_shape(), num_kept=SHARED)
    assert space.num_kept == (4, 4, 4, 4) and space.can_prune
    for counts in ([4, 4, 4, 4], [2, 2, 4, 8], [2, 6, 2, 6]):
        space.check(Genome.from_kept([range(count) for count in counts], 8, 2))
    for counts in ([4, 4, 4, 5], [1, 5, 5, 5]):
        with pytest.raises(GenomeError, match=r"the space allows 2 to 8, 4 on average, with \[2, 2, 2, 2\]"):
            space.check(Genome.from_kept([range(count) for count in counts], 8, 1 if 1 in counts else 2))


def test_layers_that_share_genes_keep_as_many():
    space = SearchSpace.build(_shape(), num_kept=SHARED, num_layer_groups=2)
    space.check(Genome.from_kept([range(2), range(2), range(6), range(6)], 8, 2))
    with pytest.raises(GenomeError, match="2 to 8"):
        space.check(Genome.from_kept([range(2), range(4), range(4), range(6)], 8, 2))


def test_without_a_mean_any_sum_within_the_bounds_is_allowed():
    space = SearchSpace.build(_shape(), num_kept={"min": 2, "max": 8}, multiple_of=2, varies_top_k=True)
    assert space.num_kept == (4, 4, 4, 4)
    space.check(Genome.from_kept([range(2), range(8), range(8), range(6)], 8, [1, 2, 2, 1]))
    with pytest.raises(GenomeError, match="the space allows 2 to 8 with 1 to 2"):
        space.check(Genome.from_kept([range(3), range(8), range(8), range(6)], 8, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kept": {"mean": 4, "min": 3, "max": 8}, "multiple_of": 2}, "num_kept.min: got 3, expected a multiple"),
        ({"num_kept": {"mean": 4, "min": 2, "max": 9}}, "num_kept.max: got 9, MoE layer 0 has 8 experts"),
        ({"num_kept": {"mean": 4, "min": 1, "max": 8}}, "num_kept.min: got 1 with top_k 2"),
        (
            {"num_kept": SHARED, "num_layer_groups": 3},
            "num_layer_groups: got 3 for 4 MoE layers, expected groups of eq",
        ),
    ],
)
def test_bounds_that_cannot_be_are_a_config_error(options, message):
    with pytest.raises(ConfigError, match=message):
        SearchSpace.build(_shape(), **options)


def test_bounds_of_a_group_limited_router_leave_enough_in_each_group():
    shape = _shape(num_experts=16, **LIMITED)
    assert SearchSpace.build(shape, num_kept={"mean": 12, "min": 8, "max": 16}).kept.step == 4
    with pytest.raises(ConfigError, match=r"num_kept.mean: got 10, the router .* give a multiple of 4"):
        SearchSpace.build(shape, num_kept={"min": 8, "mean": 10, "max": 16})


def test_a_space_with_bounds_is_plain_data_in_json():
    space = SearchSpace.build(_shape(), num_kept=SHARED)
    assert json.loads(json.dumps(space.to_json()))["kept_bounds"]["total"] == 16
