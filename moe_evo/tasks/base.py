"""What a task gives to the evaluator and takes back: batches of tokens out, outputs in, scores out.

The evaluator owns the forward pass, a task owns tokens and scoring, so that one engine can run many
genomes over the same batches. A task knows nothing of experts. Letters in shapes: B rows, T tokens,
n positions with logits, A answers scored on one row, V vocabulary, N examples, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORED = -1  # in `targets` and `answers`: nothing stands here

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """Rows for one forward pass, padded on the left.

    input_ids, attention_mask, position_ids: (B, T) int64. logits_to_keep: n, the last positions whose
    logits are needed. scored: (B, n) bool, the positions that count. targets: (B, n, A) int64, the
    token that answer a expects after a position, or IGNORED. examples: (B,) the example of each row.
    answers: (B, A) which of the example's answers each is, or IGNORED.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    logits_to_keep: int
    scored: Tensor
    targets: Tensor
    examples: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]

    def to(self, device: torch.device) -> ForwardBatch:
        """The batch with its tensors on `device`."""
        names = ("input_ids", "attention_mask", "position_ids", "scored", "targets")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, eq=False)
class GenerateBatch:
    """Prompts for greedy generation, padded on the left.

    input_ids, attention_mask: (B, T) int64. stop: text before which the answer ends, or ''.
    """

    input_ids: Tensor
    attention_mask: Tensor
    max_new_tokens: int
    stop: str
    examples: npt.NDArray[np.int64]

    def to(self, device: torch.device) -> GenerateBatch:
        """The batch with its tensors on `device`."""
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


Batch = ForwardBatch | GenerateBatch


@dataclass(frozen=True, eq=False)
class TaskScores:
    """The outcome of one model on the examples of one split, by ascending example number.

    examples: (N,) numbers within the split. score: (N,) float64, higher is better. log_likelihood:
    (N,) float64 of the right answer, or None where the task has none. metrics: name -> value.
    """

    examples: npt.NDArray[np.int64]
    score: Scores
    log_likelihood: Scores | None
    metrics: Mapping[str, float]


def target_log_probs(batch: ForwardBatch, logits: Tensor) -> Tensor:
    """(B, A) summed log-probabilities of each answer's tokens; softmax in float32."""
    wide = logits.float()
    picked = wide.gather(-1, batch.targets.clamp(min=0)) - wide.logsumexp(-1, keepdim=True)
    return torch.where(batch.targets == IGNORED, 0.0, picked).sum(dim=1)


def scored_log_probs(batch: ForwardBatch, logits: Tensor) -> Tensor:
    """(scored positions of the batch, V) log-probabilities; softmax in float32."""
    return logits[batch.scored].float().log_softmax(dim=-1)
