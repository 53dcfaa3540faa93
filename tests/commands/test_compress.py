"""`moe-evo compress`, from the command line to the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal, taken_folder
from safetensors.torch import load_file
from tiny_models import logits, tiny_model, tokens
from tiny_tasks import tiny_tokenizer
from transformers import AutoModelForCausalLM

from moe_evo.cli.main import main
from moe_evo.commands import compress as command
from moe_evo.config.model import ModelConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource

TASK = "[{data: syll, num_search: 12, num_validation: 8, num_test: 16}]"
OPTIONS = ("--model.self_check", "false", "--tasks", TASK)
HALF = ("--method", "moe_pruner")
GROUPS = ("--method", "moe_pruner", "--pattern", "2:4")
FACTORS = ("--method", "mc_smoe", "--rank", "16")
NUM_WEIGHTS = 4 * 8 * 3 * 128 * 208


def compress(target: Path, *words: str, capsys: pytest.CaptureFixture[str], model: str = "embedded") -> dict:
    assert main(["compress", model, *OPTIONS, "--to", str(target), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def scores_of(model: str | Path, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["evaluate", "--model.path", str(model), *OPTIONS, "--split", "test", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expert_weights(folder: Path) -> dict[str, torch.Tensor]:
    """As they are in the files, which hold each expert's matrices by themselves."""
    tensors = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    return {name: one for name, one in tensors.items() if ".experts." in name}


