"""Likeness to the full model, without labels: minus the KL divergence of the next-token distributions.

The score of an example is -KL(full model || candidate) in nats, averaged over its positions, in
float32. The full model's log-probabilities are kept on the CPU: positions x vocabulary x 4 bytes (300
texts of 50 tokens and a vocabulary of 32,000 are 1.9 GB), so use num_search and max_length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_evo.config import TaskConfig
from moe_evo.errors import TaskError
from moe_evo.tasks.base import Batch, ForwardBatch, TaskScores, mean_of
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.examples import Example
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import BatchLimits, Row, TokenisedSplits, forward_batches


class DistillationTask:
    """A `Task` whose partial results are (B, 1): the mean of -KL over each row's positions.

    Every position of a text or prompt counts, the last one too: it speaks about the answer.
    """

    needs_reference = True

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
        return self.batches(split)

    def reference(self, batch: ForwardBatch, logits: Tensor) -> Tensor:
        """(scored positions of the batch, V) float32 log-probabilities on the CPU."""
        return logits[batch.scored].float().log_softmax(dim=-1).cpu()

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None = None) -> Tensor:
        assert isinstance(batch, ForwardBatch) and reference is not None
        full = reference.to(output.device)
        candidate = output[batch.scored].float().log_softmax(dim=-1)
        divergence = torch.zeros(batch.scored.shape, device=output.device)
        # a token that the full model rules out (log 0) adds nothing: 0 * (-inf) would be NaN
        ratio = torch.where(full == -torch.inf, 0.0, full - candidate)
        divergence[batch.scored] = (full.exp() * ratio).sum(dim=-1)
        return -(divergence.sum(dim=1, keepdim=True) / batch.scored.sum(dim=1, keepdim=True))

    def combine(self, split: str, batches: Sequence[Batch], partials: Sequence[Tensor]) -> TaskScores:
        examples = np.concatenate([batch.examples for batch in batches])
        order = np.argsort(examples)
        score = torch.cat(list(partials)).double().cpu().numpy()[order, 0]
        return TaskScores(examples[order], score, None, {self.metric: mean_of(score)})

    def _make_rows(self, number: int, example: Example) -> list[Row]:
        tokens = self._format.text_tokens(example) if example.text else self._format.prompt_tokens(example)
        if not tokens:
            raise TaskError(f"{example.where}: got no tokens, expected at least 1")
        return [Row(number, tokens, 0)]
