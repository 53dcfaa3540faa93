"""ROUGE-L against brute force and Google's library, sentence scores against sacrebleu's; what is compared of a text."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tasks as tiny

from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError
from moe_evo.tasks.chance import chance_level
from moe_evo.tasks.data import read_task
from moe_evo.tasks.examples import Example
from moe_evo.tasks.generation import GenerationScorer
from moe_evo.tasks.overlap_metrics import SentenceScore, rouge_l
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.registry import build_task

WORDS = ("the", "cat", "sat", "on", "a", "mat,", "Dog")


def sentences(number: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    return [
        tuple(" ".join(rng.choice(WORDS, size=rng.integers(1, 8))) for _ in range(2))  # type: ignore[misc]
        for _ in range(number)
    ]


def example(*answers: str) -> Example:
    return Example("here:1", prompt="?", answers=answers)


@cache
def longest(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """By its definition."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + longest(one[1:], other[1:])
    return max(longest(one[1:], other), longest(one, other[1:]))


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    for text, answer in sentences(100):
        one, other = (tuple(part.lower().replace(",", "").split()) for part in (text, answer))
        common = longest(one, other)
        expected = 0.0 if not common else 2 / (len(one) / common + len(other) / common)
        assert rouge_l(text, example(answer)) == pytest.approx(expected)
        assert rouge_l(text, example("zebra", answer)) == pytest.approx(expected)


@pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="rouge_score is not installed")
def test_rouge_l_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    for text, answer in [*sentences(50), ("It's 3.5 – naïve", "its 3,5 naive"), ("", "a")]:
        assert rouge_l(text, example(answer)) == pytest.approx(scorer.score(answer, text)["rougeL"].fmeasure)


@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="the extra `sacrebleu` is not installed")
@pytest.mark.parametrize("name", ["sentence_bleu", "sentence_chrf"])
def test_sentence_scores_are_those_of_sacrebleu(name: str) -> None:
    import sacrebleu

    for text, answer in sentences(30):
        expected = getattr(sacrebleu, name)(text, [answer, "a cat"]).score / 100
        assert SentenceScore(name)(text, example(answer, "a cat")) == pytest.approx(expected, abs=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is not None, reason="the extra `sacrebleu` is installed")
def test_a_metric_whose_library_is_missing_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    for metric in ("sentence_chrf", "0.5 f1 + 0.5 sentence_chrf"):
        with pytest.raises(
            ConfigError, match=r"\(t\)\.metric: sentence_chrf needs the library sacrebleu, .*moe_evo\[sacre"
        ):
            read_task(generation(tmp_path, metric=metric))


ROWS = [{"prompt": f"p{n}", "answers": [f"{n} cats"]} for n in range(4)]


def generation(folder: Path, **options: Any) -> TaskConfig:
    return TaskConfig(data=tiny.write_splits(folder / "t", ROWS), **options)


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("", "so: 3", "so: 3"),
        (r"\d+", "3 or 4?", "4"),
        (r"answer is (\w+)", "The answer is no. The answer is yes", "yes"),
        (r"(\d+)|(none)", "none", ""),
        (r"answer is (\w+)", "I do not know", ""),
        (r"(?is)therefore(.*)", "Therefore\n1\n", "\n1\n"),
    ],
)
def test_the_last_match_or_its_group_is_compared(tmp_path: Path, pattern: str, text: str, found: str) -> None:
    data = read_task(generation(tmp_path, extract=pattern))
    assert GenerationScorer(PromptFormat(data.config, data, tiny.tiny_tokenizer())).extracted(text) == found


def test_what_is_extracted_is_scored_and_what_was_written_is_shown(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    task = build_task(read_task(generation(tmp_path, extract=r"\d+ cats")), tokenizer, 64)
    text = "I see 2 dogs, 3 cats"
    part = (np.array([3]), tiny.torch.tensor([tokenizer(text)["input_ids"]]))
    assert task.combine("search", [part]).score.tolist() == [1.0]
    (told,) = task.answered("search", [part])
    assert told.given is not None and told.given.text == text and told.score == 1.0
    with pytest.raises(ConfigError, match=r"extract: got '\(', expected a regular expression"):
        generation(tmp_path, extract="(")
    with pytest.raises(ConfigError, match=r"extract: got 'x', expected none for a task of kind choice"):
        read_task(TaskConfig(data="nli", extract="x"))


def test_several_metrics_count_with_their_weights(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    data = read_task(generation(tmp_path, metric="0.75 f1  +  0.25 rouge_l", search_metric="log_likelihood"))
    assert data.metric == "0.75 f1 + 0.25 rouge_l"
    task = build_task(data, tokenizer, 64)
    tokens = [tokenizer(text)["input_ids"] for text in ("cats 0", "a yes 1 cats")]
    width = max(map(len, tokens))
    padded = tiny.torch.tensor([one + [tokenizer.pad_token_id] * (width - len(one)) for one in tokens])
    found = task.combine("validation", [(np.array([0, 1]), padded)])
    # the answers are "0 cats" and "1 cats"; F1 is blind to order and articles, the subsequence is not
    assert found.score.tolist() == pytest.approx([0.75 * 1.0 + 0.25 * 0.5, 0.75 * 0.8 + 0.25 * 2 / 3])
    assert found.metrics[data.metric] == pytest.approx(found.score.mean())


def test_weighted_metrics_of_choices_are_searched_and_reported() -> None:
    data = read_task(TaskConfig(data="nli", search_metric="0.5 accuracy + 0.5 probability"))
    level = chance_level(data.search_metric, data.splits["search"])
    assert level == chance_level("accuracy", data.splits["search"])
    assert chance_level("0.5 f1 + 0.5 rouge_l", data.splits["search"]) is None


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("0.5 f1 + 0.6 rouge_l", "expected one metric, or different ones with weights that add up to 1"),
        ("0.5 f1 + 0.5 f1", "different ones with weights"),
        ("0.5 f1 + rouge_l", "different ones with weights"),
        ("1 f1 + 0 rouge_l", "different ones with weights"),
        ("f1 rouge_l", "different ones with weights"),
        ("0.5 f1 + 0.5 rouge", "got 'rouge', did you mean 'rouge_l'"),
        ("0.5 f1 + 0.5 log_likelihood", "expected metrics of one unit, which are computed together"),
    ],
)
def test_what_is_no_weighted_metric_is_refused(tmp_path: Path, metric: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_task(generation(tmp_path, metric=metric))


def test_a_run_reports_weighted_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_evo.cli.main import main

    metric = "0.75 accuracy + 0.25 probability"
    words = ["evaluate", "--tasks", f"[{{data: nli, num_validation: 20, metric: {metric}}}]", "--json"]
    assert main(words) == 0
    score = json.loads(capsys.readouterr().out)
    metrics = {name.removeprefix("nli/"): value for name, value in score["metrics"].items()}
    assert score["fitness"] == pytest.approx(0.75 * metrics["accuracy"] + 0.25 * metrics["probability"])
    assert metrics[metric] == score["fitness"]
