"""Top-p routing against tokens that are routed one by one, for the untouched model and inside of genomes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from process_groups import run_gang
from tiny_models import CONFIGS, logits, random_merge, random_pruning, stock_model, tiny_model, tokens

from moe_evo.cli.main import main
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError, ExportError
from moe_evo.models.experts.outputs import observed_experts
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.load import load_model
from moe_evo.models.ranks import ALONE, Ranks
from moe_evo.models.source import ModelSource
from moe_evo.models.variants.dynamic_routing import TopP, active_weights
from moe_evo.models.view import MoEModel

SIGMOID = ("deepseek_v3", "glm4_moe")
SOFTMAX = sorted(set(CONFIGS) - set(SIGMOID))
RENORMALISING = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe")
"""Families whose tiny models give the chosen experts weights with the sum 1."""
THREE = {"num_experts_per_tok": 3}


def by_hand(logit: np.ndarray, weight: np.ndarray, index: np.ndarray, p: float, *, renormalises: bool) -> np.ndarray:
    """The weights (top_k,) of one token, from its logits (E,) and what its router chose."""
    probabilities = np.exp(logit.astype(np.float64) - logit.max())
    probabilities /= probabilities.sum()
    total, runs = 0.0, []
    for place in sorted(range(len(index)), key=lambda one: -probabilities[index[one]]):
        runs.append(place)
        total += probabilities[index[place]]
        if total >= p:
            break
    found = np.zeros_like(weight)
    found[runs] = weight[runs]
    if renormalises:
        found *= weight.sum() / found.sum()
    return found


def routed_by_hand(output: tuple[torch.Tensor, ...], p: float, *, renormalises: bool) -> torch.Tensor:
    rows = zip(*(one.numpy() for one in output), strict=True)
    return torch.from_numpy(np.stack([by_hand(*row, p, renormalises=renormalises) for row in rows]))


@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("p", [0.05, 0.4, 0.7, 0.95, 1.0])
def test_the_fewest_experts_whose_probabilities_reach_p_are_run(p: float, renormalises: bool) -> None:
    logit = torch.randn((300, 8), generator=torch.Generator().manual_seed(0)) * 1.5
    weights, index = logit.softmax(dim=-1).topk(4, sorted=False)
    shuffled = torch.randperm(4, generator=torch.Generator().manual_seed(1))  # not all routers sort
    output = (logit, weights[:, shuffled].clone(), index[:, shuffled])
    active = TopP(p).active(0, output)
    found = active_weights(output[1], active, renormalises=renormalises)
    torch.testing.assert_close(found, routed_by_hand(output, p, renormalises=renormalises), rtol=1e-5, atol=1e-7)
    assert torch.equal(found != 0, active) and active.any(dim=-1).all()
    if p == 1:
        assert torch.equal(found, output[1])


def test_probabilities_that_round_to_nothing_do_not_end_p_of_one() -> None:
    logit = torch.tensor([[60.0, 0.0, -60.0]])
    weights, index = logit.softmax(dim=-1).topk(2)
    assert TopP(1.0).active(0, (logit, weights, index)).tolist() == [[True, True]]
    assert TopP(0.999).active(0, (logit, weights, index)).tolist() == [[True, False]]


@pytest.mark.parametrize("family", SOFTMAX)
def test_every_family_runs_what_is_found_token_by_token(family: str) -> None:
    seen: set[int] = set()
    for p in (0.4, 0.7):
        model = tiny_model(family, **THREE)
        plain, dynamic = MoEModel(copy.deepcopy(model)), MoEModel(model, dynamic_routing=TopP(p))
        renormalises = family in RENORMALISING
        counts: list[torch.Tensor] = []

        def change(_router, _inputs, output, p=p, renormalises=renormalises, counts=counts):
            weights = routed_by_hand(output, p, renormalises=renormalises).to(output[1].dtype)
            counts.append((weights != 0).sum(dim=-1))
            return output[0], weights, output[2]

        genomes = [random_pruning(plain.shape, 6, top_k=3), random_merge(plain.shape, 6, top_k=3)]
        for genome in (None, *genomes):
            used = plain.shape.identity() if genome is None else genome
            oracle = plain.language_model if genome is None else stock_model(plain.language_model, used, plain.shape)
            block, router = plain.family.block, plain.family.router
            layers = [oracle.get_decoder().layers[place] for place in plain.shape.decoder_layers]
            handles = [layer.get_submodule(f"{block}.{router}").register_forward_hook(change) for layer in layers]
            counts.clear()
            expected = logits(oracle, tokens())
            for handle in handles:
                handle.remove()
            with dynamic.applied(used):
                found = logits(dynamic.language_model, tokens())
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
            assert torch.equal(dynamic.num_active, torch.stack(counts).sum(dim=0).int())
            seen.update(torch.cat(counts).tolist())
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("family", SOFTMAX)
def test_p_of_one_changes_nothing_and_a_tiny_p_runs_the_first_expert(family: str) -> None:
    model = tiny_model(family)
    rules = (None, TopP(1.0), TopP(1e-6))
    plain, whole, first = (MoEModel(copy.deepcopy(model), dynamic_routing=rule) for rule in rules)
    for genome in (plain.shape.identity(), random_pruning(plain.shape, 4), random_merge(plain.shape, 4)):
        with plain.applied(genome), whole.applied(genome):
            assert torch.equal(logits(whole.language_model, tokens()), logits(plain.language_model, tokens()))
        assert set(whole.num_active.tolist()) == {2 * plain.shape.num_layers}
    # deepseek_v2, olmoe and qwen2_moe do not renormalise, so an expert's weight does not depend on top_k
    alone, two = random_pruning(plain.shape, 4, top_k=1), random_pruning(plain.shape, 4, top_k=2)
    with plain.applied(alone), first.applied(two):
        torch.testing.assert_close(logits(first.language_model, tokens()), logits(plain.language_model, tokens()))
    assert plain.num_active is None and set(first.num_active.tolist()) == {plain.shape.num_layers}


def test_gates_that_observers_see_are_those_that_count() -> None:
    moe, seen = MoEModel(tiny_model("mixtral", **THREE), dynamic_routing=TopP(0.6)), []
    with observed_experts(moe, lambda *sight: seen.append(sight[2])):
        logits(moe.language_model, tokens())
    assert torch.equal(sum((gates != 0).sum(dim=-1) for gates in seen).int(), moe.num_active)
    torch.testing.assert_close(torch.cat(seen).sum(dim=-1), torch.ones(3 * 24))


def test_genomes_that_go_together_are_routed_as_each_alone() -> None:
    moe = MoEModel(tiny_model("qwen3_moe"), dynamic_routing=TopP(0.5))
    genomes = [random_pruning(moe.shape, 4), random_merge(moe.shape, 6), moe.shape.identity()]
    alone, active = [], []
    for genome in genomes:
        with moe.applied(genome):
            alone.append(logits(moe.language_model, tokens()))
        active.append(moe.num_active)
    with moe.applied_together(genomes):
        together = logits(moe.language_model, tokens().repeat(3, 1))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert torch.equal(moe.num_active, torch.cat(active))


def gang_logits(ranks: Ranks, folder: str, sharding: str) -> list[np.ndarray]:
    found = []
    for family in ("mixtral", "gpt_oss"):
        config = ModelConfig(path=f"{folder}/{family}", device="cpu", sharding=sharding, top_p=0.5)
        moe = load_model(ModelSource(config), ranks)
        for genome in (moe.shape.identity(), random_merge(moe.shape, 4)):
            with moe.applied(genome):
                found += [logits(moe.language_model, tokens()).numpy(), moe.num_active.numpy()]
    return found


@pytest.mark.parametrize("sharding", ["tensor_parallel", "zero3"])
def test_ranks_together_compute_what_one_process_computes(sharding: str, tmp_path: Path) -> None:
    for family in ("mixtral", "gpt_oss"):
        tiny_model(family).save_pretrained(tmp_path / family)
    expected = gang_logits(ALONE, str(tmp_path), "single")
    for of_rank in run_gang(gang_logits, 2, str(tmp_path), sharding):
        for got, wanted in zip(of_rank, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_weights_on_disk_are_routed_as_those_in_memory(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "mixtral")
    places = {"sharding": "device_map", "max_memory": {"cpu": "150KB"}, "offload_folder": str(tmp_path / "off")}
    found = []
    for options in ({}, places):
        config = ModelConfig(path=str(tmp_path / "mixtral"), device="cpu", top_p=0.5, **options)
        moe = load_model(ModelSource(config))
        assert any(weight.is_meta for weight in moe.language_model.parameters()) == bool(options)
        for genome in (moe.shape.identity(), random_pruning(moe.shape, 4)):
            with moe.applied(genome):
                found.append((logits(moe.language_model, tokens()), moe.num_active))
    for (one, num_active), (other, others) in zip(found[:2], found[2:], strict=True):
        assert torch.equal(one, other) and torch.equal(num_active, others)


@pytest.mark.parametrize("family", SIGMOID)
def test_a_router_without_probabilities_is_refused_before_weights_are_read(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"unreadable")
    message = f"^model.top_p: got 0.7, but this {family} model scores every expert by itself with a sigmoid, so .*out$"
    with pytest.raises(ConfigError, match=message):
        load_model(ModelSource(ModelConfig(path=str(tmp_path), device="cpu", top_p=0.7)))


@pytest.mark.parametrize("command", ["evaluate", "search", "plan"])
def test_commands_tell_it_before_a_model_is_loaded(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("glm4_moe", vocab_size=350).save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"unreadable")
    folder = [] if command == "evaluate" else ["--folder", str(tmp_path / "run")]
    words = [command, *folder, "--model.path", str(tmp_path / "model"), "--tasks", "[syll]", "--model.top_p", "0.7"]
    assert main(words) == 2
    assert "model.top_p: got 0.7, but this glm4_moe model scores every expert" in "".join(capsys.readouterr())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.top_p", "0"], "model.top_p: got 0.0, expected more than 0, up to 1"),
        (["--model.top_p", "1.5"], "model.top_p: got 1.5, expected more than 0, up to 1"),
        (["--model.top_p", ".nan"], "model.top_p: got '.nan', expected a number or null"),
        (["--model.top_p", "0.5", "--model.dynamic_skipping", "0.5"], "expected none: model.dynamic_skipping says"),
        (["--model.top_p", "0.5", "--model.router", "eep"], "expected none: with model.router 'eep'"),
    ],
)
def test_wrong_values_are_refused_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--tasks", "[syll]", "--model.path", str(tmp_path / "none"), *options]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1


def test_no_checkpoint_is_made_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = MoEModel(tiny_model("mixtral"), dynamic_routing=TopP(0.5))
    with pytest.raises(ExportError, match=r"^model.top_p: a stock architecture runs all top_k experts for every token"):
        export_checkpoint(moe, random_pruning(moe.shape, 4), tmp_path / "small", provenance={})
    words = ["prune", "--method", "reap", "--num_kept", "4", "--to", str(tmp_path / "small"), "--model.top_p", "0.5"]
    assert main(words) == 2
    assert "model.top_p: got 0.5, expected none: a stock checkpoint is made" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_the_command_line_evaluates_and_tells_the_mean_number_of_active_experts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["evaluate", "--tasks", "[{data: syll, num_search: 8, num_validation: 32, num_test: 8}]", "--json"]
    found = {}
    for p in ("null", "1e-6", "0.8", "1"):
        assert main([*words, "--model.top_p", p]) == 0
        found[p] = json.loads(capsys.readouterr().out)
    assert "syll/active_experts" not in found["null"]["metrics"]
    assert found["1"]["fitness"] == found["null"]["fitness"] != found["1e-6"]["fitness"]
    active = [found[p]["metrics"]["syll/active_experts"] for p in ("1e-6", "0.8", "1")]
    assert active[0] == 1 < active[1] < active[2] == 2
