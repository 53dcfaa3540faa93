"""Dynamic skipping against the weights changed by hand, for the untouched model and inside of genomes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_tasks as tiny
import torch
from tiny_models import CONFIGS, logits, random_merge, random_pruning, stock_model, tiny_model, tokens

from moe_evo.cli.main import main
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError, ExportError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.models.experts.outputs import observed_experts
from moe_evo.models.export.export import check_fixed_top_k, export_checkpoint
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.variants.dynamic_routing import Skipping, active_weights
from moe_evo.models.view import MoEModel

BETA = 0.4


def without_second(weights: torch.Tensor, beta: float, *, renormalises: bool) -> torch.Tensor:
    active = Skipping(beta).active(0, (weights, weights, weights.long()))
    return active_weights(weights, active, renormalises=renormalises)


def by_hand(weights: torch.Tensor, beta: float, *, renormalises: bool) -> torch.Tensor:
    found = weights.clone()
    for row in found:
        first, second = (0, 1) if row[0] >= row[1] else (1, 0)
        if row[second] < beta * row[first]:
            row[first] = row[0] + row[1] if renormalises else row[first]
            row[second] = 0
    return found


@pytest.mark.parametrize("renormalises", [True, False])
def test_the_smaller_weight_of_a_token_goes_where_it_is_below_its_share(renormalises: bool) -> None:
    weights = torch.rand((200, 2), generator=torch.Generator().manual_seed(0))
    weights[:2] = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    for beta in (0.0, 0.3, 1.0):
        expected = by_hand(weights, beta, renormalises=renormalises)
        assert torch.equal(without_second(weights, beta, renormalises=renormalises), expected)
    assert torch.equal(without_second(weights, 0.0, renormalises=renormalises), weights)


def test_another_number_of_experts_is_left_alone() -> None:
    for top_k in (1, 3):
        weights = torch.rand((5, top_k))
        assert torch.equal(without_second(weights, 1.0, renormalises=True), weights)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_skips_as_weights_changed_by_hand_do(family: str) -> None:
    beta = 0.9 if family in ("deepseek_v3", "glm4_moe") else BETA  # a sigmoid's weights are more alike
    model = tiny_model(family)
    plain, skipping = MoEModel(copy.deepcopy(model)), MoEModel(model, dynamic_routing=Skipping(beta))
    renormalises = plain.family.renormalises(plain.language_model.config)

    def change(_router, _inputs, output):
        return output[0], by_hand(output[1], beta, renormalises=renormalises), output[2]

    for genome in (None, random_pruning(plain.shape, 4), random_merge(plain.shape, 4)):
        seen: list[torch.Tensor] = []
        handles = [layer.router.register_forward_hook(change) for layer in plain.layers]
        used = genome or plain.shape.identity()
        with plain.applied(used):
            expected = logits(plain.language_model, tokens())
        for handle in handles:
            handle.remove()
        with skipping.applied(used), observed_experts(skipping, lambda *sight, seen=seen: seen.append(sight[2])):
            logits(skipping.language_model, tokens())
        with skipping.applied(used):
            found = logits(skipping.language_model, tokens())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        share = float((torch.cat(seen) == 0).any(dim=-1).float().mean())
        assert 0.02 < share < 0.98, "nothing or everything is skipped"


def test_layers_may_have_thresholds_of_their_own() -> None:
    moe = MoEModel(tiny_model("mixtral"), dynamic_routing=Skipping([0.0, 1.0, 0.0]))
    skipped = {0: 0.0, 1: 0.0, 2: 0.0}

    def see(layer, index, gates, outputs):
        skipped[layer] += float((gates == 0).sum())

    with observed_experts(moe, see):
        logits(moe.language_model, tokens())
    assert skipped == {0: 0, 1: 24, 2: 0}


def test_a_loaded_model_skips_and_passes_its_self_check(checkpoint) -> None:
    config = ModelConfig(path=str(checkpoint("mixtral")), device="cpu", dynamic_skipping=BETA)
    skipping, plain = load_model(ModelSource(config)), load_model(ModelSource(replace(config, dynamic_skipping=None)))
    assert skipping.dynamic_routing == Skipping(BETA) and plain.dynamic_routing is None
    assert not torch.equal(logits(skipping.language_model, tokens()), logits(plain.language_model, tokens()))
    none = load_model(ModelSource(replace(config, dynamic_skipping=0.0)))
    assert torch.equal(logits(none.language_model, tokens()), logits(plain.language_model, tokens()))


def test_a_pruned_model_that_skips_is_a_stock_model_that_skips() -> None:
    moe = MoEModel(tiny_model("mixtral"), dynamic_routing=Skipping(BETA))
    genome = random_pruning(moe.shape, 4)
    stock = MoEModel(stock_model(tiny_model("mixtral"), genome, moe.shape), dynamic_routing=Skipping(BETA))
    with moe.applied(genome):
        torch.testing.assert_close(logits(moe.language_model, tokens()), logits(stock.language_model, tokens()))


def test_genomes_that_share_layers_skip_as_each_alone_does(tmp_path: Path) -> None:
    moe = MoEModel(tiny_model("mixtral", vocab_size=350), tiny.tiny_tokenizer(bos=True), dynamic_routing=Skipping(BETA))
    rows = [{"prompt": f"one two {n} three", "choices": [" yes", " no no"], "label": 0} for n in range(12)]
    task = tiny.make_task(tmp_path, rows, moe.tokenizer)
    genomes = [None, *(random_pruning(moe.shape, 4, seed=seed) for seed in range(3)), random_merge(moe.shape, 4)]
    shared, alone = (
        [
            outcome.tie_break
            for outcome in Evaluator(moe, [task], EvaluationConfig(share_layers=shares)).evaluate(genomes, "search")
        ]
        for shares in (True, False)
    )
    assert shared == pytest.approx(alone, abs=1e-6) and len(set(shared)) == 5


def test_what_cannot_skip_is_refused_in_one_line(checkpoint) -> None:
    config = ModelConfig(path=str(checkpoint("mixtral")), device="cpu")
    with pytest.raises(ConfigError, match=r"got 2 thresholds, the model has 3 MoE layers$"):
        load_model(ModelSource(replace(config, dynamic_skipping=[0.1, 0.2])))
    for wrong in (1.5, -0.1, [0.5, 2.0], []):
        with pytest.raises(ConfigError, match=r"^model.dynamic_skipping: got .*, expected 0 to 1$"):
            replace(config, dynamic_skipping=wrong)


def test_a_model_of_more_experts_a_token_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    tiny_model("mixtral", num_experts_per_tok=3).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"unreadable")
    with pytest.raises(ConfigError, match="this mixtral model uses 3 a token; use a model of two, or none"):
        load_model(ModelSource(ModelConfig(path=str(tmp_path), device="cpu", dynamic_skipping=0.5)))


@pytest.mark.parametrize("cluster", [[], ["--cluster.address", "local"]])
def test_a_search_with_the_wrong_number_of_thresholds_leaves_no_folder(
    cluster: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", "--folder", str(tmp_path / "run"), "--model.dynamic_skipping", "[0.5]", *cluster]
    assert main(words) == 2
    assert "model.dynamic_skipping: got 1 thresholds, the model has 4 MoE layers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_is_made_of_a_model_that_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = MoEModel(tiny_model("mixtral"), dynamic_routing=Skipping(BETA))
    with pytest.raises(ExportError, match=r"^model.dynamic_skipping: a stock architecture runs all top_k experts"):
        export_checkpoint(moe, random_pruning(moe.shape, 4), tmp_path / "small", provenance={})
    check_fixed_top_k(None)
    words = ["--method", "reap", "--num_kept", "4", "--to", str(tmp_path / "small")]
    assert main(["prune", *words, "--model.dynamic_skipping", "0.5"]) == 2
    assert "model.dynamic_skipping: got 0.5, expected none: a stock checkpoint is made" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("thresholds", ["0.5", "[0.1, 0.2, 0.3, 0.4]"])
def test_the_command_line_evaluates_with_skipping(thresholds: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = "[{data: syll, num_search: 8, num_validation: 64, num_test: 8}]"
    words = ["evaluate", "--model.self_check", "false", "--tasks", task, "--json"]
    found = []
    for skipping in ("null", thresholds):
        assert main([*words, "--model.dynamic_skipping", skipping]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] != found[1]
