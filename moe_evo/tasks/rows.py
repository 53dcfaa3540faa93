"""Token rows and how they become left-padded batches of similar length.

Left padding with positions that skip it puts the logits that matter last in every row, so that
`model(..., logits_to_keep=n)` of stock transformers computes no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_evo.tasks.base import IGNORED, ForwardBatch, GenerateBatch
from moe_evo.tasks.examples import Example

MAX_LOGITS = 2**27  # numbers in one batch's logits: 512 MiB in float32
MAX_PADDING = 256  # tokens of padding that cost about as much as one more forward pass


@dataclass(frozen=True)
class Row:
    """One sequence for the model.

    start: first position that is scored, all later ones are too. answers: (which, tokens) whose first
    token is predicted at `start`. num_prompt: how many tokens stand before an answer; None means all.
    """

    example: int
    tokens: tuple[int, ...]
    start: int
    answers: tuple[tuple[int, tuple[int, ...]], ...] = ()
    num_prompt: int | None = None

    @property
    def num_scored(self) -> int:
        return len(self.tokens) - self.start

    @property
    def prompt(self) -> Row:
        """What the model reads before it answers; the last position is scored."""
        tokens = self.tokens[: self.num_prompt]
        return Row(self.example, tokens, len(tokens) - 1)


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be: tokens with padding, and the vocabulary that its logits span."""

    batch_tokens: int
    vocabulary: int

    def lowered_to(self, batch_tokens: int | None) -> BatchLimits:
        """These limits, with at most `batch_tokens` tokens; None changes nothing."""
        lowest = self.batch_tokens if batch_tokens is None else min(self.batch_tokens, batch_tokens)
        return BatchLimits(lowest, self.vocabulary)


class TokenisedSplits:
    """The rows that `make` makes of each example, all at once: what is wrong with any shows at the start."""

    def __init__(self, splits: Mapping[str, Sequence[Example]], make: Callable[[int, Example], list[Row]]) -> None:
        self._made = {
            split: [make(number, example) for number, example in enumerate(examples)]
            for split, examples in splits.items()
        }

    def of(self, split: str) -> Sequence[list[Row]]:
        """The rows of each example."""
        return self._made[split]


def forward_batches(rows: Sequence[Row], limits: BatchLimits) -> tuple[ForwardBatch, ...]:
    """All rows in batches, shortest first."""
    return tuple(map(_forward_batch, _buckets(rows, limits)))


def generate_batches(
    rows: Sequence[Row], limits: BatchLimits, max_new_tokens: int, stop: str
) -> tuple[GenerateBatch, ...]:
    """All rows in batches, shortest first; room for the new tokens is counted."""
    batches = []
    for bucket in _buckets(rows, limits, extra=max_new_tokens):
        input_ids, attention_mask = _padded(bucket)
        examples = np.array([row.example for row in bucket], dtype=np.int64)
        batches.append(GenerateBatch(input_ids, attention_mask, max_new_tokens, stop, examples))
    return tuple(batches)


def _buckets(rows: Sequence[Row], limits: BatchLimits, extra: int = 0) -> Iterator[list[Row]]:
    bucket: list[Row] = []
    num_kept = padding = 0
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        length, count = len(row.tokens), len(bucket) + 1  # the newest row is the longest
        num_kept = max(num_kept, row.num_scored)
        padding += len(bucket) * (length - len(bucket[-1].tokens)) if bucket else 0
        too_large = count * (length + extra) > limits.batch_tokens or count * num_kept * limits.vocabulary > MAX_LOGITS
        if bucket and (too_large or padding > MAX_PADDING):
            yield bucket
            bucket, num_kept, padding = [], row.num_scored, 0
        bucket.append(row)
    if bucket:
        yield bucket


def _padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, (B, T) each."""
    width = max(len(row.tokens) for row in rows)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)  # masked, so any token pads
    attention_mask = np.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row.tokens) :] = row.tokens
        attention_mask[index, width - len(row.tokens) :] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask)


def _forward_batch(rows: Sequence[Row]) -> ForwardBatch:
    input_ids, attention_mask = _padded(rows)
    num_kept = max(row.num_scored for row in rows)
    num_answers = max(len(row.answers) for row in rows)
    scored = np.zeros((len(rows), num_kept), dtype=np.bool_)
    targets = np.full((len(rows), num_kept, num_answers), IGNORED, dtype=np.int64)
    answers = np.full((len(rows), num_answers), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        first = num_kept - row.num_scored
        scored[index, first:] = True
        for slot, (which, tokens) in enumerate(row.answers):
            targets[index, first : first + len(tokens), slot] = tokens
            answers[index, slot] = which
    return ForwardBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=num_kept,
        scored=torch.from_numpy(scored),
        targets=torch.from_numpy(targets),
        examples=np.array([row.example for row in rows], dtype=np.int64),
        answers=answers,
    )
