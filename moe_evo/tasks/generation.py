"""Greedy generation, compared with the right answers.

Metrics: exact_match, contains and f1; first_option where the examples have choices; number_match
where every example has a number among its answers; others where they are asked for. There is no log-likelihood to break
ties with: that of the right answer needs no generation, see `answer_likelihood`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from moe_evo.tasks.answer_metrics import ANSWER_METRICS, BESIDE
from moe_evo.tasks.answered import Given
from moe_evo.tasks.base import Batch, GenerateBatch, Scores
from moe_evo.tasks.batches import generate_batches
from moe_evo.tasks.examples import Example, numbers_in
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import BatchLimits, Row
from moe_evo.tasks.weighted_metric import parts_of


class GenerationScorer:
    """A `Scorer` whose partial results are the new tokens themselves (B, at most max_new_tokens)."""

    needs_reference = False

    def __init__(self, format: PromptFormat) -> None:
        self._format = format
        self._max_new_tokens, self._stop = format.config.max_new_tokens, format.config.stop
        examples = [example for part in format.data.splits.values() for example in part]
        meaningless = set()
        if not all(example.choices for example in examples):
            meaningless.add("first_option")
        if not all(any(map(numbers_in, example.answers)) for example in examples):
            meaningless.add("number_match")
        counted = [name for one in (format.data.metric, format.data.search_metric) for _, name in parts_of(one)]
        names = dict.fromkeys([*(one for one in BESIDE if one not in meaningless), *counted])
        self._metrics = {name: ANSWER_METRICS[name] for name in names if name in ANSWER_METRICS}
        self._extract = re.compile(format.config.extract) if format.config.extract else None

    def rows(self, number: int, example: Example) -> list[Row]:
        tokens = self._format.prompt_tokens(example, reserved_tokens=self._max_new_tokens)
        return [Row(number, tokens, len(tokens) - 1)]

    def batches(self, rows: Sequence[Row], limits: BatchLimits) -> Sequence[GenerateBatch]:
        return generate_batches(rows, limits, self._max_new_tokens, self._stop)

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None) -> Tensor:
        return output

    def combine(self, examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> dict[str, Scores]:
        texts = map(self.extracted, self.texts([row for (row,) in partials]))
        pairs = list(zip(texts, examples, strict=True))
        return {name: np.array([metric(*pair) for pair in pairs]) for name, metric in self._metrics.items()}

    def answers(self, examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> list[Given]:
        """What was generated for each example."""
        return [Given(text) for text in self.texts([row for (row,) in partials])]

    def texts(self, rows: Any) -> list[str]:
        """The answers in rows of new tokens, each ended before the stop text."""
        texts = self._format.decode(rows)
        return [text.split(self._stop)[0] for text in texts] if self._stop else texts

    def extracted(self, text: str) -> str:
        """What is compared of a text: the last match of `TaskConfig.extract`, or its first group; '' without one."""
        if self._extract is None:
            return text
        matches = list(self._extract.finditer(text))
        return (matches[-1][min(self._extract.groups, 1)] or "") if matches else ""
