"""Greedy generation, compared with the right answers.

Metrics: exact_match, contains and f1; first_option where the examples have choices; number_match
where every example has a number among its answers. There is no log-likelihood to break ties with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from moe_evo.config import TaskConfig
from moe_evo.tasks.answers import ANSWER_METRICS
from moe_evo.tasks.base import Batch, ForwardBatch, GenerateBatch, TaskScores, mean_of
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.examples import Example, numbers_in
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import BatchLimits, Row, TokenisedSplits, forward_batches, generate_batches


class GenerationTask:
    """A `Task` whose partial results are the new tokens themselves (B, at most max_new_tokens)."""

    needs_reference = False

    def __init__(self, config: TaskConfig, data: TaskData, tokenizer: Any, limits: BatchLimits) -> None:
        self.name = data.name
        self.metric = data.metric
        self._config = config
        self._data = data
        self._limits = limits
        self._format = PromptFormat(config, data, tokenizer)
        self._rows = TokenisedSplits(data.splits, self._make_rows)
        examples = [example for part in data.splits.values() for example in part]
        meaningless = set()
        if not all(example.choices for example in examples):
            meaningless.add("first_option")
        if not all(any(map(numbers_in, example.answers)) for example in examples):
            meaningless.add("number_match")
        self.metrics = tuple(name for name in ANSWER_METRICS if name not in meaningless)

    def num_examples(self, split: str) -> int:
        return len(self._data.splits[split])

    def batches(self, split: str, indices: Sequence[int] | None = None) -> Sequence[GenerateBatch]:
        rows = self._rows.select(split, indices)
        return generate_batches(rows, self._limits, self._config.max_new_tokens, self._config.stop)

    def prompt_batches(self, split: str) -> Sequence[ForwardBatch]:
        return forward_batches(self._rows.select(split, None), self._limits)

    def reference(self, batch: ForwardBatch, logits: Tensor) -> Tensor:
        raise AssertionError("generated answers are scored without a reference")

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None = None) -> Tensor:
        return output

    def combine(self, split: str, batches: Sequence[Batch], partials: Sequence[Tensor]) -> TaskScores:
        numbers = np.concatenate([batch.examples for batch in batches])
        texts = [text for partial in partials for text in self.texts(partial)]
        order = np.argsort(numbers)
        examples = numbers[order]
        pairs = [(texts[index], self._data.splits[split][numbers[index]]) for index in order]
        by_metric = {
            name: np.array([ANSWER_METRICS[name](text, example) for text, example in pairs]) for name in self.metrics
        }
        metrics = {name: mean_of(values) for name, values in by_metric.items()}
        return TaskScores(examples, by_metric[self.metric], None, metrics)

    def texts(self, output: Tensor) -> list[str]:
        """The answers in new tokens (B, length), each ended before the stop text."""
        texts = self._format.decode(output)
        return [text.split(self._config.stop)[0] for text in texts] if self._config.stop else texts

    def _make_rows(self, number: int, example: Example) -> list[Row]:
        tokens = self._format.prompt_tokens(example, room=self._config.max_new_tokens)
        return [Row(number, tokens, len(tokens) - 1)]
