"""What a task gives to the evaluator and takes back: batches of tokens out, outputs in, scores out.

The evaluator owns the forward pass, a task owns tokens and scoring, so that one engine can run many
genomes over the same batches. A task knows nothing of experts. Letters in shapes: B rows, T tokens,
n positions with logits, A answers scored on one row, V vocabulary, N examples, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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


class Task(Protocol):
    """A named data set with a scorer.

    needs_reference: scores compare with the untouched model. metric: the name of what `score` is.
    """

    name: str
    metric: str
    needs_reference: bool

    def num_examples(self, split: str) -> int: ...

    def batches(self, split: str, indices: Sequence[int] | None = None) -> Sequence[Batch]:
        """The examples (or those numbered `indices`) as batches; tokens are made once and kept."""
        ...

    def prompt_batches(self, split: str) -> Sequence[ForwardBatch]:
        """Each example's input once, without an answer: what is seen before the model speaks."""
        ...

    def reference(self, batch: ForwardBatch, logits: Tensor) -> Tensor:
        """What `score` needs to know of the untouched model, on the CPU; see `needs_reference`."""
        ...

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None = None) -> Tensor:
        """Partial results (B, anything) of one batch.

        output: logits (B, n, V) of a ForwardBatch, or new tokens (B, at most max_new_tokens) of a
        GenerateBatch.
        """
        ...

    def combine(self, split: str, batches: Sequence[Batch], partials: Sequence[Tensor]) -> TaskScores:
        """The partial results of batches of this split, put together."""
        ...


def target_log_probs(batch: ForwardBatch, logits: Tensor) -> Tensor:
    """(B, A) summed log-probabilities of each answer's tokens; softmax in float32."""
    wide = logits.float()
    picked = wide.gather(-1, batch.targets.clamp(min=0)) - wide.logsumexp(-1, keepdim=True)
    return torch.where(batch.targets == IGNORED, 0.0, picked).sum(dim=1)


def mean_of(values: Scores) -> float:
    """A plain float for metrics."""
    return float(values.mean())
