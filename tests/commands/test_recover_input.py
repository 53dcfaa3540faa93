"""What `moe-evo recover` refuses, in one line and before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from recoveries import OPTIONS, TASK
from refusals import refusal, taken_folder
from tiny_models import tiny_model
from tiny_tasks import tiny_tokenizer

from moe_evo.cli.main import main
from moe_evo.commands import teaching
from moe_evo.errors import ModelError


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
