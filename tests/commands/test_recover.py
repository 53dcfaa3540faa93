"""`moe-evo recover`, from the command line to the checkpoint; killed and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refusal, taken_folder
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_tasks import tiny_tokenizer
from transformers import AutoModelForCausalLM

from moe_evo.cli.main import main
from moe_evo.commands import teaching
from moe_evo.errors import ModelError
from moe_evo.recovery import training

TASK = "[{data: syll, num_search: 40, num_validation: 24, num_test: 40}]"
OPTIONS = ("--model.self_check", "false", "--tasks", TASK, "--evaluation.threads", "1")
SHORT = ("--recover.steps", "12", "--recover.batch_size", "8", "--recover.checks", "3")
LOGITS = ("--recover.methods", "logits")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the embedded model with two experts in each layer."""
    target = tmp_path_factory.mktemp("pruned") / "checkpoint"
    words = ["--method", "aimer", "--num_kept", "2", "--to", str(target)]
    assert main(["prune", *OPTIONS, *words]) == 0
    return target


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose winner has three experts in each layer."""
    folder = tmp_path_factory.mktemp("run") / "run"
    words = ["--search.num_kept", "3", "--search.evaluations", "4", "--selection.finalists", "2"]
    assert main(["search", *OPTIONS, *words, "--selection.baselines", "[]", "--folder", str(folder)]) == 0
    return folder


def recover(what: Path, target: Path, *words: str, capsys: pytest.CaptureFixture[str], options=OPTIONS) -> dict:
    capsys.readouterr()
    assert main(["recover", str(what), *options, *SHORT, "--to", str(target), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def scores_of(model: str | Path, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(["evaluate", "--model.path", str(model), *OPTIONS, "--split", "test", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


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
    assert "recovered model" in out and "EEP prune + merge, recovered" in out
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cluster.address", "local"], "--recover: got True, expected it without cluster.address (local)"),
        (["--search.num_kept", "[2, 3, 3, 3]"], "--recover: got True, expected one search.num_kept for all layers"),
        (["--recover.methods", "heal"], "recover.methods: got 'heal', expected one of logits, router, labels"),
        (["--model.router", "eep"], "model.router: got 'eep', expected 'exported'"),
    ],
)
def test_a_search_whose_winner_cannot_be_recovered_does_not_begin(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "--tasks", TASK, "--recover", *words, "--folder", str(tmp_path / "run")]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "run").exists()


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


PROGRAM = """
import sys
from moe_evo.cli.main import main
from moe_evo.recovery import training

step = training.Training._step

def slow_step(self, number):
    found = step(self, number)
    print("step", flush=True)
    sys.stdin.readline()
    return found

