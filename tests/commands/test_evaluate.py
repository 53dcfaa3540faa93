"""`moe-evo evaluate` with a baseline, and with a file of samples that tells what was answered to every example."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import moe_evo
from moe_evo.cli.main import main
from moe_evo.records.paired import paired

Lines = list[dict[str, Any]]
MODEL = Path(moe_evo.__file__).parent / "data" / "model"
GENOME = "[[0,1,2,3],[0,1,2,3],[0,1,2,3],[0,1,2,3]]"


@pytest.fixture
def evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], Lines]]:
    def run(*words: str) -> tuple[dict[str, Any], Lines]:
        file = tmp_path / "samples.jsonl"
        assert main(["evaluate", *words, "--samples", str(file), "--evaluation.threads", "1", "--json"]) == 0
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        return json.loads(capsys.readouterr().out), lines

    return run


@pytest.fixture(scope="module")
def stock() -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(MODEL)


@torch.inference_mode()
def stock_log_likelihood(stock: tuple[Any, Any], prompt: str, choice: str) -> float:
    model, tokenizer = stock
    start, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + choice)["input_ids"]
    log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[place - 1, whole[place]]) for place in range(len(start), len(whole)))


def test_samples_of_choices_are_what_stock_transformers_finds(
    evaluated: Callable[..., tuple[dict[str, Any], Lines]], stock: tuple[Any, Any]
) -> None:
    found, lines = evaluated("--tasks", '[{"data": "syll", "num_test": 24}]', "--split", "test")
    assert len(lines) == found["num_examples"] == 24
    assert np.mean([line["score"] for line in lines]) == pytest.approx(found["fitness"])
    for line in lines:
        wanted = [stock_log_likelihood(stock, line["prompt"], choice) for choice in line["choices"]]
        np.testing.assert_allclose(line["log_likelihoods"], wanted, atol=1e-3)
        assert line["answer"] == line["choices"][int(np.argmax(wanted))]
        assert line["score"] == float([line["answer"]] == line["gold"])
        assert (line["task"], line["split"], line["metric"]) == ("syll", "test", "accuracy")


def test_samples_of_generated_answers_are_what_stock_transformers_writes(
    evaluated: Callable[..., tuple[dict[str, Any], Lines]], stock: tuple[Any, Any], tmp_path: Path
) -> None:
    data = Path(moe_evo.__file__).parent / "data" / "tasks" / "nli"
    task = {"data": str(data), "name": "g", "kind": "generation", "metric": "exact_match", "num_validation": 8,
            "max_new_tokens": 4}  # fmt: skip
    found, lines = evaluated("--tasks", json.dumps([task]))
    model, tokenizer = stock
    for line in lines:
        prompt = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
        new = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        assert line["answer"] == tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]
        assert line["score"] == float(line["answer"].strip().casefold() in {one.strip() for one in line["gold"]})
    assert np.mean([line["score"] for line in lines]) == pytest.approx(found["fitness"])


def test_texts_have_a_score_and_no_answer(
    evaluated: Callable[..., tuple[dict[str, Any], Lines]], tmp_path: Path
) -> None:
    texts = [{"text": f"All cats are farmers; text number {n} of them."} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    found, lines = evaluated("--tasks", json.dumps([str(tmp_path / "texts.jsonl")]))
    assert len(lines) == found["num_examples"]
    assert not {"answer", "gold", "choices", "prompt"} & set().union(*lines)
    assert all(line["text"].startswith("All cats") for line in lines)
    assert np.mean([line["score"] for line in lines]) == pytest.approx(found["fitness"])


def test_a_baseline_is_scored_on_the_same_examples_and_the_verdict_is_that_of_a_paired_test(
    capsys: pytest.CaptureFixture[str], evaluated: Callable[..., tuple[dict[str, Any], Lines]], tmp_path: Path
) -> None:
    task = ["--tasks", '[{"data": "nli", "num_test": 60}]', "--split", "test"]
    found, small = evaluated(*task, "--genome", GENOME, "--baseline", "full")
    (tmp_path / "samples.jsonl").unlink()
    alone, full = evaluated(*task)
    own, others = ({"nli": np.array([line["score"] for line in lines])} for lines in (small, full))
    expected = paired(own, others)
    assert found["against"]["score"]["fitness"] == alone["fitness"]
    assert found["against"]["paired"]["difference"]["value"] == pytest.approx(expected.difference.value)
    assert found["against"]["paired"]["mcnemar"]["won"] == expected.mcnemar.won if expected.mcnemar else False
    assert found["against"]["verdict"] in ("better", "worse", "unclear", "equal")
    assert found["chance"] == {"nli": 0.5}
    assert "against" not in alone
    assert main(["evaluate", *task, "--genome", GENOME, "--baseline", "full"]) == 0
    shown = capsys.readouterr().out
    assert f"baseline full: {alone['fitness']:.3f} [" in shown
    assert f"{expected.difference.value:+.3f} [{expected.difference.low:+.3f}" in shown
    assert "chance   guessing scores 0.500 on nli\n" in shown
    result = moe_evo.evaluate(
        "embedded", [{"data": "nli", "num_test": 60}], genome=[[0, 1, 2, 3]] * 4, split="test", baseline="full",
        samples=tmp_path / "other.jsonl",
    )  # fmt: skip
    assert result.against is not None and result.against.paired == expected
    assert len((tmp_path / "other.jsonl").read_text("utf-8").splitlines()) == 60
    assert "<p>verdict: " in result._repr_html_()


@pytest.mark.parametrize("kind", ["file", "link to nothing", "no folder"])
def test_samples_never_replace_a_file_and_are_refused_before_a_model_is_loaded(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "samples.jsonl"
    if kind == "file":
        file.write_text("precious")
    elif kind == "link to nothing":
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file = tmp_path / "none" / "samples.jsonl"
    assert main(["evaluate", "--samples", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("moe-evo: error: --samples: ")
    assert "loading" not in error
    assert not (tmp_path / "elsewhere").exists()
    assert kind != "file" or file.read_text() == "precious"


def test_a_file_that_another_process_makes_meanwhile_is_kept(tmp_path: Path) -> None:
    from moe_evo.files.write import write_new

    file = tmp_path / "one"
    write_new(file, "first")
    with pytest.raises(FileExistsError):
        write_new(file, "second")
    assert file.read_text() == "first"
    assert [one.name for one in tmp_path.iterdir()] == ["one"]
