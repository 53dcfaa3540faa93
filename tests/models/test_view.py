"""Contract of the view, for every family: the oracle is a stock model that really has K experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import (
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

MATCH = 2e-6


def match_of_merge(expected: torch.Tensor) -> float:
    """Mixing in float32 here and in float64 in the oracle rounds router rows differently."""
    return 4 * MATCH * max(1.0, float(expected.abs().max()))


class Counts:
    """Tokens routed to each expert of each MoE layer; times: how often each of a batch counts (default: once)."""

    def __init__(self, moe: MoEModel) -> None:
        self.layers = [np.zeros(number) for number in moe.shape.num_experts]
        self.times: torch.Tensor | None = None

    def see(self, layer: int, index: torch.Tensor, gates: torch.Tensor, outputs: torch.Tensor) -> None:
        times = torch.ones(len(index)) if self.times is None else self.times.reshape(-1)
        weights = times.double()[:, None].expand_as(index).reshape(-1)
        self.layers[layer] += torch.bincount(index.reshape(-1), weights, minlength=len(self.layers[layer])).numpy()


def snapshot(moe: MoEModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in moe.language_model.state_dict().items()}


def test_every_family_of_the_table_is_in_this_suite(moe: MoEModel) -> None:
    assert moe.family is FAMILIES[moe.shape.family]


def test_identity_genome_equals_untouched_model_bit_for_bit(moe: MoEModel) -> None:
    untouched = logits(moe.language_model, tokens())
    with moe.applied(moe.shape.identity()) as language_model:
        assert torch.equal(logits(language_model, tokens()), untouched)


def test_both_hooks_forced_on_equal_untouched_model(moe: MoEModel) -> None:
    plans = [LayerPlan.reversed_identity(8, k) for k in moe.shape.top_k]
    untouched = logits(moe.language_model, tokens())
    with moe.installed([[plan] for plan in plans]):
        assert moe.language_model.config._experts_implementation == "moe_evo"
        assert largest_difference(logits(moe.language_model, tokens()), untouched) <= 1e-6


@pytest.mark.parametrize("num_kept", [4, 6])
def test_pruning_equals_stock_model_with_fewer_experts(moe: MoEModel, num_kept: int) -> None:
    genome = random_pruning(moe.shape, num_kept)
    expected = logits(stock_model(moe.language_model, genome, moe.shape), tokens())
    with moe.applied(genome):
        got = logits(moe.language_model, tokens())
    assert largest_difference(got, expected) <= MATCH
    assert largest_difference(got, logits(moe.language_model, tokens())) > 1e-2


def test_merge_with_untied_router_equals_stock_model_with_mixed_weights(moe: MoEModel) -> None:
    genome = random_merge(moe.shape, 4)
    expected = logits(stock_model(moe.language_model, genome, moe.shape), tokens())
    with moe.applied(genome):
        got = logits(moe.language_model, tokens())
    assert largest_difference(got, expected) <= match_of_merge(expected)
    assert largest_difference(got, logits(moe.language_model, tokens())) > 1e-2


def test_one_hot_merging_with_another_router_mapping_needs_no_merged_tensors(moe: MoEModel) -> None:
    merges, prunes = random_merge(moe.shape, 4), random_pruning(moe.shape, 4)
    genome = Genome(
        tuple(
            LayerGenome(pruned.expert_merging, merged.router_mapping, 2)
            for pruned, merged in zip(prunes.layers, merges.layers, strict=True)
        )
    )
    expected = logits(stock_model(moe.language_model, genome, moe.shape), tokens())
    moe.merged_cache.clear()
    with moe.applied(genome):
        assert largest_difference(logits(moe.language_model, tokens()), expected) <= match_of_merge(expected)
    assert len(moe.merged_cache) == 0


@pytest.mark.parametrize("num_kept", [4, 8])
def test_lower_top_k_equals_stock_model_with_lower_top_k(moe: MoEModel, num_kept: int) -> None:
    genome = random_pruning(moe.shape, num_kept, top_k=1)
    expected = logits(stock_model(moe.language_model, genome, moe.shape), tokens())
    with moe.applied(genome):
        assert largest_difference(logits(moe.language_model, tokens()), expected) <= MATCH


def test_fewer_experts_than_top_k_with_top_k_lowered_to_them(moe: MoEModel) -> None:
    fewest = moe.shape.num_expert_groups * moe.shape.min_kept_per_group
    genome = random_pruning(moe.shape, fewest, top_k=1)
    expected = logits(stock_model(moe.language_model, genome, moe.shape), tokens())
    with moe.applied(genome):
        assert largest_difference(logits(moe.language_model, tokens()), expected) <= MATCH


def test_left_padding_does_not_change_what_a_genome_computes(moe: MoEModel) -> None:
    genome = random_merge(moe.shape, 4)
    short = tokens(batch=1, length=7)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)
    batch = torch.cat([padded, tokens(batch=1, length=12, seed=1)])
    mask = (batch != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with moe.applied(genome):
        alone = logits(moe.language_model, short)
        together = logits(moe.language_model, batch, attention_mask=mask, position_ids=positions, logits_to_keep=3)
    expected = stock_model(moe.language_model, genome, moe.shape)
    stock = logits(expected, batch, attention_mask=mask, position_ids=positions, logits_to_keep=3)
    assert together.shape[1] == 3
    assert largest_difference(together, stock) <= match_of_merge(stock)
    assert largest_difference(together[0], alone[0, -3:]) <= 2 * match_of_merge(stock)


def test_generation_with_a_cache_follows_the_genome(moe: MoEModel) -> None:
    genome = random_merge(moe.shape, 4)
    prompt = tokens(batch=2, length=5)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    stock = stock_model(moe.language_model, genome, moe.shape)
    with torch.inference_mode():
        expected = stock.generate(prompt, **options)
        with moe.applied(genome):
            got = moe.language_model.generate(prompt, **options)
    assert torch.equal(got, expected)


def test_base_model_comes_back_bit_exactly_even_after_an_exception(moe: MoEModel) -> None:
    before, untouched = snapshot(moe), logits(moe.language_model, tokens())
    for genome in (random_pruning(moe.shape, 4), random_merge(moe.shape, 4)):
        with pytest.raises(RuntimeError, match="in the block"), moe.applied(genome):
            logits(moe.language_model, tokens())
            raise RuntimeError("in the block")
        assert torch.equal(logits(moe.language_model, tokens()), untouched)
    after = moe.language_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any("forward" in module.__dict__ for module in moe.language_model.modules())


def test_routing_counts_match_the_genome_and_skip_padding(moe: MoEModel) -> None:
    genome = random_pruning(moe.shape, 4)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    counts = Counts(moe)
    counts.times = mask
    with observed_experts(moe, counts.see), moe.applied(genome):
        logits(moe.language_model, tokens(), attention_mask=mask)
        logits(moe.language_model, tokens(), attention_mask=mask)
    assert len(counts.layers) == moe.shape.num_layers
    for layer, kept in zip(counts.layers, genome.kept, strict=True):
        assert layer.dtype == np.float64 and layer.shape == (8,)
        assert layer.sum() == 2 * 2 * int(mask.sum())
        assert set(np.flatnonzero(layer)) <= set(kept)
    logits(moe.language_model, tokens())
    assert sum(layer.sum() for layer in counts.layers) == moe.shape.num_layers * 2 * 2 * int(mask.sum())


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