training.Training._step = slow_step
sys.exit(main(sys.argv[1:]))
"""


def test_killed_while_it_trains_it_goes_on_and_ends_with_the_same_checkpoint(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = recover(pruned, tmp_path / "whole", capsys=capsys)
    target = tmp_path / "killed"
    words = ["recover", str(pruned), *OPTIONS, *SHORT, "--to", str(target)]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(6):
            assert process.stdout.readline() == "step\n"
            process.stdin.write("\n")
            process.stdin.flush()
        os.kill(process.pid, signal.SIGKILL)
    assert not target.exists() and (tmp_path / "killed.recovery" / "state-1.safetensors").is_file()
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teaching, "_write_lessons", lambda *_: asked.append("the full model was asked again"))
        got = recover(pruned, target, "--recover.batch_tokens", "4095", capsys=capsys)
    assert not asked
    for key in ("scores", "gained", "missing", "prompts", "positions"):
        one, two = got[key], expected[key]
        assert one == two, key
    assert [check["validation"] for check in got["stages"][-1]["learned"]["checks"]] == [
        check["validation"] for check in expected["stages"][-1]["learned"]["checks"]
    ]
    other = weights(tmp_path / "whole")
    assert all(torch.equal(one, other[name]) for name, one in weights(target).items())
    assert not (tmp_path / "killed.recovery").exists()


def test_work_of_another_recovery_is_neither_used_nor_lost(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_):
        raise KeyboardInterrupt

    target = tmp_path / "recovered"
    words = ["recover", str(pruned), *OPTIONS, *SHORT, "--to", str(target)]
    monkeypatch.setattr(training.Training, "_step", die)
    assert main(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert main([*words, "--recover.seed", "1"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "recovered.recovery: holds the work of another recovery (recover.seed: 0 -> 1); delete it, or" in line
    assert (tmp_path / "recovered.recovery" / "state-1.safetensors").is_file()
    foreign = tmp_path / "other.recovery"
    foreign.mkdir()
    (foreign / "mine").write_text("mine")
    assert main([*words[:-1], str(tmp_path / "other")]) == 2
    assert "other.recovery: holds other files; move them, or give another --to" in capsys.readouterr().err
    assert (foreign / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recover.methods", "logit"], "recover.methods: got 'logit', did you mean 'logits'?"),
        (["--recover.methods", "[]"], "recover.methods: got [], expected at least one, such as logits"),
        (
            ["--recover.train", "[experts, heads]"],
            "recover.train: got ['experts', 'heads'], expected a list of",
        ),
        (["--recover.train", "[adapters, all]"], "expected adapters or all: adapters are trained in place of whole"),
        (["--recover.train", "norms"], "one of experts, adapters, scales or router for closed_form of recover.methods"),
        (
            ["--recover.train", "adapters", "--recover.rank", "91"],
            "recover.rank: got 91, expected at most 90: with more, adapters have more numbers than the experts of this",
        ),
        (["--recover.steps", "0"], "recover.steps: got 0, expected 1 or more"),
        (["--recover.learning_rate", "0"], "recover.learning_rate: got 0.0, expected more than 0, such as 0.001"),
        (["--recover.search_split", "false"], "expected true, or a file recover.prompts: there is nothing to learn"),
        (["--recover.prompts", "no.jsonl"], "recover.prompts: got 'no.jsonl', expected a file with one prompt"),
        (["--recover.prompt_weight", "0", "--recover.answer_tokens", "0"], "only the last position would be learned"),
        (["--cluster.address", "auto"], "cluster.address: got 'auto', expected none: recover needs no cluster"),
        (["--model.router", "eep"], "model.router: got 'eep', expected 'exported': a stock checkpoint is made"),
        (["--model.sharding", "device_map"], "model.sharding: got 'device_map', expected 'single': whole weights"),
        (["--which", "soup"], "--which: got 'soup', expected none: "),
        (["--to", "TAKEN"], "TAKEN: is not empty; give another folder, or replace it with --overwrite"),
        (["--to", "TAKEN", "--overwrite"], "TAKEN: was not written by moe_evo, so it is not overwritten"),
    ],
)
def test_wrong_input_is_told_in_one_line_before_a_model_is_loaded(
    words: list[str],
    expected: str,
    pruned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = str(taken_folder(tmp_path))
    words = [taken if word == "TAKEN" else word for word in words]
    target = tmp_path / "target"
    to = [] if "--to" in words else ["--to", str(target)]
    capsys.readouterr()
    line = refusal(["recover", str(pruned), *OPTIONS, *to, *words], target, teaching, capsys, monkeypatch)
    assert expected.replace("TAKEN", taken) in line
    assert not target.with_name("target.recovery").exists()


def test_a_full_model_of_other_tokens_or_the_target_itself_is_refused(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    tiny_model("mixtral", vocab_size=350).save_pretrained(other)
    tiny_tokenizer(bos=True).save_pretrained(other)
    words = ["recover", str(pruned), "--tasks", TASK, "--model.path", str(other), "--to", str(tmp_path / "t")]
    capsys.readouterr()
    line = refusal(words, tmp_path / "t", teaching, capsys, monkeypatch)
    assert f"model.path: got {other}, whose vocabulary is not that of {pruned}; give the full model" in line
    absent = [words[0], str(tmp_path / "none"), *words[2:]]
    line = refusal(absent, tmp_path / "t", teaching, capsys, monkeypatch)
    assert f"{tmp_path / 'none'}: no such folder" in line
    assert main([*words[:-1], str(pruned), "--model.path", "embedded", "--overwrite"]) == 2
    assert "is the model that is being exported; give another folder" in capsys.readouterr().err


def test_layers_are_compared_only_where_both_models_have_the_same(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["recover", str(pruned), *OPTIONS, "--model.path", "embedded-fine", "--to", str(tmp_path / "t")]
    capsys.readouterr()
    line = refusal(words, tmp_path / "t", teaching, capsys, monkeypatch)
    assert "recover.methods: got closed_form, logits, which compare layers, but those of" in line
    assert f"{pruned} are not those of embedded-fine; use logits, or give the full model" in line


def test_what_fails_before_anything_was_done_leaves_nothing_behind(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModelError("cannot be loaded")

    monkeypatch.setattr(teaching, "load_evaluator", fail)
    assert main(["recover", str(pruned), *OPTIONS, "--to", str(tmp_path / "t")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_winner_with_layers_of_different_size_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    words = ["--search.num_kept", "[2, 3, 4, 4]", "--search.evaluations", "3", "--selection.finalists", "1"]
    assert main(["search", *OPTIONS, *words, "--selection.baselines", "[]", "--folder", str(folder)]) == 0
    capsys.readouterr()
    line = refusal(["recover", str(folder), "--to", str(tmp_path / "t")], tmp_path / "t", teaching, capsys, monkeypatch)
    assert "layers of 'best' keep different numbers of experts, which no stock checkpoint holds" in line
    checkpoint, words = tmp_path / "checkpoint", ["--to", str(tmp_path / "t")]
    assert main(["export", str(folder), "--to", str(checkpoint)]) == 0
    capsys.readouterr()
    line = refusal(["recover", str(checkpoint), *OPTIONS, *words], tmp_path / "t", teaching, capsys, monkeypatch)
    assert f"{checkpoint}: its layers keep different numbers of experts, which no stock checkpoint holds" in line


def test_adapters_end_in_a_stock_checkpoint(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, words = tmp_path / "recovered", ["--recover.train", "[adapters, router]", "--recover.rank", "4"]
    told = recover(pruned, target, *LOGITS, *words, capsys=capsys)
    assert told["loader"] == "transformers" and told["max_logit_difference"] <= 1e-5
    (stage,) = told["stages"]
    assert stage["learned"]["checks"][-1]["validation"] < stage["learned"]["checks"][0]["validation"]
    before, after = weights(pruned), weights(target)
    changed = {name for name, one in after.items() if not torch.equal(one, before[name])}
    assert set(after) == set(before) and {name.split(".")[-2] for name in changed} == {"w1", "w2", "w3", "gate"}


def test_two_processes_do_not_work_on_the_same_recovery(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recover", str(pruned), *OPTIONS, *SHORT, "--to", str(tmp_path / "r")]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "step\n"
        started = time.monotonic()
        assert main(words) == 2
        assert time.monotonic() - started < 60
        process.kill()
    assert f"process {process.pid} is working on this run" in capsys.readouterr().err


def test_losses_of_labels_are_lower_with_the_labels(pruned: Path, tmp_path: Path, capsys) -> None:
    told = recover(pruned, tmp_path / "r", "--recover.methods", "labels", "--recover.label_weight", "0", capsys=capsys)
    more = recover(pruned, tmp_path / "s", "--recover.methods", "labels", "--recover.label_weight", "1", capsys=capsys)
    first = [one["stages"][-1]["learned"]["checks"][0]["validation"] for one in (told, more)]
    assert np.isfinite(first).all() and first[0] < first[1]  # the cross entropy comes on top
