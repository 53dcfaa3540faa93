"""`moe-evo prune` and `moe-evo criteria`, from the command line to the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from refusals import refusal, taken_folder
from transformers import AutoModelForCausalLM

import moe_evo
from moe_evo.cli.main import main
from moe_evo.commands import prune as prune_module
from moe_evo.criteria.merges import MERGES
from moe_evo.criteria.observation_file import load_observations
from moe_evo.criteria.registry import CRITERIA, METHODS
from moe_evo.evaluation.local_pool import LocalPool

TASK = "[{data: syll, num_search: 12, num_validation: 8, num_test: 16}]"
WORDS = ("prune", "--model.self_check", "false", "--tasks", TASK)


def prune(target: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([*WORDS, "--to", str(target), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def base_model_of(method: str) -> list[str]:
    return ["--base_model", "embedded"] if method in CRITERIA and CRITERIA[method].needs_base_model else []


@pytest.mark.parametrize("method", sorted(METHODS.keys() - MERGES.keys()))
def test_every_pruning_ends_with_a_checkpoint_that_stock_transformers_loads(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = prune(tmp_path / "small", "--method", method, "--num_kept", "4", *base_model_of(method), capsys=capsys)
    assert report["method"] == method and report["loader"] == "transformers"
    assert [len(kept) for kept in report["kept"]] == [4] * 4
    assert report["max_logit_difference"] < 1e-5
    assert report["scores"]["full"]["num_examples"] == report["scores"]["smaller"]["num_examples"] == 16
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    full = AutoModelForCausalLM.from_pretrained(Path(moe_evo.__file__).parent / "data" / "model")
    for layer, kept in enumerate(report["kept"]):
        router = full.model.layers[layer].mlp.gate.weight
        assert torch.equal(small.model.layers[layer].mlp.gate.weight, router[kept])
    thresholds = report.get("dynamic_skipping_beta", [])
    assert len(thresholds) == (4 if method.startswith("naee") else 0)
    assert all(0 < one < 1 for one in thresholds)


def test_what_was_observed_once_serves_other_criteria(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = str(tmp_path / "seen.safetensors")
    first = prune(tmp_path / "a", "--method", "reap", "--num_kept", "4", "--observations", seen, capsys=capsys)
    monkeypatch.setattr(LocalPool, "ask", lambda *_: pytest.fail("observed again"))
    again = prune(tmp_path / "b", "--method", "reap", "--num_kept", "4", "--observations", seen, capsys=capsys)
    other = prune(tmp_path / "c", "--method", "ean", "--num_kept", "2", "--observations", seen, capsys=capsys)
    assert again["kept"] == first["kept"] and [len(kept) for kept in other["kept"]] == [2] * 4


def test_a_file_of_observations_grows_by_the_tasks_that_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "seen.safetensors"
    both = TASK.replace("}]", "}, {data: nli, num_search: 12, num_validation: 8, num_test: 16}]")
    for number, tasks in enumerate((TASK, both)):
        words = [*WORDS[:3], "--tasks", tasks, "--to", str(tmp_path / str(number)), "--observations", str(seen)]
        assert main([*words, "--method", "reap", "--num_kept", "4"]) == 0
        assert [key.split("|")[1].split("@")[0] for key in load_observations(seen).answers] == ["syll", "nli"][
            : number + 1
        ]
    capsys.readouterr()


@pytest.mark.parametrize(
    "changed",
    [
        ["--tasks.num_search", "24"],
        ["--tasks.prefix", "once more "],
        ["--tasks.max_length", "8"],
        ["--model.dtype", "bfloat16"],
    ],
)
def test_other_prompts_and_other_numbers_are_observed_anew(
    changed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "seen.safetensors"
    words = ["--method", "frequency", "--num_kept", "4", "--observations", str(seen)]
    prune(tmp_path / "a", *words, capsys=capsys)
    prune(tmp_path / "b", *words, *changed, capsys=capsys)
    first, second = load_observations(seen).answers.values()
    tokens = [sum(float(layer.tokens.sum()) for layer in one.layers) for one in (first, second)]
    assert "dtype" in changed[0] or tokens[0] != tokens[1]


def test_a_task_that_counts_more_decides_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = TASK.replace("}]", "}, {data: nli, num_search: 12, num_validation: 8, num_test: 16}]")
    kept = {}
    for name, tasks, blend in (
        ("nli", both.replace("{data: syll", "{data: arith"), "{arith: 0, nli: 1}"),
        ("both", both, "{}"),
    ):
        words = [
            "prune",
            "--model.self_check",
            "false",
            "--tasks",
            tasks,
            "--blend",
            blend,
            "--to",
            str(tmp_path / name),
        ]
        assert main([*words, "--method", "reap", "--num_kept", "4", "--json"]) == 0
        kept[name] = json.loads(capsys.readouterr().out)["kept"]
    alone = TASK.replace("syll", "nli")
    words = ["prune", "--model.self_check", "false", "--tasks", alone, "--to", str(tmp_path / "alone")]
    assert main([*words, "--method", "reap", "--num_kept", "4", "--json"]) == 0
    assert kept["nli"] == json.loads(capsys.readouterr().out)["kept"] != kept["both"]


def test_people_are_told_what_was_kept_and_how_good_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--method", "frequency", "--num_kept", "4", "--to", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr()
    assert "layer   3   keeps " in printed.out and "full model" in printed.out and "smaller model" in printed.out
    assert "observing the experts" in printed.err
    card = (tmp_path / "small" / "README.md").read_text()
    assert "one-shot frequency pruning" in card and "smaller model " in card
    assert printed.out.count("on 16 examples of the test split") == 2


def test_criteria_are_listed_with_their_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["criteria"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in METHODS) and "arXiv 2510.13999" in printed
    assert max(map(len, printed.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["criteria"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 60
    words = {word for one in METHODS.values() for word in f"{one.name} {one.description} {one.source}".split()}
    assert words <= set(narrow.split()), "nothing is cut"
    assert main(["criteria", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == list(METHODS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "luck"], "--method: got 'luck', expected one of frequency, "),
        (["--num_kept", "8"], "--num_kept: got 8, expected 2 (active a token) to 7, one less than all"),
        (["--blend", "{nli: 1}"], "--blend: got task 'nli', expected one of syll"),
        (["--blend", "task=abc"], "blend: got 'task=abc', expected names with numbers, as in '{NAME: 2}' or null"),
        (["--blend", "{syll: abc}"], "blend: got \"{'syll': 'abc'}\", expected names with numbers, as in "),
        (["--blend.syll", "abc"], "blend.syll: got 'abc', expected a number"),
        (["--blend", "{syll: -1}"], "--blend: got syll: -1, expected 0 or more"),
        (["--method", "aimer", "--blend", "{syll: 1}"], "--blend: aimer looks at weights alone"),
        (["--blend", "{syll: 0}"], "--blend: got 0 for syll, expected more for one task at least"),
        (["--method", "router_norm"], "--method: router_norm compares with the checkpoint before fine-tuning, which"),
        (["--base_model", "embedded"], "--base_model: reap compares with no other checkpoint; only router_norm, "),
        (["--method", "router_norm", "--base_model", "none"], "none: no such folder"),
        (["--num_kept", "1"], "--num_kept: got 1, expected 2 (active a token) to 7"),
        (["--cluster.address", "local"], "prune needs no cluster"),
        (["--model.router", "eep"], "model.router: got 'eep'"),
        (["--to", "TAKEN"], "TAKEN"),
        (["--observations", "TAKEN/file"], "not a safetensors file"),
        (["--observations", "TAKEN/none/seen"], "--observations: got TAKEN/none/seen, expected a file in a folder "),
    ],
)
def test_wrong_input_is_one_line_before_a_model_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = taken_folder(tmp_path)
    words = [word.replace("TAKEN", str(taken)) for word in words]
    usual = {"--method": "reap", "--num_kept": "4", "--to": str(tmp_path / "small")}
    usual |= dict(zip(words[::2], words[1::2], strict=True))
    argv = [*WORDS, *(word for pair in usual.items() for word in pair)]
    assert message.replace("TAKEN", str(taken)) in refusal(argv, tmp_path / "small", prune_module, capsys, monkeypatch)
    assert (taken / "file").read_text() == "something else"
