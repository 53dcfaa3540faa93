"""MEO against experts that are really merged, token by token, with the genomes and observations that run with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from process_groups import run_gang
from tiny_models import largest_difference, logits, random_merge, random_pruning, stock_model, tiny_model, tokens

from moe_evo.cli.main import main
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError, ExportError
from moe_evo.models.experts.outputs import observed_experts
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.variants import meo
from moe_evo.models.view import MoEModel

FAMILIES = ("mixtral", "olmoe", "gpt_oss")


def model_of(family, experts=meo.MEO, **changes):
    model = tiny_model(family, **changes).double()
    model.set_experts_implementation(experts)
    return model


def merged_answer(experts, token, chosen, gates):
    """f of sum_j g_j W_j, (H,), every matrix and bias built."""

    def merged(name):
        stacked = getattr(experts, name).detach().double().numpy()
        return sum(gate * stacked[expert] for expert, gate in zip(chosen, gates, strict=True))

    if hasattr(experts, "gate_up_proj_bias"):
        inner = token @ merged("gate_up_proj") + merged("gate_up_proj_bias")
        gate, up = np.minimum(inner[0::2], experts.limit), np.clip(inner[1::2], -experts.limit, experts.limit)
        inner = (up + 1) * gate / (1 + np.exp(-experts.alpha * gate))
        return inner @ merged("down_proj") + merged("down_proj_bias")
    gate, up = np.split(merged("gate_up_proj") @ token, 2)
    return merged("down_proj") @ (gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_gets_the_answer_of_its_merged_expert(family, monkeypatch):
    model = model_of(family, **({"norm_topk_prob": False} if family == "olmoe" else {}))
    monkeypatch.setattr(meo, "_CHUNK_ELEMENTS", 200)  # so that a batch goes in several parts
    seen = []
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.register_forward_hook(lambda module, inputs, output: seen.append((module, *inputs, output)))
    logits(model, tokens())
    assert len(seen) == 3
    for module, hidden, index, gates, output in seen:
        for token, chosen, weights, answer in zip(hidden, index.tolist(), gates.tolist(), output, strict=True):
            expected = merged_answer(module, token.double().numpy(), chosen, weights)
            np.testing.assert_allclose(answer.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_one_expert_a_token_with_the_weight_1_is_merged_with_nothing():
    found = [logits(model_of("mixtral", experts, num_experts_per_tok=1), tokens()) for experts in (meo.MEO, "eager")]
    assert largest_difference(*found) < 1e-12
    found = [logits(model_of("mixtral", experts), tokens()) for experts in (meo.MEO, "eager")]
    assert largest_difference(*found) > 1e-3


@pytest.mark.parametrize("make", [random_pruning, random_merge])
@pytest.mark.parametrize("family", FAMILIES)
def test_genomes_compute_what_a_model_with_so_few_experts_computes(family, make):
    model = tiny_model(family)
    model.set_experts_implementation(meo.MEO)
    moe = MoEModel(model)
    assert moe.computes_meo
    genome = make(moe.shape, 4)
    small = stock_model(model, genome, moe.shape).double()
    untouched = logits(model.double(), tokens())
    small.set_experts_implementation(meo.MEO)
    with moe.applied(genome):
        assert largest_difference(logits(model, tokens()), logits(small, tokens())) < 1e-5  # genomes are float32
    assert torch.equal(logits(model, tokens()), untouched)


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_leaves_what_is_computed_and_sees_single_experts(family):
    model = model_of(family)
    moe = MoEModel(model)
    expected, seen = logits(model, tokens()), []
    with observed_experts(moe, lambda *found: seen.append(found)):
        assert torch.equal(logits(model, tokens()), expected)
    model.set_experts_implementation("eager")
    own = []
    with observed_experts(MoEModel(model), lambda *found: own.append(found)):
        logits(model, tokens())
    for one, other in zip(seen[0][1:], own[0][1:], strict=True):  # before the first layer answers, all is the same
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("share_layers", [True, False])
def test_evaluations_share_layers_as_ever(share_layers, tmp_path, capsys):
    words = ["--tasks", "[{data: syll, num_test: 24}]", "--split", "test", "--json"]
    found = {}
    for experts in ("own", "meo"):
        options = ["--model.experts", experts, "--evaluation.share_layers", str(share_layers).lower()]
        assert main(["evaluate", "--genome", "[[0,1,2,3],[1,2,3,4],[0,2,4,6],[4,5,6,7]]", *options, *words]) == 0
        found[experts] = json.loads(capsys.readouterr().out)["metrics"]["syll/log_likelihood"]
    assert found["own"] != found["meo"]
    assert EvaluationConfig(share_layers=share_layers).share_layers == share_layers
    assert found["meo"] == pytest.approx(KNOWN.setdefault("meo", found["meo"]), rel=1e-5)


KNOWN: dict[str, float] = {}
"""What the first of several ways to compute the same has found."""


def gang_logits(ranks, folder, sharding):
    found = []
    for family in ("mixtral", "gpt_oss"):
        config = ModelConfig(path=f"{folder}/{family}", device="cpu", sharding=sharding, experts="meo")
        moe = load_model(ModelSource(config), ranks)
        with moe.applied(random_merge(moe.shape, 4)):
            found.append(logits(moe.language_model, tokens()).numpy())
        found.append(logits(moe.language_model, tokens()).numpy())
    return found


@pytest.mark.parametrize("sharding", ["tensor_parallel", "zero3"])
def test_ranks_together_compute_what_one_process_computes(tmp_path, sharding):
    for family in ("mixtral", "gpt_oss"):
        tiny_model(family).save_pretrained(tmp_path / family)
    moe = [
        load_model(ModelSource(ModelConfig(path=str(tmp_path / one), device="cpu", experts="meo")))
        for one in ("mixtral", "gpt_oss")
    ]
    expected = []
    for one in moe:
        with one.applied(random_merge(one.shape, 4)):
            expected.append(logits(one.language_model, tokens()).numpy())
        expected.append(logits(one.language_model, tokens()).numpy())
    for of_rank in run_gang(gang_logits, 2, str(tmp_path), sharding):
        for got, wanted in zip(of_rank, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_no_checkpoint_is_made_of_it(tmp_path, capsys):
    moe = load_model(ModelSource(ModelConfig(device="cpu", self_check=False, experts="meo")))
    with pytest.raises(ExportError, match=r"model\.experts: got 'meo', which merges experts anew for every token"):
        export_checkpoint(moe, moe.shape.identity(), tmp_path / "small", provenance={})
    words = ["prune", "--method", "reap", "--num_kept", "4", "--to", str(tmp_path / "small"), "--model.experts", "meo"]
    assert main(words) == 2
    assert "model.experts: got 'meo', expected 'own'" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_gates_that_are_multiplied_are_refused_in_one_line(tmp_path):
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"but this deepseek_v3 model multiplies its gates by 1\.5"):
        load_model(ModelSource(ModelConfig(path=str(tmp_path), device="cpu", experts="meo")))