@pytest.mark.parametrize("words", [HALF, GROUPS, FACTORS])
def test_the_checkpoint_is_a_stock_one_and_has_the_scores_that_were_told(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = compress(tmp_path / "small", *words, capsys=capsys)
    assert report["loader"] == "transformers" and report["max_logit_difference"] <= 1e-5
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    ours = load_model(ModelSource(ModelConfig(path=str(tmp_path / "small"), device="cpu")))
    torch.testing.assert_close(logits(stock, tokens()), logits(ours.language_model, tokens()))
    scores = {"original": scores_of("embedded", capsys), "compressed": scores_of(tmp_path / "small", capsys)}
    for name, told in report["scores"].items():
        assert told["num_examples"] == 16 and told["fitness"] == scores[name]["fitness"]
        for metric, value in told["metrics"].items():
            assert value == pytest.approx(scores[name]["metrics"][metric], rel=1e-5)
    likelihoods = [told["metrics"]["syll/log_likelihood"] for told in report["scores"].values()]
    assert likelihoods[0] != likelihoods[1]  # not the states of the experts as they were


@pytest.mark.parametrize("words", [HALF, GROUPS, FACTORS])
def test_the_sizes_that_are_told_are_those_of_the_files(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = compress(tmp_path / "small", *words, capsys=capsys)
    experts = report["experts"]
    stored = expert_weights(tmp_path / "small")
    assert experts["num_weights"] == sum(one.numel() for one in stored.values()) == NUM_WEIGHTS
    assert experts["num_nonzero"] == sum(int(one.count_nonzero()) for one in stored.values())
    assert experts["dense_bytes"] == sum(one.nbytes for one in stored.values())
    on_disk = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    header = 200 * 2**10
    assert report["bytes_before"] == report["bytes_after"] <= on_disk < report["bytes_after"] + header
    packed = experts["packed_bytes"]
    if words == FACTORS:
        gates = 16 * (208 + 128) + 13 * 208
        downs = 16 * (208 + 128) + 21 * 128
        assert packed == {"factors and columns": 4 * 8 * (4 * (2 * gates + downs) + 4 * (13 + 13 + 21))}
        assert all(torch.linalg.matrix_rank(one, rtol=1e-4) <= 16 + 21 for one in stored.values())
    else:
        assert experts["num_nonzero"] == NUM_WEIGHTS // 2
        assert packed["values and bitmask"] == NUM_WEIGHTS * 2 + NUM_WEIGHTS // 8
        assert all(((one == 0).sum(dim=1) * 2 == one.shape[1]).all() for one in stored.values())
    if words == GROUPS:
        assert packed["2:4 (values and 2-bit indices)"] == NUM_WEIGHTS * 2 + NUM_WEIGHTS // 8
        assert all(((one.reshape(-1, 4) == 0).sum(dim=1) == 2).all() for one in stored.values())


def test_an_exported_checkpoint_is_compressed_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *OPTIONS, "--method", "aimer", "--num_kept", "4", "--to", str(tmp_path / "pruned")]) == 0
    capsys.readouterr()
    report = compress(tmp_path / "sparse", *HALF, model=str(tmp_path / "pruned"), capsys=capsys)
    assert report["experts"]["num_weights"] == NUM_WEIGHTS // 2
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").config
    assert config.num_local_experts == 4
    card = (tmp_path / "sparse" / "README.md").read_text()
    for line in ("# pruned with sparse experts", "tags: [mixture-of-experts, sparse-experts, moe_evo]"):
        assert line in card.splitlines()
    assert "50% of every row of every expert's weights is zero (MoE-Pruner)" in card and "values and bitmask" in card
    record = json.loads((tmp_path / "sparse" / "moe_evo.json").read_text())
    assert record["base_model"] == "pruned" and "MoE-Pruner" in record["treatment"]
    assert record["provenance"]["compression"]["method"] == "moe_pruner"


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3"])
def test_other_families_are_compressed_on_other_tasks(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(model_type, vocab_size=350).save_pretrained(tmp_path / "model")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    for words in (GROUPS, ("--method", "mc_smoe", "--rank", "0.5", "--columns", "0")):
        report = compress(tmp_path / words[1], *words, model=str(tmp_path / "model"), capsys=capsys)
        assert report["max_logit_difference"] <= 1e-5
        assert all(0 < layer["relative_error"] < 1 for layer in report["layers"])


def test_tasks_that_compare_with_the_full_model_compare_with_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = TASK.replace("data: syll", "data: syll, kind: distillation")
    report = compress(tmp_path / "small", *FACTORS, "--tasks", task, capsys=capsys)
    original, compressed = (report["scores"][name]["fitness"] for name in ("original", "compressed"))
    assert original == pytest.approx(0, abs=1e-6) and compressed < -1e-3


def test_people_are_told_what_it_takes_and_what_would_make_it_smaller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "embedded", *OPTIONS, *HALF, "--to", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr()
    for told in (
        "original model    ", "compressed model  ", "not zero    1,277,952 of 2,555,904 weights of experts (50.0%)",
        "as written  9.75 MiB of experts, as before", "would take  5.18 MiB as values and bitmask (53.1% of dense)",
        "that needs  a loader and kernel for unstructured sparse experts", "weighted by inputs",
    ):  # fmt: skip
        assert told in printed.out
    assert "observing on the search split" in printed.err and "MoE layer 3 (4 of 4)" in printed.err
    words = ("--method", "mc_smoe", "--rank", "1.0", "--columns", "0.5")
    assert main(["compress", "embedded", *OPTIONS, *words, "--to", str(tmp_path / "large")]) == 0
    printed = capsys.readouterr()
    assert "of dense, more than densely)" in printed.out and "observing" not in printed.err


def test_a_config_may_follow_the_checkpoint_and_options_may_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{path: nowhere, self_check: false}}\ntasks: {TASK}\n")
    words = ["embedded", str(config), *HALF, "--to", str(tmp_path / "first"), "--json"]
    assert main(["compress", *words]) == 0
    first = json.loads(capsys.readouterr().out)
    words = [*HALF, *OPTIONS, "--to", str(tmp_path / "second"), "embedded", "--json"]
    assert main(["compress", *words]) == 0
    second = json.loads(capsys.readouterr().out)
    assert first["scores"] == second["scores"] and first["layers"] == second["layers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "luck"], "--method: got 'luck', expected one of moe_pruner, mc_smoe"),
        (["--sparsity", "1.5"], "--sparsity: got 1.5, expected a share between 0 and 1"),
        (["--sparsity", "half"], "sparsity: got 'half', expected a number"),
        (["--sparsity", "0.5", "--pattern", "2:4"], "--sparsity: got 0.5, expected nothing beside --pattern"),
        (["--pattern", "4:2"], "--pattern: got '4:2', expected N:M with 0 < N < M"),
        (["--pattern", "3:7"], "--pattern: got '3:7', expected groups that divide rows of 128 and of 208 weights"),
        (["--rank", "4"], "--rank: got 4, expected nothing: moe_pruner does not read it"),
        (["--method", "mc_smoe"], "--rank: got None, expected a whole number from 1 on, or a share"),
        (["--method", "mc_smoe", "--rank", "0"], "--rank: got 0, expected a whole number from 1 on"),
        (["--method", "mc_smoe", "--rank", "1.5"], "--rank: got 1.5, expected a whole number from 1 on"),
        (["--method", "mc_smoe", "--rank", "129"], "--rank: got 129, expected at most 128, the full rank"),
        (["--method", "mc_smoe", "--rank", "4", "--columns", "2"], "--columns: got 2"),
        (["--method", "mc_smoe", "--rank", "4", "--pattern", "2:4"], "mc_smoe does not read it"),
        (["--cluster.address", "local"], "compress needs no cluster"),
        (["--model.router", "eep"], "model.router: got 'eep'"),
        (["--model.sharding", "device_map"], "model.sharding: got 'device_map', expected 'single'"),
        (["--model.path", "embedded"], "--model.path: got it beside CHECKPOINT"),
        (["--to", "TAKEN"], "TAKEN: is not empty"),
        (["CHECKPOINT", "TAKEN"], "TAKEN: has no config.json"),
        (["CHECKPOINT", "TAKEN/no"], "TAKEN/no: no such folder"),
        (["CHECKPOINT", ""], "CHECKPOINT: is missing, expected an exported folder or any other model"),
    ],
)
def test_wrong_input_is_one_line_before_a_model_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = taken_folder(tmp_path)
    words = [word.replace("TAKEN", str(taken)) for word in words]
    usual = {"CHECKPOINT": "embedded", "--method": "moe_pruner", "--to": str(tmp_path / "small")}
    usual |= dict(zip(words[::2], words[1::2], strict=True))
    checkpoint = usual.pop("CHECKPOINT")
    given = [*([checkpoint] if checkpoint else []), *OPTIONS, *(word for pair in usual.items() for word in pair)]
    line = refusal(["compress", *given], tmp_path / "small", command, capsys, monkeypatch)
    assert message.replace("TAKEN", str(taken)) in line
    assert (taken / "file").read_text() == "something else"


