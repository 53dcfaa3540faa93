"""What every kind of task promises: padding, batching and order change nothing."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import tiny_tasks as tiny

from moe_evo.config.task import TaskConfig
from moe_evo.errors import ModelError
from moe_evo.tasks.data import read_task
from moe_evo.tasks.kinds import KINDS as REGISTERED
from moe_evo.tasks.registry import build_task
from moe_evo.tasks.task import Scorer, Task

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe", "cat", "dog"]
PROMPTS = [" ".join(WORDS[n % 5 : n % 5 + 1 + (7 * n) % 8]) + f" {n}" for n in range(11)]  # lengths up and down

ROWS = {
    "choice": [{"prompt": p, "choices": [" yes", " no no", " dog"], "label": n % 3} for n, p in enumerate(PROMPTS)],
    "generation": [{"prompt": p, "answers": ["cat", "dog"]} for p in PROMPTS],
    "perplexity": [{"text": p} for p in PROMPTS],
    "distillation": [{"prompt": p} for p in PROMPTS],
}
KINDS = sorted(REGISTERED)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer(bos=True)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_mixtral()


@pytest.fixture(scope="module")
def full_model():
    return tiny.tiny_llama()


def make(tmp_path, kind, tokenizer, **options) -> Task:
    return tiny.make_task(tmp_path / kind, ROWS[kind], tokenizer, kind=kind, max_new_tokens=6, **options)


def test_every_kind_is_in_this_suite():
    assert set(ROWS) == set(REGISTERED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scorer_has_every_member_of_the_protocol(kind, tmp_path, tokenizer):
    task = make(tmp_path, kind, tokenizer)
    for name, member in inspect.getmembers(Scorer, inspect.isfunction):
        if not name.startswith("_"):
            parameters = inspect.signature(getattr(task.scorer, name)).parameters
            assert inspect.signature(member).parameters.keys() >= parameters.keys()
    assert (task.name, task.num_examples("search"), task.num_examples("test")) == (kind, len(PROMPTS), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_batching_and_padding_do_not_change_scores(kind, tmp_path, tokenizer, model, full_model):
    found = [
        tiny.run_task(make(tmp_path, kind, tokenizer, batch_tokens=size), model, tokenizer, reference_model=full_model)
        for size in (1, 70, 100_000)  # one row a batch; a few; everything at once
    ]
    for scores in found:
        assert scores.examples.tolist() == list(range(len(PROMPTS)))
        assert scores.score.dtype == np.float64
        np.testing.assert_allclose(scores.score, found[0].score, rtol=0, atol=1e-5)
        assert scores.metrics == pytest.approx(found[0].metrics, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_gives_its_examples_the_scores_of_the_whole(kind, tmp_path, tokenizer, model, full_model):
    task = make(tmp_path, kind, tokenizer)
    whole = tiny.run_task(task, model, tokenizer, reference_model=full_model)
    part = tiny.run_task(task, model, tokenizer, reference_model=full_model, indices=[9, 2, 5, 2])
    assert part.examples.tolist() == [2, 5, 9]
    np.testing.assert_allclose(part.score, whole.score[[2, 5, 9]], rtol=0, atol=1e-5)


def test_prompts_to_generate_from_are_padded_on_the_left(tmp_path, tokenizer):
    for batch in make(tmp_path, "generation", tokenizer, batch_tokens=100_000).batches("search"):
        assert batch.attention_mask[:, -1].all()
        assert (batch.attention_mask.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_come_once_an_example(kind, tmp_path, tokenizer):
    task = make(tmp_path, kind, tokenizer)
    examples = np.concatenate([batch.examples for batch in task.prompt_batches("search")])
    assert sorted(examples.tolist()) == list(range(len(PROMPTS)))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_keep_to_their_limit(kind, tmp_path, tokenizer):
    batches = make(tmp_path, kind, tokenizer, batch_tokens=70).batches("search")
    assert len(batches) > 1
    assert all(batch.input_ids.numel() <= 70 for batch in batches)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_tokenised_once(kind, tmp_path, monkeypatch, tokenizer):
    calls = []
    original = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, *given, **named: calls.append(1) or original(self, *given, **named)
    )
    task = make(tmp_path, kind, tokenizer)
    task.batches("search")
    number = len(calls)
    assert number > 0
    task.batches("search")
    task.batches("search", [1, 2])
    assert len(calls) == number


def test_a_model_without_tokenizer_is_refused(tmp_path):
    config = TaskConfig(data=tiny.write_splits(tmp_path / "t", ROWS["choice"]))
    with pytest.raises(ModelError, match="without a tokenizer"):
        build_task(read_task(config), None, 64)
