"""The likelihood of a generation task's answer against one sequence at a time, and beside generation."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tasks as tiny

from moe_evo.tasks.base import ForwardBatch, GenerateBatch

ROWS = [
    {"prompt": "one two three", "answers": ["four five", "six"]},
    {"prompt": "the capital of france is ", "answers": "paris"},
    {"prompt": "question: what is the sum of 12 and 30? answer:", "answers": [" 42"]},
    {"prompt": "yes", "answers": ["no and maybe and a cat"]},
    {"prompt": "good", "choices": ["bad", "good"], "label": 0},
]
OPTIONS = {"kind": "generation", "max_new_tokens": 3}


def brute_force(model, tokenizer, before="") -> list[float]:
    """Mean log-likelihood per token of the first answer, at least a space after the prompt."""
    found = []
    for row, whole in zip(
        ROWS, ["one two three four five", "the capital of france is paris", *[None] * 3], strict=True
    ):
        answers = row.get("answers") or row["choices"][0]
        answer = answers if isinstance(answers, str) else answers[0]
        text = whole or f"{row['prompt']} {answer.strip()}"
        context = tokenizer(before + row["prompt"].rstrip())["input_ids"]
        tokens = tokenizer(before + text)["input_ids"]
        assert tokens[: len(context)] == context
        rest = tokens[len(context) :]
        found.append(tiny.answer_log_likelihood(model, context, rest) / len(rest))
    return found


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_mixtral])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_it_equals_the_mean_over_the_answers_tokens_of_one_sequence_at_a_time(tmp_path, build, bos, batch_tokens):
    model, tokenizer = build(), tiny.tiny_tokenizer(bos=bos)
    task = tiny.make_task(
        tmp_path / "t", ROWS, tokenizer, batch_tokens=batch_tokens, metric="log_likelihood", **OPTIONS
    )
    assert all(isinstance(batch, ForwardBatch) for batch in task.batches("search"))
    got = tiny.run_task(task, model, tokenizer)
    np.testing.assert_allclose(got.score, brute_force(model, tokenizer), rtol=0, atol=1e-5)
    assert got.metrics == {"log_likelihood": pytest.approx(got.score.mean())}


def test_prefix_and_few_shot_examples_stand_before_the_prompt_as_for_generation(tmp_path):
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer(bos=True)
    few_shot = tiny.write_rows(tmp_path / "shots.jsonl", [{"prompt": "no is", "answers": "yes"}])
    options = {**OPTIONS, "prefix": "be wise.\n", "few_shot": few_shot, "metric": "log_likelihood"}
    task = tiny.make_task(tmp_path / "t", ROWS, tokenizer, **options)
    expected = brute_force(model, tokenizer, "be wise.\nno is yes\n\n")
    np.testing.assert_allclose(tiny.run_task(task, model, tokenizer).score, expected, rtol=0, atol=1e-5)


def test_a_search_reads_answers_while_what_is_reported_is_generated(tmp_path):
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer(bos=True)
    plain = tiny.make_task(tmp_path / "t", ROWS, tokenizer, **OPTIONS)
    task = tiny.make_task(tmp_path / "t", ROWS, tokenizer, search_metric="log_likelihood", **OPTIONS)
    assert all(isinstance(batch, ForwardBatch) for batch in task.batches("search"))
    assert all(
        isinstance(batch, GenerateBatch) for split in ("search_reported", "test") for batch in task.batches(split)
    )
    searched = tiny.run_task(task, model, tokenizer)
    np.testing.assert_allclose(searched.score, brute_force(model, tokenizer), rtol=0, atol=1e-5)
    for split, same in (("search_reported", "search"), ("validation", "validation"), ("test", "test")):
        found, expected = (
            tiny.run_task(task, model, tokenizer, split=split),
            tiny.run_task(plain, model, tokenizer, split=same),
        )
        assert found.score.tolist() == expected.score.tolist() and found.metrics == expected.metrics
    prompts = [batch.input_ids.tolist() for batch in task.prompt_batches("search")]
    assert prompts == [batch.input_ids.tolist() for batch in plain.prompt_batches("search")]