def test_an_older_export_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "small"
    compress(target, *FACTORS, capsys=capsys)
    before = expert_weights(target)
    assert main(["compress", "embedded", *OPTIONS, *HALF, "--to", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert all(torch.equal(one, before[name]) for name, one in expert_weights(target).items())
    compress(target, *HALF, "--overwrite", capsys=capsys)
    assert all((one == 0).any() for one in expert_weights(target).values())
    assert main(["compress", str(target), *OPTIONS, *HALF, "--to", str(target), "--overwrite"]) == 2
    assert "is the model that is being exported" in capsys.readouterr().err


def test_help_names_the_checkpoint_and_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "--help"]) == 0
    text = capsys.readouterr().out
    assert "moe-evo compress CHECKPOINT" in text and "--pattern N:M" in text


def test_references_that_memory_did_not_hold_are_not_taken_from_the_compressed_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([4096, *[2048] * 100])  # as if memory had run out while the compressed model was scored
    scored = command.scored_on_test

    def scored_then_smaller(evaluator: Evaluator, *rest: Any) -> Any:
        found = scored(evaluator, *rest)
        monkeypatch.setattr(Evaluator, "batch_tokens", property(lambda _: next(sizes)))
        return found

    monkeypatch.setattr(command, "scored_on_test", scored_then_smaller)
    task = TASK.replace("data: syll", "data: syll, kind: distillation")
    words = ["compress", "embedded", "--model.self_check", "false", "--tasks", task, *FACTORS]
    assert main([*words, "--to", str(tmp_path / "small")]) == 2
    assert "use --evaluation.batch_tokens 2048" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
