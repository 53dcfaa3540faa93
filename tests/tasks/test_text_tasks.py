"""Perplexity against the model's stock loss; distillation against the definition of KL."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tasks as tiny
import torch

from moe_evo.errors import ConfigError, TaskError

TEXTS = ["one two three four", "the capital of france is paris, yes.", "a", "good bad maybe no " * 3]
ROWS = [{"text": text} for text in TEXTS]


@torch.inference_mode()
def stock_loss(model, tokens):
    ids = torch.tensor([tokens])
    return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_mixtral])
def test_the_score_is_minus_the_stock_loss(tmp_path, build):
    model, tokenizer = build(), tiny.tiny_tokenizer(bos=True)
    got = tiny.run_task(tiny.make_task(tmp_path / "t", ROWS, tokenizer), model, tokenizer)
    tokens = [tokenizer(text)["input_ids"] for text in TEXTS]
    losses = np.array([stock_loss(model, one) for one in tokens])
    np.testing.assert_allclose(got.score, -losses, rtol=0, atol=1e-5)
    weights = np.array([len(one) - 1 for one in tokens])
    assert got.metrics["log_likelihood"] == pytest.approx(-losses.mean(), abs=1e-5)
    assert got.metrics["perplexity"] == pytest.approx(np.exp((losses * weights).sum() / weights.sum()), rel=1e-5)


def test_long_texts_are_cut_at_max_length(tmp_path):
    model, tokenizer = tiny.tiny_llama(), tiny.tiny_tokenizer()
    got = tiny.run_task(tiny.make_task(tmp_path / "t", ROWS[:2], tokenizer, max_length=4), model, tokenizer)
    losses = [stock_loss(model, tokenizer(text)["input_ids"][:4]) for text in TEXTS[:2]]
    np.testing.assert_allclose(got.score, -np.array(losses), rtol=0, atol=1e-5)


def test_a_text_of_one_token_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"search\.jsonl:3: text: got 1 tokens, expected at least 2"):
        tiny.make_task(tmp_path / "t", ROWS, tiny.tiny_tokenizer())


@pytest.mark.parametrize("option", [{"prefix": "x"}, {"chat_template": True}])
def test_options_of_the_prompt_are_refused_for_texts(tmp_path, option):
    with pytest.raises(ConfigError, match="texts without prompts"):
        tiny.make_task(tmp_path / "t", ROWS, tiny.tiny_tokenizer(), **option)


@pytest.mark.parametrize("rows", [ROWS, [{"prompt": text} for text in TEXTS]])
def test_distilling_a_model_into_itself_scores_zero(tmp_path, rows):
    model, tokenizer = tiny.tiny_mixtral(), tiny.tiny_tokenizer()
    task = tiny.make_task(tmp_path / "t", rows, tokenizer, kind="distillation")
    got = tiny.run_task(task, model, tokenizer, reference_model=model)
    assert np.abs(got.score).max() == 0
    assert got.log_likelihood is None


def test_the_score_of_distillation_is_minus_the_mean_kl_over_all_positions(tmp_path):
    full, candidate, tokenizer = tiny.tiny_llama(), tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True)
    task = tiny.make_task(tmp_path / "t", ROWS, tokenizer, kind="distillation")
    got = tiny.run_task(task, candidate, tokenizer, reference_model=full)
    for text, score in zip(TEXTS, got.score, strict=True):
        tokens = tokenizer(text)["input_ids"]
        p, q = tiny.alone(full, tokens), tiny.alone(candidate, tokens)
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert expected > 0
        assert score == pytest.approx(-expected, abs=1e-5)
    assert got.metrics == {"negative_kl": pytest.approx(got.score.mean())}


def test_distillation_takes_prompts_as_the_task_would_show_them(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    shots = tiny.write_rows(tmp_path / "s.jsonl", [{"prompt": "is it?", "answers": "yes"}])
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    task = tiny.make_task(tmp_path / "t", rows, tokenizer, kind="distillation", few_shot=shots, prefix="P: ")
    (batch,) = task.batches("search")
    tokens = batch.input_ids[batch.kept]
    rows = [tokens[places[scored]] for places, scored in zip(batch.positions, batch.scored, strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert sorted(texts) == ["P: is it? yes\n\none", "P: is it? yes\n\ntwo"]
