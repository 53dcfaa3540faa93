"""Token rows: one sequence each for the model, of all examples of a task.

What the rows of a task begin with (few-shot examples, an instruction) is their shared prefix, which is read once
for all batches behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

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

    trees: rows may share their beginnings; otherwise each row is a tree of its own. shared_prefix: what rows
    of the task begin with, perhaps nothing; None where keys and values of what was read before cannot be used.
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
    """The rows that `make` makes of each example, all at once: what is wrong with any shows at the start."""

    def __init__(self, splits: Mapping[str, Sequence[Example]], make: Callable[[int, Example], list[Row]]) -> None:
        self._made = {
            split: [make(number, example) for number, example in enumerate(examples)]
            for split, examples in splits.items()
        }

    def of(self, split: str) -> Sequence[list[Row]]:
        """The rows of each example."""
        return self._made[split]

    @cached_property
    def shared_prefix(self) -> tuple[int, ...]:
        """What rows of all splits begin with, the longer the better and the more of them the better."""
        return _shared_prefix(
            [of_example[0] for rows in self._made.values() for of_example in rows]
        )  # trees share the rest


def _shared_prefix(rows: Sequence[Row]) -> tuple[int, ...]:
    """The beginning that saves the most tokens if it is read once for all rows that have it and are scored later.

    In order, rows that begin alike are neighbours, so it is the largest rectangle below what neighbours share.
    """
    ordered = sorted(rows, key=lambda row: row.tokens)
    shared = [min(num_alike(one.tokens, other.tokens), one.start, other.start) for one, other in pairwise(ordered)]
    best = (0, 0, 0)
    rising: list[tuple[int, int]] = []  # where a height begins, and the height
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
