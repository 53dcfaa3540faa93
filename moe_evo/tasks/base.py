"""What a task gives to the evaluator and takes back: batches of tokens out, outputs in, scores out.

The evaluator owns the forward pass, a task owns tokens and scoring, so that one engine can run many
genomes over the same batches. A task knows nothing of experts. Letters in shapes: B rows, P trees of T
tokens, n scored positions of a row, M nodes with logits, A answers scored on one row, V vocabulary,
N examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORED = -1  # in `targets` and `answers`: nothing stands here
PREFIX_TOKENS_PER_TOKEN = (
    4  # so many of a shared prefix, of which a tree has keys and values, take as much memory as one of its own
)

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """Token trees for one forward pass, padded on the right; a row is a path from a root on.

    input_ids, position_ids: (P, T) int64; a position is the depth in the tree. ends: (P, T) int64; node j
    is seen by the nodes j to ends[j] - 1, which are itself and its descendants. counts: (P, T) int64, the
    rows that go through a node; 0 is padding. kept: (P, T) bool, the M nodes whose logits are
    needed. positions: (B, n) int64, where a row is scored, as a number 0..M-1 of those nodes.
    scored: (B, n) bool, where positions mean something. targets: (B, n, A) int64, the token that answer a
    expects after a position, or IGNORED. examples: (B,) the example of each row. answers: (B, A) which of
    the example's answers each is, or IGNORED. shared_prefix: C tokens that every row begins with and that stand in
    no tree; positions count them.
    """

    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    counts: Tensor
    kept: Tensor
    positions: Tensor
    scored: Tensor
    targets: Tensor
    examples: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]
    shared_prefix: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, padding included, and what the shared prefix adds to each tree."""
        num_trees, width = self.input_ids.shape
        return num_trees * (width + len(self.shared_prefix) // PREFIX_TOKENS_PER_TOKEN)

    def to(self, device: torch.device) -> ForwardBatch:
        """The batch with its tensors on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class GenerateBatch:
    """Prompts for greedy generation, padded on the left.

    input_ids, attention_mask: (B, T) int64. stop: text before which the answer ends, or ''. prompt: all but
    the last token of each row, to be read once for genomes that begin alike; None where that is not possible.
    """

    input_ids: Tensor
    attention_mask: Tensor
    max_new_tokens: int
    stop: str
    examples: npt.NDArray[np.int64]
    prompt: ForwardBatch | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts with padding, and the most that may be generated."""
        return self.input_ids.numel() + len(self.input_ids) * self.max_new_tokens

    def to(self, device: torch.device) -> GenerateBatch:
        """The batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            prompt=None if self.prompt is None else self.prompt.to(device),
        )

    def repeated(self, copies: int) -> GenerateBatch:
        """All rows so many times over, copy by copy; their prompt is left as it is."""
        rows = {name: getattr(self, name).repeat(copies, 1) for name in ("input_ids", "attention_mask")}
        return replace(self, **rows, examples=np.tile(self.examples, copies))


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
    """(B, A) summed log-probabilities of each answer's tokens; logits: (M, V), softmax in float32."""
    wide = logits.float()
    picked = wide[batch.positions[:, :, None], batch.targets.clamp(min=0)]
    total = wide.logsumexp(-1)[batch.positions][:, :, None]
    return torch.where(batch.targets == IGNORED, 0.0, picked - total).sum(dim=1)


def scored_log_probs(batch: ForwardBatch, logits: Tensor) -> Tensor:
    """(scored positions of the batch, V) log-probabilities; logits: (M, V), softmax in float32."""
    return logits.float().log_softmax(dim=-1)[batch.positions[batch.scored]]
