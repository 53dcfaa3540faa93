"""`moe-evo prune` and `moe-evo criteria`, from the command line to the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_evo import one_shot
from moe_evo.cli import main
from moe_evo.criteria import observation
from moe_evo.criteria.registry import CRITERIA

TASK = "[{data: syll, num_search: 12, num_validation: 8, num_test: 16}]"
WORDS = ("prune", "--model.self_check", "false", "--tasks", TASK)


def prune(target: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([*WORDS, "--to", str(target), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", sorted(CRITERIA))
def test_every_criterion_ends_with_a_checkpoint_that_stock_transformers_loads(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = prune(tmp_path / "small", "--method", method, "--num_kept", "4", capsys=capsys)
    assert report["method"] == method and report["loader"] == "transformers"
    assert [len(kept) for kept in report["kept"]] == [4] * 4
    assert report["max_logit_difference"] < 1e-5
    assert report["scores"]["full"]["num_examples"] == report["scores"]["pruned"]["num_examples"] == 16
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    full = AutoModelForCausalLM.from_pretrained(Path(one_shot.__file__).parent / "data" / "model")
    for layer, kept in enumerate(report["kept"]):
        router = full.model.layers[layer].mlp.gate.weight
        assert torch.equal(small.model.layers[layer].mlp.gate.weight, router[kept])


def test_what_was_observed_once_serves_other_criteria(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = str(tmp_path / "seen.safetensors")
    first = prune(tmp_path / "a", "--method", "reap", "--num_kept", "4", "--observations", seen, capsys=capsys)
    monkeypatch.setattr(observation, "observe", lambda *_: pytest.fail("observed again"))
    again = prune(tmp_path / "b", "--method", "reap", "--num_kept", "4", "--observations", seen, capsys=capsys)
    other = prune(tmp_path / "c", "--method", "ean", "--num_kept", "2", "--observations", seen, capsys=capsys)
    assert again["kept"] == first["kept"] and [len(kept) for kept in other["kept"]] == [2] * 4
    words = [*WORDS[:3], "--tasks", TASK.replace("syll", "nli"), "--to", str(tmp_path / "d")]
    assert main([*words, "--method", "reap", "--num_kept", "4", "--observations", seen]) == 2
    assert "--observations" in capsys.readouterr().err and not (tmp_path / "d").exists()


def test_people_are_told_what_was_kept_and_how_good_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--method", "frequency", "--num_kept", "4", "--to", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr()
    assert "layer   3   keeps " in printed.out and "full model" in printed.out and "pruned model" in printed.out
    assert "observing the experts on the search split" in printed.err
    card = (tmp_path / "small" / "README.md").read_text()
    assert "one-shot criterion frequency" in card


def test_criteria_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["criteria"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in CRITERIA) and "arXiv 2510.13999" in printed
    assert main(["criteria", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == list(CRITERIA)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "luck"], "--method: got 'luck', expected one of frequency, "),
        (["--num_kept", "9"], "num_kept"),
        (["--num_kept", "1"], "top_k"),
        (["--cluster.address", "local"], "prune needs no cluster"),
        (["--model.router", "eep"], "model.router: got 'eep'"),
        (["--to", "TAKEN"], "TAKEN"),
        (["--observations", "TAKEN/file"], "not a safetensors file"),
    ],
)
def test_wrong_input_is_one_line_before_a_model_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "TAKEN"
    taken.mkdir()
    (taken / "file").write_text("something else")
    monkeypatch.setattr(one_shot, "load_evaluator", lambda *_: pytest.fail("a model was loaded"))
    words = [word.replace("TAKEN", str(taken)) for word in words]
    usual = {"--method": "reap", "--num_kept": "4", "--to": str(tmp_path / "small")}
    usual |= dict(zip(words[::2], words[1::2], strict=True))
    assert main([*WORDS, *(word for pair in usual.items() for word in pair)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message.replace("TAKEN", str(taken)) in line
    assert not (tmp_path / "small").exists() and (taken / "file").read_text() == "something else"
