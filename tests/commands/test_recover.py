"""`moe-evo recover`, from the command line to the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recoveries import LOGITS, OPTIONS, SHORT, recover, scores_of, weights
from transformers import AutoModelForCausalLM

from moe_evo.cli.main import main


@pytest.mark.parametrize("method", ["logits", "router", "labels", "layerwise", "closed_form"])
def test_a_checkpoint_learns_and_its_scores_are_those_that_were_told(
    method: str, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "recovered"
    told = recover(pruned, target, "--recover.methods", method, capsys=capsys)
    assert told["loader"] == "transformers" and told["max_logit_difference"] <= 1e-5
    scores = {"full": scores_of("embedded", capsys), "pruned": scores_of(pruned, capsys)}
    scores["recovered"] = scores_of(target, capsys)
    for name, score in told["scores"].items():
        assert score["num_examples"] == 40 and score["fitness"] == scores[name]["fitness"]
        assert score["metrics"]["syll/log_likelihood"] == pytest.approx(scores[name]["metrics"]["syll/log_likelihood"])
    gained = scores["recovered"]["fitness"] - scores["pruned"]["fitness"]
    assert told["gained"]["value"] == pytest.approx(gained) and told["gained"]["num_examples"] == 40
    missing = scores["recovered"]["fitness"] - scores["full"]["fitness"]
    assert told["missing"]["value"] == pytest.approx(missing)
    (stage,) = told["stages"]
    checks, is_layers = stage["learned"]["checks"], method in ("layerwise", "closed_form")
    assert [check["step"] for check in checks] == ([0, 1, 2, 3, 4] if is_layers else [0, 4, 8, 12])
    assert told["prompts"] == 40 and stage["method"] == method and stage["unit"] == ("layer" if is_layers else "step")
    assert checks[-1]["validation"] < checks[0]["validation"]
    stock = AutoModelForCausalLM.from_pretrained(target)
    assert stock.config.num_local_experts == 2
    changed = {name for name, one in weights(target).items() if not torch.equal(one, weights(pruned)[name])}
    assert changed and all(".gate." in name for name in changed) == (method == "router")
    assert all(".w2." in name for name in changed) == (method == "closed_form")  # down matrices, as files name them
    assert json.loads((target / "moe_evo" / "recovery.json").read_text("utf-8"))["stages"] == told["stages"]
    assert (target / "moe_evo" / "recovery.png").read_bytes().startswith(b"\x89PNG")
    assert not target.with_name("recovered.recovery").exists()
    card = (target / "README.md").read_text("utf-8")
    assert "with fewer experts, recovered" in card and f"  - {method}: {checks[-1]['step']} " in card
    assert "learned from: 40 prompts" in card and "recovered model " in card


def test_the_winner_of_a_run_learns_with_the_run_s_own_model_and_tasks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "recovered"
    assert main(["show", str(run)]) == 0
    assert f"moe-evo recover {run} --to {run / 'recovered'}" in capsys.readouterr().out
    told = recover(run, target, capsys=capsys, options=())
    result = json.loads((run / "result.json").read_text("utf-8"))
    rows = {row["key"]: row for row in result["rows"]}
    assert told["scores"]["pruned"]["fitness"] == rows["best"]["scores"]["test"]["fitness"]
    assert told["scores"]["full"]["fitness"] == rows["full"]["scores"]["test"]["fitness"]
    assert AutoModelForCausalLM.from_pretrained(target).config.num_local_experts == 3
    assert f"digest {rows['best']['digest']}" in (target / "README.md").read_text("utf-8")
    (row,) = result["recovered"]
    assert row["key"] == "recovered" and row["title"] == f"{rows['best']['title']}, recovered"
    assert row["scores"]["test"] == told["scores"]["recovered"] and set(row["scores"]) == {
        "search",
        "validation",
        "test",
    }
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert row["title"] in shown and "moe-evo recover" not in shown
    assert main(["compare", str(run), "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(",recovered," in line for line in lines) == 1
    assert main(["report", str(run), "--to", str(tmp_path / "report.html")]) == 0
    again = recover(run, tmp_path / "again", "--recover.seed", "1", capsys=capsys, options=())
    (row,) = json.loads((run / "result.json").read_text("utf-8"))["recovered"]  # the newest in place of the older one
    assert row["scores"]["test"] == again["scores"]["recovered"]
    assert main(["wandb-replay", str(run), "--tracking.wandb", "offline"]) == 0


def test_search_and_prune_recover_what_they_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ["--search.num_kept", "3", "--search.evaluations", "4", "--selection.finalists", "2"]
    words += ["--selection.baselines", "[]", "--folder", str(folder)]
    assert main(["search", *OPTIONS, *words, *SHORT, "--recover"]) == 0
    out = capsys.readouterr().out
    assert "recovered model" in out and "surrogate, recovered" in out
    assert AutoModelForCausalLM.from_pretrained(folder / "recovered").config.num_local_experts == 3
    assert main(["search", *OPTIONS, *words, *SHORT, "--recover"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--recover: {folder / 'recovered'} is there already; move it, or recover the run with another" in line
    target = tmp_path / "pruned"
    pruning = ["--method", "aimer", "--num_kept", "2", "--to", str(target), "--recover", "true"]
    assert main(["prune", *OPTIONS, *pruning, *SHORT, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recovered"]["folder"] == f"{target}-recovered" and told["folder"] == str(target)
    assert told["scores"]["smaller"] == told["recovered"]["scores"]["pruned"]
    before, after = weights(target), weights(tmp_path / "pruned-recovered")
    assert not any(torch.equal(before[name], one) for name, one in after.items() if ".gate." in name)


def test_options_of_recovery_may_stand_in_the_config_of_a_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tasks: [{data: syll, num_search: 8, num_validation: 4, num_test: 4}]\nrecover: {steps: 0}\n")
    assert main(["search", str(file), "--folder", str(tmp_path / "run"), "--recover"]) == 2
    assert "recover.steps: got 0, expected 1 or more" in capsys.readouterr().err
    assert main(["evaluate", str(file), "--split", "validation"]) == 0  # which has no such section


def test_what_is_printed_says_what_it_gained_and_what_to_do_next(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "recovered"
    assert main(["recover", str(pruned), *OPTIONS, *SHORT, "--to", str(target)]) == 0
    out, progress = capsys.readouterr()
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    for name in (
        "full model",
        "pruned model",
        "recovered model",
        "gained",
        "missing",
        "learned",
        "verdict",
        "picture",
    ):
        assert name in lines
    assert "40 prompts with their answers" in lines["learned"] and "next" in lines
    assert any(line.startswith("closed_form 4 layers, ") for line in out.splitlines())
    assert any(line.startswith("logits      12 steps, ") for line in out.splitlines())
    assert f"--model.path {target}" in lines["next"]
    assert "recovering (logits): 12 steps" in progress and "answering learned prompts: 40/40" in progress


def test_a_fit_that_rests_on_few_tokens_says_so_and_what_helps(pruned: Path, tmp_path: Path, capsys) -> None:
    few = ("--recover.methods", "closed_form")
    for words, advice in ((few, "give more prompts"), ((*few, "--recover.block_tokens", "50"), "raise recover.block")):
        assert main(["recover", str(pruned), *OPTIONS, *words, "--to", str(tmp_path / advice.split()[0])]) == 0
        progress = capsys.readouterr().err
        (line,) = [one for one in progress.splitlines() if "closed_form rests on" in one]
        # two experts, both active, of 208 neurons
        assert "tokens, where 832 would be four for each neuron of an expert" in line and advice in line


def test_prompts_of_a_file_are_learned_beside_or_in_place_of_the_search_split(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"how many syllables has word {n}?"}) + "\n" for n in range(9)))
    both = recover(pruned, tmp_path / "both", "--recover.prompts", str(file), capsys=capsys)
    words = ("--recover.prompts", str(file), "--recover.search_split", "false", "--recover.answer_tokens", "0")
    alone = recover(pruned, tmp_path / "alone", *words, capsys=capsys)
    assert (both["prompts"], alone["prompts"]) == (49, 9)


def test_without_a_lower_validation_loss_the_pruned_model_is_left_as_it_is(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "recovered"
    words = (*LOGITS, "--recover.learning_rate", "30", "--recover.patience", "1", "--recover.checks", "12")
    assert main(["recover", str(pruned), *OPTIONS, *SHORT, *words, "--to", str(target)]) == 0
    out, progress = capsys.readouterr()
    assert "learning never lowered the validation loss, so the pruned model is left as it was" in out
    assert "stopped after 1 of 12 steps: " in progress
    before = weights(pruned)
    assert all(torch.equal(one, before[name]) for name, one in weights(target).items())


def test_adapters_end_in_a_stock_checkpoint(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, words = tmp_path / "recovered", ["--recover.train", "[adapters, router]", "--recover.rank", "4"]
    told = recover(pruned, target, *LOGITS, *words, capsys=capsys)
    assert told["loader"] == "transformers" and told["max_logit_difference"] <= 1e-5
    (stage,) = told["stages"]
    assert stage["learned"]["checks"][-1]["validation"] < stage["learned"]["checks"][0]["validation"]
    before, after = weights(pruned), weights(target)
    changed = {name for name, one in after.items() if not torch.equal(one, before[name])}
    assert set(after) == set(before) and {name.split(".")[-2] for name in changed} == {"w1", "w2", "w3", "gate"}


def test_losses_of_labels_are_lower_with_the_labels(pruned: Path, tmp_path: Path, capsys) -> None:
    told = recover(pruned, tmp_path / "r", "--recover.methods", "labels", "--recover.label_weight", "0", capsys=capsys)
    more = recover(pruned, tmp_path / "s", "--recover.methods", "labels", "--recover.label_weight", "1", capsys=capsys)
    first = [one["stages"][-1]["learned"]["checks"][0]["validation"] for one in (told, more)]
    assert np.isfinite(first).all() and first[0] < first[1]  # the cross entropy comes on top
