"""A task: data, tokenised rows and limits, which are alike in all kinds, and a scorer for what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from moe_evo.tasks.base import Batch, ForwardBatch, Scores, TaskScores, scored_log_probs
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.examples import Example
from moe_evo.tasks.rows import BatchLimits, Row, TokenisedSplits, forward_batches


class Scorer(Protocol):
    """What one kind of task does with its examples; `needs_reference` is told of at `Task`."""

    needs_reference: bool

    def rows(self, number: int, example: Example) -> list[Row]:
        """What the model reads for the example of this number, at least one row."""
        ...

    def batches(self, rows: Sequence[Row], limits: BatchLimits) -> Sequence[Batch]:
        """The rows to run forward, or to generate from."""
        ...

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None) -> Tensor:
        """See `Task.score`."""
        ...

    def combine(self, examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> Mapping[str, Scores]:
        """Metrics of N examples: name -> (N,), or () where a metric is of all examples together.

        partials: for each example, the partial results of its rows, on the CPU.
        """
        ...


class Task:
    """A named data set with a scorer; it knows nothing of experts.

    needs_reference: scores compare with the untouched model. metric: the name of what `score` is.
    """

    def __init__(self, data: TaskData, scorer: Scorer, limits: BatchLimits) -> None:
        self.name = data.name
        self.metric = data.metric
        self.needs_reference = scorer.needs_reference
        self.scorer = scorer
        self._splits = data.splits
        self._limits = limits
        self._rows = TokenisedSplits(data.splits, scorer.rows)

    def num_examples(self, split: str) -> int:
        return len(self._splits[split])

    def batches(self, split: str, indices: Sequence[int] | None = None) -> Sequence[Batch]:
        """The examples (or those numbered `indices`) as batches; tokens are made once and kept."""
        return self.scorer.batches(self._rows.select(split, indices), self._limits)

    def prompt_batches(self, split: str) -> Sequence[ForwardBatch]:
        """Each example's input once, without an answer: what is seen before the model speaks."""
        return forward_batches([rows[0].prompt for rows in self._rows.of(split)], self._limits)

    def reference(self, batch: ForwardBatch, logits: Tensor) -> Tensor:
        """What `score` needs to know of the untouched model, on the CPU; see `needs_reference`."""
        assert self.needs_reference, f"task {self.name} is scored without a reference"
        return scored_log_probs(batch, logits).cpu()

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None = None) -> Tensor:
        """Partial results (B, anything) of one batch.

        output: logits (B, n, V) of a ForwardBatch, or new tokens (B, at most max_new_tokens) of a
        GenerateBatch.
        """
        return self.scorer.score(batch, output, reference)

    def combine(self, split: str, batches: Sequence[Batch], partials: Sequence[Tensor]) -> TaskScores:
        """The partial results of batches of this split, put together."""
        of_example: dict[int, list[Tensor]] = {}
        for batch, partial in zip(batches, partials, strict=True):
            for number, row in zip(batch.examples.tolist(), partial.cpu(), strict=True):
                of_example.setdefault(number, []).append(row)
        numbers = sorted(of_example)
        found = self.scorer.combine(
            [self._splits[split][number] for number in numbers], [of_example[number] for number in numbers]
        )
        metrics = {name: float(values.mean()) for name, values in found.items()}
        return TaskScores(np.array(numbers), found[self.metric], found.get("log_likelihood"), metrics)
