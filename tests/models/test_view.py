"""Contract of the view, for every family: the oracle is a stock model that really has K experts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_models import (
    CONFIGS,
    largest_difference,
    logits,
    random_merge,
    random_pruning,
    stock_model,
    tiny_model,
    tokens,
)

from moe_evo.errors import ConfigError, GenomeError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import SearchSpace
from moe_evo.models import merging
from moe_evo.models.experts.outputs import observed_experts
from moe_evo.models.families import FAMILIES
from moe_evo.models.layer import LayerPlan
from moe_evo.models.self_check import self_check
from moe_evo.models.view import MoEModel
from moe_evo.testing.families import Counts, FamilyContract


class TestFamilies(FamilyContract):
    @pytest.fixture(params=sorted(CONFIGS))
    def moe(self, request: pytest.FixtureRequest, load: Callable[[str], MoEModel]) -> MoEModel:
        return load(request.param)


def test_every_family_of_the_table_is_in_this_suite() -> None:
    assert set(FAMILIES) == set(CONFIGS)


def test_routing_counts_of_generation_count_each_new_token_once(mixtral: MoEModel) -> None:
    prompt = tokens(batch=2, length=5)
    counts = Counts(mixtral)
    with torch.inference_mode(), observed_experts(mixtral, counts.see):
        mixtral.language_model.generate(
            prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=4, max_new_tokens=4, do_sample=False
        )
    assert counts.layers[0].sum() == 2 * 2 * (5 + 3)  # the last new token is never fed back


@pytest.mark.parametrize("second", ["pruning", "identity"])
def test_nesting_is_refused(mixtral: MoEModel, second: str) -> None:
    genome = random_pruning(mixtral.shape, 4)
    inner = genome if second == "pruning" else mixtral.shape.identity()
    untouched = logits(mixtral.language_model, tokens())
    with pytest.raises(AssertionError, match="applied already"), mixtral.applied(genome), mixtral.applied(inner):
        pass
    assert torch.equal(logits(mixtral.language_model, tokens()), untouched)


def test_genome_of_another_model_is_refused(mixtral: MoEModel) -> None:
    genome = Genome.from_kept([[0, 1]], 4, 2)
    with pytest.raises(GenomeError, match="made for 1 MoE layers of 4 experts"), mixtral.applied(genome):
        pass


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_group_limits_are_checked_with_the_space_and_with_the_genome(load, model_type: str) -> None:
    moe = load(model_type)
    assert moe.shape.num_expert_groups == 2
    with pytest.raises(ConfigError, match="multiple of 2"):
        SearchSpace.build(moe.shape, num_kept=5)
    SearchSpace.build(moe.shape, num_kept=4)
    uneven = Genome.from_kept([[0, 1, 2, 4]] * moe.shape.num_layers, 8, 2)
    with pytest.raises(GenomeError, match="not 2 experts in each"), moe.applied(uneven):
        pass
    too_active = random_pruning(moe.shape, 4, top_k=3)
    with pytest.raises(GenomeError, match="top_k 3 is more than the 2"), moe.applied(too_active):
        pass


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_sigmoid_routers_need_two_experts_a_group(load, model_type: str) -> None:
    moe = load(model_type)
    groups = moe.shape.num_expert_groups
    with pytest.raises(ConfigError, match=f"at least {2 * groups}"):
        SearchSpace.build(moe.shape, num_kept=groups, top_k=1)
    with pytest.raises(GenomeError, match="at least 2"), moe.applied(random_pruning(moe.shape, groups, top_k=1)):
        pass


def test_correction_bias_takes_part_in_the_choice(load) -> None:
    moe = load("deepseek_v3")
    bias = moe.layers[0].router_tensors()["e_score_correction_bias"]
    assert float(bias.abs().max()) > 0.05
    genome = random_pruning(moe.shape, 4)
    with_bias, without = Counts(moe), Counts(moe)
    with moe.applied(genome), observed_experts(moe, with_bias.see):
        logits(moe.language_model, tokens())
    kept_bias = bias.clone()
    try:
        bias.zero_()
        with moe.applied(genome), observed_experts(moe, without.see):
            logits(moe.language_model, tokens())
    finally:
        bias.copy_(kept_bias)
    assert not np.array_equal(with_bias.layers[0], without.layers[0])


def test_siblings_share_merged_layers_and_the_budget_is_kept(load) -> None:
    moe = load("mixtral")
    one = random_merge(moe.shape, 4, seed=1)
    other_router = Genome(tuple(LayerGenome(gene.expert_merging, gene.expert_merging, 1) for gene in one.layers))
    moe.merged_cache.clear()
    for genome in (one, other_router):
        with moe.applied(genome):
            logits(moe.language_model, tokens())
    assert len(moe.merged_cache) == moe.shape.num_layers
    layer_bytes = moe.merged_cache.size_bytes // moe.shape.num_layers
    small = MoEModel(moe.language_model, merged_cache_gib=1.5 * layer_bytes / 2**30)
    unlimited = [None, None]
    for number, genome in enumerate((one, random_merge(moe.shape, 4, seed=2))):
        with moe.applied(genome):
            unlimited[number] = logits(moe.language_model, tokens())
        with small.applied(genome):
            assert torch.equal(logits(small.language_model, tokens()), unlimited[number])
        assert len(small.merged_cache) == 1


def test_a_mutated_layer_is_all_that_is_mixed_and_logits_are_the_same(load, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = load("mixtral")
    parent = random_merge(moe.shape, 4, seed=1)
    genes = list(parent.layers)
    mutated = genes[1].expert_merging[[3, 2, 1, 0]]
    mutated[2] += 0.25
    genes[1] = LayerGenome(mutated, genes[1].router_mapping, genes[1].top_k)
    child = Genome(tuple(genes))
    mixed: list[list[int]] = []
    mix_into = merging._mix_into
    monkeypatch.setattr(merging, "_mix_into", lambda *args: mixed.append(args[1]) or mix_into(*args))
    scores = []
    for ancestors, num_mixed in (([parent], 1), ([], moe.shape.num_layers)):
        moe.merged_cache.clear()
        for genome in (*ancestors, child):
            mixed.clear()
            with moe.applied(genome):
                scores.append(logits(moe.language_model, tokens()))
        assert mixed == [[0, 1, 2, 3]] * (2 * num_mixed + moe.shape.num_layers), "two matrices a layer, and all routers"
    assert torch.equal(scores[1], scores[2]) and not torch.equal(scores[0], scores[1])


def test_what_went_from_another_device_is_not_written_over(load) -> None:
    layer, matrix = load("mixtral").layers[0], random_merge(load("mixtral").shape, 4).layers[0].expert_merging
    expected = layer.merged_tensors(matrix)
    elsewhere = {name: tensor.to("meta") for name, tensor in expected.items()}
    got = layer.merged_tensors(matrix, into=elsewhere)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("gib", [0.0, 0.25])
def test_explicit_budget_stays_as_it_is(mixtral: MoEModel, gib: float) -> None:
    assert MoEModel(mixtral.language_model, merged_cache_gib=gib).merged_cache.budget_bytes == gib * 2**30


def test_merged_fits_tells_whether_all_merged_layers_can_be_kept(moe: MoEModel) -> None:
    genome = random_merge(moe.shape, 4)
    moe.merged_cache.clear()
    with moe.applied(genome):
        logits(moe.language_model, tokens())
    needed = moe.merged_cache.size_bytes
    exact = MoEModel(moe.language_model, merged_cache_gib=needed / 2**30)
    scarce = MoEModel(moe.language_model, merged_cache_gib=(needed - 1) / 2**30)
    assert exact.merged_fits(genome) and not scarce.merged_fits(genome)
    assert MoEModel(moe.language_model, merged_cache_gib=0).merged_fits(random_pruning(moe.shape, 4))


def test_indices_move_to_the_device_of_the_model_once() -> None:
    moe = MoEModel(tiny_model("mixtral").to("meta"), merged_cache_gib=0)  # a device other than the CPU, everywhere
    plan = LayerPlan.of(random_pruning(moe.shape, 4).layers[0])
    moe.layers[0]._route([plan], torch.empty(3, 32, device="meta"))
    moved = plan.indices
    assert moved is not None and moved.device.type == "meta"
    moe.layers[0]._route([plan], torch.empty(3, 32, device="meta"))
    assert plan.indices is moved


def test_bfloat16_model_matches_stock_bfloat16_model() -> None:
    moe = MoEModel(tiny_model("mixtral").to(torch.bfloat16))
    self_check(moe)
    genome = random_pruning(moe.shape, 4)
    expected = logits(stock_model(moe.language_model, genome, moe.shape).to(torch.bfloat16), tokens())
    with moe.applied(genome):
        assert largest_difference(logits(moe.language_model, tokens()), expected) == 0


def test_layers_may_differ_in_num_kept_and_top_k(mixtral: MoEModel) -> None:
    genome = random_merge(mixtral.shape, [2, 4, 8], top_k=[1, 2, 3])
    counts = Counts(mixtral)
    with mixtral.applied(genome), observed_experts(mixtral, counts.see):
        assert torch.isfinite(logits(mixtral.language_model, tokens())).all()
    assert [int(layer.sum()) for layer in counts.layers] == [24, 48, 72]
    assert all(np.flatnonzero(layer).max() < kept for layer, kept in zip(counts.layers, [2, 4, 8], strict=True))
