"""Multiple choice by log-likelihood: the choice that the model finds most probable is its answer.

accuracy: the highest summed log-likelihood is the right one. accuracy_norm: the same after division
by the choice's length in characters without outer spaces (as lm-evaluation-harness' acc_norm).
log_likelihood: that of the right choice, in nats. Ties go to the first choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from moe_evo.config import TaskConfig
from moe_evo.tasks.base import IGNORED, Batch, ForwardBatch, TaskScores, mean_of, target_log_probs
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.examples import Example
from moe_evo.tasks.prompt import PromptFormat, Tokens
from moe_evo.tasks.rows import BatchLimits, Row, TokenisedSplits, forward_batches


def choice_rows(number: int, context: Tokens, choices: Sequence[Tokens]) -> list[Row]:
    """The fewest rows that hold every choice after the context.

    The last token of a choice is only predicted, never read, and a causal model's earlier logits do
    not see what follows; so a choice rides on any row whose tokens begin with all it reads. Choices
    of one token each share the bare prompt.
    """
    order = sorted(range(len(choices)), key=lambda index: -len(choices[index]))  # longest first
    riders: dict[Tokens, list[int]] = {}
    for index in order:
        read = choices[index][:-1]
        carrier = next((row for row in riders if row[: len(read)] == read), read)
        riders.setdefault(carrier, []).append(index)
    return [
        Row(number, context + read, len(context) - 1, tuple((index, choices[index]) for index in sorted(members)))
        for read, members in riders.items()
    ]


class ChoiceTask:
    """A `Task` whose partial results are the log-likelihoods (B, A) of the choices on each row."""

    needs_reference = False

    def __init__(self, config: TaskConfig, data: TaskData, tokenizer: Any, limits: BatchLimits) -> None:
        self.name = data.name
        self.metric = data.metric
        self._data = data
        self._limits = limits
        self._format = PromptFormat(config, data, tokenizer)
        self._rows = TokenisedSplits(data.splits, self._make_rows)

    def num_examples(self, split: str) -> int:
        return len(self._data.splits[split])

    def batches(self, split: str, indices: Sequence[int] | None = None) -> Sequence[ForwardBatch]:
        return forward_batches(self._rows.select(split, indices), self._limits)

    def prompt_batches(self, split: str) -> Sequence[ForwardBatch]:
        firsts = [rows[0] for rows in self._rows.of(split)]
        return forward_batches(
            [Row(row.example, row.tokens[: row.start + 1], row.start) for row in firsts], self._limits
        )

    def reference(self, batch: ForwardBatch, logits: Tensor) -> Tensor:
        raise AssertionError("choices are scored without a reference")

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None = None) -> Tensor:
        assert isinstance(batch, ForwardBatch)
        return target_log_probs(batch, output)

    def combine(self, split: str, batches: Sequence[Batch], partials: Sequence[Tensor]) -> TaskScores:
        examples = np.unique(np.concatenate([batch.examples for batch in batches]))
        asked = [self._data.splits[split][number] for number in examples]
        likelihoods = np.full((len(asked), max(len(one.choices) for one in asked)), -np.inf)
        for batch, partial in zip(batches, partials, strict=True):
            assert isinstance(batch, ForwardBatch)
            row, slot = np.nonzero(batch.answers != IGNORED)
            places = np.searchsorted(examples, batch.examples[row])
            likelihoods[places, batch.answers[row, slot]] = partial.double().cpu().numpy()[row, slot]
        lengths = np.ones_like(likelihoods)
        for index, example in enumerate(asked):
            lengths[index, : len(example.choices)] = [len(choice.strip()) for choice in example.choices]
        labels = np.array([example.label for example in asked])
        right = likelihoods[np.arange(len(asked)), labels]
        by_metric = {
            "accuracy": (likelihoods.argmax(axis=1) == labels).astype(np.float64),
            "accuracy_norm": ((likelihoods / lengths).argmax(axis=1) == labels).astype(np.float64),
            "log_likelihood": right,
        }
        metrics = {name: mean_of(values) for name, values in by_metric.items()}
        return TaskScores(examples, by_metric[self.metric], right, metrics)

    def _make_rows(self, number: int, example: Example) -> list[Row]:
        context, choices = self._format.pair_tokens(example, example.choices)
        return choice_rows(number, context, choices)
