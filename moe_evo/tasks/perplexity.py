"""Language modelling: how probable the model finds the examples' texts.

The score of an example is its mean log-likelihood per token, in nats (minus the stock loss of the
model); the first token is not predicted. Metrics: log_likelihood, the mean of the scores, and
perplexity, exp of the mean negative log-likelihood over all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_evo.config import TaskConfig
from moe_evo.errors import TaskError
from moe_evo.tasks.base import Batch, ForwardBatch, TaskScores, mean_of, target_log_probs
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.examples import Example
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import BatchLimits, Row, TokenisedSplits, forward_batches


class PerplexityTask:
    """A `Task` whose partial results are (B, 2): summed log-likelihood and number of tokens."""

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
        rows = self._rows.select(split, None)
        return forward_batches([Row(row.example, row.tokens, len(row.tokens) - 1) for row in rows], self._limits)

    def reference(self, batch: ForwardBatch, logits: Tensor) -> Tensor:
        raise AssertionError("texts are scored without a reference")

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None = None) -> Tensor:
        assert isinstance(batch, ForwardBatch)
        return torch.cat([target_log_probs(batch, output), batch.scored.sum(dim=1, keepdim=True)], dim=1)

    def combine(self, split: str, batches: Sequence[Batch], partials: Sequence[Tensor]) -> TaskScores:
        examples = np.concatenate([batch.examples for batch in batches])
        order = np.argsort(examples)
        sums, tokens = torch.cat(list(partials)).double().cpu().numpy()[order].T
        score = sums / tokens
        metrics = {
            "log_likelihood": mean_of(score),
            "perplexity": float(np.exp(-sums.sum() / tokens.sum())),
        }
        return TaskScores(examples[order], score, score, metrics)

    def _make_rows(self, number: int, example: Example) -> list[Row]:
        tokens = self._format.text_tokens(example)
        if len(tokens) < 2:
            raise TaskError(f"{example.where}: text: got {len(tokens)} tokens, expected at least 2")
        return [Row(number, tokens[:-1], 0, ((0, tokens[1:]),))]
