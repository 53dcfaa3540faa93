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
