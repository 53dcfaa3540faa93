"""Tests for every kind of task, and for every metric of generated answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from moe_evo.tasks.answer_metrics import ANSWER_METRICS
from moe_evo.tasks.examples import Example
from moe_evo.tasks.kinds import KINDS
from moe_evo.tasks.task import Scorer, Task
from moe_evo.testing import tiny_tasks as tiny

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe", "cat", "dog"]
PROMPTS = [" ".join(WORDS[n % 5 : n % 5 + 1 + (7 * n) % 8]) + f" {n}" for n in range(11)]
"""Prompts that all differ, in an order in which their lengths go up and down."""

_TOKENIZER = cache(partial(tiny.tiny_tokenizer, bos=True))  # made once
_MODEL, _FULL_MODEL = cache(tiny.tiny_mixtral), cache(tiny.tiny_llama)


class TaskContract:
    """Tests for a kind of task: padding, batching and order do not change scores.

    name: as in `tasks.kind`. rows: about ten rows of its data, all different and of different lengths.
    options: of its `TaskConfig`. The models that score them are tiny and random.

    >>> class TestMyTask(TaskContract):
    ...     name = "perplexity"
    ...     rows = [{"text": prompt + " and more"} for prompt in PROMPTS]
    """

    name = ""
    rows: ClassVar[tiny.Rows] = ()
    options: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture
    def tokenizer(self) -> Any:
        return _TOKENIZER()

    @pytest.fixture
    def model(self) -> Any:
        return _MODEL()

    @pytest.fixture
    def full_model(self) -> Any:
        return _FULL_MODEL()

    @pytest.fixture
    def kind(self) -> str:
        return self.name

    def make(self, folder: Path, kind: str, tokenizer: Any, **options: Any) -> Task:
        options = {"max_new_tokens": 6, **self.options, **options}
        return tiny.make_task(folder / "task", self.rows, tokenizer, kind=kind, **options)

    def test_it_is_found_by_its_name_and_says_what_may_count(self, kind: str) -> None:
        metrics = KINDS.get(kind).metrics
        assert metrics and all(isinstance(unit, str) for unit in metrics.values())

    def test_its_scorer_has_every_member_of_the_protocol(self, kind: str, tmp_path: Path, tokenizer: Any) -> None:
        task = self.make(tmp_path, kind, tokenizer)
        for name, member in inspect.getmembers(Scorer, inspect.isfunction):
            if not name.startswith("_"):
                parameters = inspect.signature(getattr(task.scorer, name)).parameters
                assert inspect.signature(member).parameters.keys() >= parameters.keys()
        assert task.num_examples("search") == len(self.rows) and task.num_examples("test") == 2

    def test_batching_and_padding_do_not_change_scores(
        self, kind: str, tmp_path: Path, tokenizer: Any, model: Any, full_model: Any
    ) -> None:
        found = [
            tiny.run_task(
                self.make(tmp_path, kind, tokenizer, batch_tokens=size), model, tokenizer, reference_model=full_model
            )
            for size in (1, 70, 100_000)  # one row a batch; a few; everything at once
        ]
        for scores in found:
            assert scores.examples.tolist() == list(range(len(self.rows)))
            assert scores.score.dtype == np.float64 and np.isfinite(scores.score).all()
            np.testing.assert_allclose(scores.score, found[0].score, rtol=0, atol=1e-5)
            assert scores.metrics == pytest.approx(found[0].metrics, rel=1e-6, abs=1e-5)

    def test_a_subset_gives_its_examples_the_scores_of_the_whole(
        self, kind: str, tmp_path: Path, tokenizer: Any, model: Any, full_model: Any
    ) -> None:
        task = self.make(tmp_path, kind, tokenizer)
        whole = tiny.run_task(task, model, tokenizer, reference_model=full_model)
        part = tiny.run_task(task, model, tokenizer, reference_model=full_model, indices=[5, 2, 4, 2])
        assert part.examples.tolist() == [2, 4, 5]
        np.testing.assert_allclose(part.score, whole.score[[2, 4, 5]], rtol=0, atol=1e-5)

    def test_prompts_come_once_an_example(self, kind: str, tmp_path: Path, tokenizer: Any) -> None:
        task = self.make(tmp_path, kind, tokenizer)
        examples = np.concatenate([batch.examples for batch in task.prompt_batches("search")])
        assert sorted(examples.tolist()) == list(range(len(self.rows)))

    def test_batches_keep_to_their_limit(self, kind: str, tmp_path: Path, tokenizer: Any) -> None:
        longest = max(batch.input_ids.numel() for batch in self._batches(tmp_path, kind, tokenizer, 1))
        batches = self._batches(tmp_path, kind, tokenizer, max(70, longest))
        assert len(batches) > 1
        assert all(batch.input_ids.numel() <= max(70, longest) for batch in batches)

    def _batches(self, folder: Path, kind: str, tokenizer: Any, batch_tokens: int) -> Sequence[Any]:
        return self.make(folder, kind, tokenizer, batch_tokens=batch_tokens).batches("search")

    def test_examples_are_tokenised_once(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
    ) -> None:
        calls = []
        original = type(tokenizer).__call__

        def counted(tokenizer: Any, *given: Any, **named: Any) -> Any:
            calls.append(1)
            return original(tokenizer, *given, **named)

        monkeypatch.setattr(type(tokenizer), "__call__", counted)
        task = self.make(tmp_path, kind, tokenizer)
        task.batches("search")
        number = len(calls)
        assert number > 0
        task.batches("search")
        task.batches("search", [1, 2])
        assert len(calls) == number


class MetricContract:
    """Tests for a metric, which gives any text a score from 0 (wrong) to 1 (right).

    name: as in `tasks.metric`. cases: the generated text, the right answers, and the expected score.

    >>> class TestMyMetric(MetricContract):
    ...     name = "contains"
    ...     cases = [("it is a cat", ["cat", "dog"], 1.0), ("it is a cow", ["cat", "dog"], 0.0)]
    """

    name = ""
    cases: ClassVar[Sequence[tuple[str, Sequence[str], float]]] = ()

    def test_it_is_found_by_its_name(self) -> None:
        assert callable(ANSWER_METRICS.get(self.name))

    def test_it_scores_what_is_expected(self) -> None:
        assert self.cases
        metric = ANSWER_METRICS[self.name]
        for text, answers, expected in self.cases:
            example = Example("here:1", prompt="?", answers=tuple(answers))
            assert metric(text, example) == pytest.approx(expected), text

    @pytest.mark.parametrize("text", ["", " ", "\n", "0", "a" * 5000, "½ Ünï\u0000code 猫", "yes no yes", "-1,000.5"])
    def test_whatever_a_model_writes_has_a_score_from_0_to_1_and_always_the_same(self, text: str) -> None:
        metric = ANSWER_METRICS[self.name]
        example = Example("here:1", prompt="?", choices=("yes", "no", "1"), answers=("yes", "1"))
        score = metric(text, example)
        assert isinstance(score, float) and 0 <= score <= 1 and metric(text, example) == score
