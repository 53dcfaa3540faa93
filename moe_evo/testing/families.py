"""Tests for every model family: a genome computes the same as a stock model that has fewer experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from moe_evo.config.model import ModelConfig
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.models.experts.outputs import observed_experts
from moe_evo.models.families import FAMILIES
from moe_evo.models.layer import LayerPlan
from moe_evo.models.load import load_model
from moe_evo.models.self_check import self_check
from moe_evo.models.source import ModelSource
from moe_evo.models.tiny import tiny_model
from moe_evo.models.view import MoEModel
from moe_evo.testing.stock_models import (
    largest_difference,
    logits,
    random_merge,
    random_pruning,
    stock_model,
    tokens,
)

MATCH = 2e-6


def match_of_merge(expected: torch.Tensor) -> float:
    """The tolerance for merges: router rows are mixed in float32, but in float64 for the expected logits."""
    return 4 * MATCH * max(1.0, float(expected.abs().max()))


class Counts:
    """Counts tokens routed to each expert of each MoE layer; times: weight of each token of a batch (default: 1)."""

    def __init__(self, moe: MoEModel) -> None:
        self.layers = [np.zeros(number) for number in moe.shape.num_experts]
        self.times: torch.Tensor | None = None

    def see(self, layer: int, index: torch.Tensor, gates: torch.Tensor, outputs: torch.Tensor) -> None:
        times = torch.ones(len(index)) if self.times is None else self.times.reshape(-1)
        weights = times.double()[:, None].expand_as(index).reshape(-1)
        self.layers[layer] += torch.bincount(index.reshape(-1), weights, minlength=len(self.layers[layer])).numpy()


def snapshot(moe: MoEModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in moe.language_model.state_dict().items()}


@cache
def _view(model_type: str, changes: str) -> MoEModel:
    moe = MoEModel(tiny_model(model_type, **json.loads(changes)))
    self_check(moe)
    return moe


class FamilyContract:
    """A tiny random model of the family, with 8 experts a layer of which 2 are active.

    model_type: as in config.json. changes: options of the tiny model's config that are added to
    `moe_evo.models.tiny.COMMON`, or replace some of it. The experts' field, block and router must be named as in one
    of the families of this package; see `moe_evo.testing.stock_models`.

    >>> class TestMyFamily(FamilyContract):
    ...     model_type = "olmoe"
    ...     changes = {"intermediate_size": 16, "num_experts": 8}
    """

    model_type = ""
    changes: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture
    def moe(self) -> MoEModel:
        return _view(self.model_type, json.dumps(dict(self.changes)))

    def test_it_is_found_by_its_model_type(self, moe: MoEModel) -> None:
        assert moe.family is FAMILIES[moe.shape.family] and moe.family.model_type == moe.shape.family

    def test_a_checkpoint_is_read_and_its_shape_is_known_from_config_json_alone(
        self, moe: MoEModel, tmp_path: Path
    ) -> None:
        moe.language_model.save_pretrained(tmp_path)
        config = ModelConfig(path=str(tmp_path), device="cpu", dtype="float32")
        assert ModelSource(config).shape == load_model(ModelSource(config)).shape == moe.shape

    def test_identity_genome_equals_untouched_model_bit_for_bit(self, moe: MoEModel) -> None:
        untouched = logits(moe.language_model, tokens())
        with moe.applied(moe.shape.identity()) as language_model:
            assert torch.equal(logits(language_model, tokens()), untouched)

    def test_both_hooks_forced_on_equal_untouched_model(self, moe: MoEModel) -> None:
        plans = [LayerPlan.reversed_identity(8, k) for k in moe.shape.top_k]
        untouched = logits(moe.language_model, tokens())
        with moe.installed([[plan] for plan in plans]):
            assert moe.language_model.config._experts_implementation == "moe_evo"
            assert largest_difference(logits(moe.language_model, tokens()), untouched) <= 1e-6

    @pytest.mark.parametrize("num_kept", [4, 6])
    def test_pruning_equals_stock_model_with_fewer_experts(self, moe: MoEModel, num_kept: int) -> None:
        genome = random_pruning(moe.shape, num_kept)
        expected = logits(stock_model(moe.language_model, genome, moe.shape), tokens())
        with moe.applied(genome):
            got = logits(moe.language_model, tokens())
        assert largest_difference(got, expected) <= MATCH
        assert largest_difference(got, logits(moe.language_model, tokens())) > 1e-2

    def test_merge_with_untied_router_equals_stock_model_with_mixed_weights(self, moe: MoEModel) -> None:
        genome = random_merge(moe.shape, 4)
        expected = logits(stock_model(moe.language_model, genome, moe.shape), tokens())
        with moe.applied(genome):
            got = logits(moe.language_model, tokens())
        assert largest_difference(got, expected) <= match_of_merge(expected)
        assert largest_difference(got, logits(moe.language_model, tokens())) > 1e-2

    def test_one_hot_merging_with_another_router_mapping_needs_no_merged_tensors(self, moe: MoEModel) -> None:
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
    def test_lower_top_k_equals_stock_model_with_lower_top_k(self, moe: MoEModel, num_kept: int) -> None:
        genome = random_pruning(moe.shape, num_kept, top_k=1)
        expected = logits(stock_model(moe.language_model, genome, moe.shape), tokens())
        with moe.applied(genome):
            assert largest_difference(logits(moe.language_model, tokens()), expected) <= MATCH

    def test_fewer_experts_than_top_k_with_top_k_lowered_to_them(self, moe: MoEModel) -> None:
        fewest = moe.shape.num_expert_groups * moe.shape.min_kept_per_group
        genome = random_pruning(moe.shape, fewest, top_k=1)
        expected = logits(stock_model(moe.language_model, genome, moe.shape), tokens())
        with moe.applied(genome):
            assert largest_difference(logits(moe.language_model, tokens()), expected) <= MATCH

    def test_left_padding_does_not_change_what_a_genome_computes(self, moe: MoEModel) -> None:
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

    def test_generation_with_a_cache_follows_the_genome(self, moe: MoEModel) -> None:
        genome = random_merge(moe.shape, 4)
        prompt = tokens(batch=2, length=5)
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        stock = stock_model(moe.language_model, genome, moe.shape)
        with torch.inference_mode():
            expected = stock.generate(prompt, **options)
            with moe.applied(genome):
                got = moe.language_model.generate(prompt, **options)
        assert torch.equal(got, expected)

    def test_base_model_comes_back_bit_exactly_even_after_an_exception(self, moe: MoEModel) -> None:
        before, untouched = snapshot(moe), logits(moe.language_model, tokens())
        for genome in (random_pruning(moe.shape, 4), random_merge(moe.shape, 4)):
            with pytest.raises(RuntimeError, match="in the block"), moe.applied(genome):
                logits(moe.language_model, tokens())
                raise RuntimeError("in the block")
            assert torch.equal(logits(moe.language_model, tokens()), untouched)
        after = moe.language_model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any("forward" in module.__dict__ for module in moe.language_model.modules())

    def test_routing_counts_match_the_genome_and_skip_padding(self, moe: MoEModel) -> None:
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
