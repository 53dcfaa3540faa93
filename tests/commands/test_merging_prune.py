"""`moe-evo prune` with methods that merge: from the command line to a checkpoint, and back to the same scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refusal
from tiny_models import logits, tokens
from transformers import AutoModelForCausalLM

import moe_evo
from moe_evo.cli.main import main
from moe_evo.commands import prune as prune_module
from moe_evo.config.model import ModelConfig
from moe_evo.criteria.merges import MERGES
from moe_evo.genomes.file import load_genome, load_metadata
from moe_evo.models.experts.alignment_file import load_alignment
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource

TASK = "[{data: syll, num_search: 12, num_validation: 8, num_test: 16}]"
WORDS = ("--model.self_check", "false", "--tasks", TASK)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main([*words, *WORDS, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def prune(capsys: pytest.CaptureFixture[str], target: Path, method: str, *words: str) -> dict:
    return run(capsys, "prune", "--to", str(target), "--method", method, "--num_kept", "4", *words)


@pytest.mark.parametrize("method", sorted(MERGES))
def test_every_merge_ends_with_a_smaller_checkpoint_that_stock_transformers_loads(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = prune(capsys, tmp_path / "small", method)
    assert report["aligned"] == MERGES[method].aligns and report["loader"] == "transformers"
    assert report["parameters_after"] < 0.6 * report["parameters_before"]
    full_size = sum(
        file.stat().st_size for file in (Path(moe_evo.__file__).parent / "data/model").glob("*.safetensors")
    )
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < 0.6 * full_size
    assert any(len(members) > 1 for slots in report["made_of"] for members in slots)

    beside = tmp_path / "small" / "moe_evo"
    alignment = beside / "alignment.safetensors"
    assert alignment.is_file() == report["aligned"]
    moe = load_model(
        ModelSource(
            ModelConfig(device="cpu", self_check=False, alignment=str(alignment) if report["aligned"] else None)
        )
    )
    genome = load_genome(beside / "genome.safetensors")
    digest = load_alignment(alignment, ModelSource(ModelConfig()).hash).digest if report["aligned"] else None
    made_by = {"method": method, "router": "exported", "alignment": digest}
    assert load_metadata(beside / "genome.safetensors")["provenance"] == made_by
    assert report["genome"] == str(beside / "genome.safetensors")
    with moe.applied(genome):
        expected = logits(moe.language_model, tokens(batch=4, length=20))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert small.config.num_local_experts == 4
    torch.testing.assert_close(logits(small, tokens(batch=4, length=20)), expected, rtol=1e-5, atol=1e-5)


def test_an_aligned_merge_is_evaluated_again_with_its_alignment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = prune(capsys, tmp_path / "small", "average", "--aligned", "true")
    beside = tmp_path / "small" / "moe_evo"
    genome = ("--genome", str(beside / "genome.safetensors"), "--split", "test")
    alignment = ("--model.alignment", str(beside / "alignment.safetensors"))
    again = run(capsys, "evaluate", *genome, *alignment)
    by_folder = run(capsys, "evaluate", "--genome", str(tmp_path / "small"), *genome[2:], *alignment)
    assert {**by_folder, "duration_s": 0.0, "genome": genome[1]} == {**again, "duration_s": 0.0}
    assert main(["evaluate", *WORDS, *genome]) == 2
    told = capsys.readouterr().err
    assert "merges experts with the model.alignment" in told and f"add --model.alignment {alignment[1]}" in told
    assert "loading" not in told
    metrics = report["scores"]["smaller"]["metrics"]
    assert again["metrics"] == metrics
    once_more = prune(capsys, tmp_path / "more", "average", *alignment)
    assert not once_more["aligned"] and once_more["scores"] == report["scores"]
    copied = tmp_path / "more" / "moe_evo" / "alignment.safetensors"
    assert copied.read_bytes() == (beside / "alignment.safetensors").read_bytes()


def test_merges_may_differ_in_size_by_layer_or_go_layer_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = prune(capsys, tmp_path / "global", "m_smoe", "--allocation", "global")
    sizes = [len(slots) for slots in report["made_of"]]
    assert sum(sizes) == 16 and len(set(sizes)) > 1 and report["loader"] == "moe_evo"
    small = moe_evo.load_pruned(tmp_path / "global", device="cpu")
    assert [layer.mlp.gate.weight.shape[0] for layer in small.model.layers] == sizes
    report = prune(capsys, tmp_path / "behind", "ream", "--progressive")
    assert [len(slots) for slots in report["made_of"]] == [4] * 4


@pytest.mark.parametrize("method", ["m_smoe", "ream"])
def test_layers_are_looked_at_behind_merges_that_are_aligned(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--progressive", "--observations", str(tmp_path / "seen.safetensors"))
    apart = prune(capsys, tmp_path / "apart", method, *words, "--aligned", "false")
    report = prune(capsys, tmp_path / "once", method, *words)
    assert report["aligned"] and not apart["aligned"]
    alignment = tmp_path / "once" / "moe_evo" / "alignment.safetensors"
    again = prune(capsys, tmp_path / "again", method, "--progressive", "--model.alignment", str(alignment))
    assert again["made_of"] == report["made_of"]
    genomes = [load_genome(one["genome"]) for one in (report, again, apart)]
    for ours, oracle in zip(genomes[0].layers, genomes[1].layers, strict=True):
        np.testing.assert_allclose(ours.expert_merging, oracle.expert_merging, rtol=1e-4)
    assert genomes[0].layers[0] == genomes[2].layers[0] and genomes[0].layers[1:] != genomes[2].layers[1:]
    assert again["scores"]["smaller"]["metrics"] == pytest.approx(report["scores"]["smaller"]["metrics"], rel=1e-4)


def test_people_are_told_which_experts_were_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("prune", *WORDS, "--method", "m_smoe", "--num_kept", "4", "--to", str(tmp_path / "small"))
    assert main([*words]) == 0
    printed = capsys.readouterr()
    assert "layer   3   merges " in printed.out and "+" in printed.out
    assert "aligned MoE layer 4 of 4" in printed.err
    card = (tmp_path / "small" / "README.md").read_text()
    assert "alignment: digest " in card and "merges experts" in card and "pruned model" not in card + printed.out
    slots = [line.partition(" merges ")[2] for line in printed.out.splitlines() if line.startswith("layer ")]
    rows = [line.split(" | ")[-1] for line in card.splitlines() if line.endswith("|")]
    assert rows[2:] == [f"{made_of} |" for made_of in slots] and "Experts joined by + became one" in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "reap", "--aligned", "true"], "--aligned: got true, but reap merges nothing"),
        (["--aligned", "true", "--model.alignment", "FILE"], "--aligned: got true beside --model.alignment"),
        (["--model.alignment", "FILE"], "FILE: cannot be read"),
        (["--progressive", "--allocation", "global"], "--progressive: got it beside --allocation global"),
    ],
)
def test_wrong_input_is_one_line_before_a_model_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "none.safetensors")
    words = [word.replace("FILE", file) for word in words]
    method = [] if "--method" in words else ["--method", "m_smoe"]
    argv = ["prune", *WORDS, *method, "--num_kept", "4", "--to", str(tmp_path / "small"), *words]
    assert message.replace("FILE", file) in refusal(argv, tmp_path / "small", prune_module, capsys, monkeypatch)
