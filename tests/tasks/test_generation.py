"""Batched generation against one example at a time."""

from __future__ import annotations

import pytest
import tiny_tasks as tiny
import torch

from moe_evo.evaluation.engine.generate import generate_greedily

PROMPTS = ["one two three", "yes", "the capital of france is paris and of japan", "good bad", "a cat and"]


def plain_greedy(model, tokenizer, prompt, number):
    """The text by one full forward pass a token."""
    tokens = tokenizer(prompt)["input_ids"]
    length = len(tokens)
    for _ in range(number):
        tokens = [*tokens, int(tiny.alone(model, tokens)[-1].argmax())]
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[length:], skip_special_tokens=True)


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_mixtral])
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_generated_texts_equal_those_of_each_prompt_alone(tmp_path, build, batch_tokens):
    model, tokenizer = build(), tiny.tiny_tokenizer(bos=True)
    expected = [plain_greedy(model, tokenizer, prompt, 8).split("\n")[0] for prompt in PROMPTS]
    rows = [
        {"prompt": p, "answers": [text if text.strip() else "?"]} for p, text in zip(PROMPTS, expected, strict=True)
    ]
    task = tiny.make_task(tmp_path / "t", rows, tokenizer, batch_tokens=batch_tokens, max_new_tokens=8)
    got = {}
    for batch in task.batches("search"):
        for number, text in zip(
            batch.examples, task.scorer.texts(generate_greedily(model, tokenizer, batch).new), strict=True
        ):
            got[int(number)] = text
    assert [got[number] for number in range(len(PROMPTS))] == expected
    scores = tiny.run_task(task, model, tokenizer)
    assert scores.score.tolist() == [float(bool(text.strip())) for text in expected]
    assert scores.log_likelihood is None


def test_generation_ends_at_the_stop_text(tmp_path):
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer()
    free = plain_greedy(model, tokenizer, "yes", 8)
    stop = free[3:5]
    rows = [{"prompt": "yes", "answers": ["x"]}, {"prompt": "yes no", "answers": ["x"]}]
    task = tiny.make_task(tmp_path / "t", rows, tokenizer, batch_tokens=1, max_new_tokens=8, stop=stop)
    batch = task.batches("search")[0]
    new, is_finite, active, num_new = generate_greedily(model, tokenizer, batch)
    assert is_finite.all()
    assert task.scorer.texts(new) == [free.split(stop)[0]]
    assert new.shape[1] < 8 and num_new.tolist() == [new.shape[1]] and active is None


def test_metrics_that_the_examples_cannot_have_are_left_out(tmp_path):
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer()
    plain = [{"prompt": p, "answers": "cat"} for p in PROMPTS]
    rich = [{"prompt": p, "answers": ["7"], "choices": ["7", "8"]} for p in PROMPTS]
    found = [
        set(
            tiny.run_task(
                tiny.make_task(tmp_path / str(n), rows, tokenizer, max_new_tokens=2), model, tokenizer
            ).metrics
        )
        for n, rows in enumerate([plain, rich])
    ]
    always = {"exact_match", "contains", "f1"}
    assert found == [always, always | {"first_option", "number_match"}]


def test_choices_with_a_label_can_be_generated(tmp_path):
    rows = [{"prompt": p, "choices": ["yes", "no"], "label": 1} for p in PROMPTS]
    tokenizer = tiny.tiny_tokenizer()
    options = {"kind": "generation", "metric": "first_option", "max_new_tokens": 2, "batch_tokens": 4096}
    task = tiny.make_task(tmp_path / "t", rows, tokenizer, **options)
    texts = ["no", "yes", "x", "no yes", "NO."]
    (batch,) = task.batches("search")
    order = [texts[number] for number in batch.examples]
    output = tokenizer(order, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    assert task.combine("search", [(batch.examples, output)]).score.tolist() == [1, 0, 0, 1, 1]


def test_logits_that_are_not_finite_stop_generation(tmp_path):
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    task = tiny.make_task(tmp_path / "t", [{"prompt": p, "answers": "x"} for p in PROMPTS], tokenizer)
    generated = generate_greedily(model, tokenizer, task.batches("search")[0])
    assert not generated.is_finite.any()
    assert generated.new.shape[1] == 1
