"""Multiple choice against brute force: one sequence at a time, no padding."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from scipy.special import softmax

from moe_evo.tasks.base import ForwardBatch
from moe_evo.tasks.choice import choice_rows

ROWS = [
    {"prompt": "the capital of france is", "choices": [" paris", " tokyo", " a dog and a cat"], "label": 0},
    {"prompt": "yes", "choices": [" good", " goods", " maybe not", " no"], "label": 3},
    {"prompt": "question: what is the sum of 12 and 30? answer:", "choices": [" 42", " 41"], "label": 0},
    {"prompt": "one two three ", "choices": ["four", "five", "six"], "label": 1},
    {"prompt": "a", "choices": [" x", " y"], "label": 1},
    {"prompt": "a cat", "choices": [" and a dog", " and a dogs", " and a cat"], "label": 2},
]
SINGLE = [
    {"prompt": text, "choices": ["a", "b", "c"], "label": place % 3}
    for place, text in enumerate(["one two:", "x:", "the capital of japan is:", "yes no yes no yes:", "y:"])
]


def brute_force(model, tokenizer, rows, before="") -> list[list[float]]:
    """log-likelihoods by the convention of lm-evaluation-harness."""
    found = []
    for row in rows:
        prompt = before + row["prompt"]
        spaces = prompt[len(prompt.rstrip()) :]
        context = tokenizer(prompt.rstrip())["input_ids"]
        answers = [tokenizer(prompt.rstrip() + spaces + choice)["input_ids"] for choice in row["choices"]]
        assert all(answer[: len(context)] == context for answer in answers)
        found.append([tiny.answer_log_likelihood(model, context, answer[len(context) :]) for answer in answers])
    return found


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_mixtral])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("rows", [ROWS, SINGLE, ROWS + SINGLE])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_batched_log_likelihoods_equal_one_sequence_at_a_time(tmp_path, build, bos, rows, batch_tokens):
    model, tokenizer = build(), tiny.tiny_tokenizer(bos=bos)
    task = tiny.make_task(tmp_path / "t", rows, tokenizer, batch_tokens=batch_tokens, metric="log_likelihood")
    expected = brute_force(model, tokenizer, rows)
    right = [scores[row["label"]] for scores, row in zip(expected, rows, strict=True)]
    got = tiny.run_task(task, model, tokenizer)
    np.testing.assert_allclose(got.score, right, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.log_likelihood, right, rtol=0, atol=1e-5)
    accuracy = [np.argmax(scores) == row["label"] for scores, row in zip(expected, rows, strict=True)]
    by_length = [
        np.argmax([score / len(choice.strip()) for score, choice in zip(scores, row["choices"], strict=True)])
        == row["label"]
        for scores, row in zip(expected, rows, strict=True)
    ]
    probability = [softmax(scores)[row["label"]] for scores, row in zip(expected, rows, strict=True)]
    likely_by_length = [
        softmax([score / len(choice.strip()) for score, choice in zip(scores, row["choices"], strict=True)])[
            row["label"]
        ]
        for scores, row in zip(expected, rows, strict=True)
    ]
    assert got.metrics == pytest.approx(
        {
            "accuracy": np.mean(accuracy),
            "accuracy_norm": np.mean(by_length),
            "log_likelihood": np.mean(right),
            "probability": np.mean(probability),
            "probability_norm": np.mean(likely_by_length),
        },
        abs=1e-5,
    )


@pytest.mark.parametrize("metric", ["probability", "probability_norm"])
def test_probability_of_each_example_is_the_softmax_over_its_own_choices(tmp_path, metric):
    model, tokenizer = tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True)
    expected = []
    for row, scores in zip(ROWS, brute_force(model, tokenizer, ROWS), strict=True):
        lengths = [len(choice.strip()) if metric == "probability_norm" else 1 for choice in row["choices"]]
        expected.append(softmax(np.divide(scores, lengths))[row["label"]])
    got = tiny.run_task(tiny.make_task(tmp_path / "t", ROWS, tokenizer, metric=metric), model, tokenizer)
    assert len({len(row["choices"]) for row in ROWS}) == 3, "some examples have fewer choices than others"
    np.testing.assert_allclose(got.score, expected, rtol=0, atol=1e-5)
    assert ((got.score > 0) & (got.score < 1)).all()


def test_probability_is_a_number_where_likelihoods_are_too_small_for_exp(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    rows = [{"prompt": f"a{n}", "choices": ["b", "c", "d"][: 2 + n % 2], "label": n % 2} for n in range(3)]
    task = tiny.make_task(tmp_path / "t", rows, tokenizer, metric="probability")
    parts = [[-5000.0, -5000.0], [-9000.0, -20.0, -9000.0], [-3.0, -2000.0]]
    scores = task.combine("search", [(np.array([n]), torch.tensor([part])) for n, part in enumerate(parts)])
    assert scores.score.tolist() == [0.5, 1.0, 1.0]


def test_prefix_and_few_shot_examples_stand_before_every_prompt(tmp_path):
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer(bos=True)
    shots = [
        {"prompt": "good is", "choices": [" bad", " good"], "label": 1},
        {"prompt": "no is", "choices": [" no", " yes"], "label": 0},
    ]
    few_shot = tiny.write_rows(tmp_path / "shots.jsonl", shots)
    task = tiny.make_task(
        tmp_path / "t", ROWS, tokenizer, prefix="be wise.\n", few_shot=few_shot, metric="log_likelihood"
    )
    before = "be wise.\ngood is good\n\nno is no\n\n"
    expected = [
        scores[row["label"]] for scores, row in zip(brute_force(model, tokenizer, ROWS, before), ROWS, strict=True)
    ]
    np.testing.assert_allclose(tiny.run_task(task, model, tokenizer).score, expected, rtol=0, atol=1e-5)


def test_choices_of_one_token_share_the_bare_prompt():
    assert [row.tokens for row in choice_rows(0, (1, 2), [(5,), (6,), (7,)])] == [(1, 2)]


def test_a_choice_rides_on_the_row_of_a_longer_one():
    rows = choice_rows(0, (1, 2), [(5,), (6, 7, 8), (6, 7, 9), (6, 4), (3, 4)])
    assert [(row.tokens, row.start) for row in rows] == [((1, 2, 6, 7), 1), ((1, 2, 3), 1)]
    assert [[which for which, _ in row.answers] for row in rows] == [[0, 1, 2, 3], [4]]


def test_equal_choices_tie_and_the_first_wins(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    rows = [{"prompt": f"a{n}", "choices": [" x", " y"], "label": n % 2} for n in range(4)]
    task = tiny.make_task(tmp_path / "t", rows, tokenizer)
    (batch,) = task.batches("search")
    flat = torch.zeros(int(batch.kept.sum()), 350)
    scores = task.combine("search", [(batch.examples, task.score("search", batch, flat))])
    assert scores.score.tolist() == [1, 0, 1, 0]


def test_a_prompt_too_long_loses_its_beginning_but_keeps_bos(tmp_path):
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer(bos=True)
    row = {"prompt": "one two three four five six question", "choices": [" cat dog", " x"], "label": 0}
    task = tiny.make_task(
        tmp_path / "t", [row, {**row, "prompt": "b"}], tokenizer, max_length=9, metric="log_likelihood"
    )
    context = tokenizer(row["prompt"])["input_ids"]
    answers = [tokenizer(row["prompt"] + choice)["input_ids"][len(context) :] for choice in row["choices"]]
    kept = [1, *context[-(9 - max(map(len, answers)) - 1) :]]
    assert len(kept) < len(context)
    expected = tiny.answer_log_likelihood(model, kept, answers[0])
    assert tiny.run_task(task, model, tokenizer).score[0] == pytest.approx(expected, abs=1e-5)


def test_chat_template_wraps_prompt_and_shots_and_drops_the_choice_space(tmp_path):
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer(bos=True, chat=True)
    few_shot = tiny.write_rows(tmp_path / "s.jsonl", [{"prompt": "good", "choices": [" bad", " yes"], "label": 1}])
    rows = [{"prompt": f"a{n}", "choices": [" no", " maybe"], "label": 0} for n in range(2)]
    task = tiny.make_task(
        tmp_path / "t", rows, tokenizer, prefix="P ", few_shot=few_shot, chat_template=True, metric="log_likelihood"
    )
    text = "<user>P good<end><assistant>yes<end><user>a0<end><assistant>"
    context = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(text + "no", add_special_tokens=False)["input_ids"][len(context) :]
    expected = tiny.answer_log_likelihood(model, context, answer)
    assert tiny.run_task(task, model, tokenizer).score[0] == pytest.approx(expected, abs=1e-5)


def test_logits_are_asked_for_only_where_an_answer_is_predicted(tmp_path):
    task = tiny.make_task(tmp_path / "t", SINGLE, tiny.tiny_tokenizer(), batch_tokens=4096)
    for batch in task.batches("search"):
        assert isinstance(batch, ForwardBatch)
        assert batch.kept.sum() == len(batch.examples)
    prompts = sum(len(batch.examples) for batch in task.prompt_batches("search"))
    assert prompts == len(SINGLE)
