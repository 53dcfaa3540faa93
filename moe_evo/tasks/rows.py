"""Token rows: the sequences of all examples of a task.

The rows of a task often begin with the same tokens (few-shot examples, an instruction). These are their shared prefix;
its keys and values are computed once and used by all batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from moe_evo.tasks.examples import Example


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
    """How large a batch may be: tokens with padding, and the vocabulary that its logits span.

    trees: rows that begin alike share tokens; otherwise each row is a tree of its own. shared_prefix: the task's,
    perhaps (); None where the model cannot use keys and values that were computed before.
    """

    batch_tokens: int
    vocabulary: int
    trees: bool = True
    shared_prefix: tuple[int, ...] | None = None

    def lowered_to(
        self, batch_tokens: int | None, trees: bool, shared_prefix: tuple[int, ...] | None = None
    ) -> BatchLimits:
        """These limits, with at most `batch_tokens` tokens (None changes nothing)."""
        lowest = self.batch_tokens if batch_tokens is None else min(self.batch_tokens, batch_tokens)
        return BatchLimits(lowest, self.vocabulary, trees, shared_prefix)


class TokenisedSplits:
    """The rows that `make` makes of each example, all at once, so that a bad example is found at the start."""

    def __init__(self, splits: Mapping[str, Sequence[Example]], make: Callable[[int, Example], list[Row]]) -> None:
        self._made = {
            split: [make(number, example) for number, example in enumerate(examples)]
            for split, examples in splits.items()
        }

    def digest_into(self, content: hashlib._Hash) -> None:
        """Add all rows to a hash."""
        for split, rows in self._made.items():
            for number, row in ((number, row) for number, of_example in enumerate(rows) for row in of_example):
                content.update(f"{split}:{number}:{row.start}:{row.num_prompt}:{row.answers}:".encode())
                content.update(np.array(row.tokens, dtype=np.int64).tobytes())

    def of(self, split: str) -> Sequence[list[Row]]:
        """The rows of each example."""
        return self._made[split]

    @cached_property
    def shared_prefix(self) -> tuple[int, ...]:
        """The shared prefix of the rows of all splits, see `_shared_prefix`; () where there is none."""
        return _shared_prefix(
            [of_example[0] for rows in self._made.values() for of_example in rows]
        )  # token trees share what the rows of one example have in common


def _shared_prefix(rows: Sequence[Row]) -> tuple[int, ...]:
    """The prefix that saves the most tokens if it is computed once for all rows that begin with it.

    Only tokens before the first scored one can be in it. Sorted rows that begin alike are neighbours, so the prefix is
    the largest rectangle under the lengths that neighbours have in common.
    """
    ordered = sorted(rows, key=lambda row: row.tokens)
    shared = [min(num_alike(one.tokens, other.tokens), one.start, other.start) for one, other in pairwise(ordered)]
    best = (0, 0, 0)
    rising: list[tuple[int, int]] = []  # where a rectangle begins, and its height
    for place, height in enumerate([*shared, 0]):
        first = place
        while rising and rising[-1][1] >= height:
            first, above = rising.pop()
            best = max(best, ((place - first) * above, above, first))
        rising.append((first, height))
    _, size, first = best
    return ordered[first].tokens[:size] if size else ()


def num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """In how many tokens two sequences begin alike."""
    fewest, most = 0, min(len(one), len(other))
    while fewest < most:
        middle = (fewest + most + 1) // 2
        if one[fewest:middle] == other[fewest:middle]:
            fewest = middle
        else:
            most = middle - 1
    return fewest
