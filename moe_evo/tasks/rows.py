"""Token rows and how they become batches.

To score, rows are laid into token trees: what rows have in common at their beginning (the prompt of an
example's choices) stands there once. To generate, rows are padded on the left. What the rows of a task
begin with (few-shot examples, an instruction) is their trunk, which is read once for all batches behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from moe_evo.tasks.base import IGNORED, TRUNK_TOKENS, ForwardBatch, GenerateBatch
from moe_evo.tasks.examples import Example

MAX_LOGITS = 2**27  # numbers in one batch's logits: 512 MiB in float32
MAX_PADDING = 256  # tokens of padding that cost about as much as one more forward pass
_COMMON_WIDTHS = 4  # without a trunk, a tree is at least so many times as wide as what all rows have in common
TREE_TOKENS = 64  # a wider tree shares more beginnings, but each of its tokens attends to all of it


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

    trees: rows may share their beginnings; otherwise each row is a tree of its own. trunk: what rows
    of the task begin with, perhaps nothing; None where keys and values of what was read before cannot be used.
    """

    batch_tokens: int
    vocabulary: int
    trees: bool = True
    trunk: tuple[int, ...] | None = None

    def lowered_to(self, batch_tokens: int | None, trees: bool, trunk: tuple[int, ...] | None = None) -> BatchLimits:
        """These limits, with at most `batch_tokens` tokens (None changes nothing)."""
        lowest = self.batch_tokens if batch_tokens is None else min(self.batch_tokens, batch_tokens)
        return BatchLimits(lowest, self.vocabulary, trees, trunk)


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
    def trunk(self) -> tuple[int, ...]:
        """What rows of all splits begin with, the longer the better and the more of them the better."""
        return _trunk([of_example[0] for rows in self._made.values() for of_example in rows])  # trees share the rest


def forward_batches(rows: Sequence[Row], limits: BatchLimits) -> tuple[ForwardBatch, ...]:
    """All rows as token trees of similar size, behind the trunk where it pays."""
    parts: dict[tuple[int, ...], list[_Tree]] = {(): _trees(rows, limits)}
    if limits.trunk:
        size = len(limits.trunk)
        behind, others = _divided(rows, limits.trunk, 0)
        own = [replace(row, tokens=row.tokens[size:], start=row.start - size) for row in behind]
        apart = {limits.trunk: _trees(own, limits, trunk=size), (): _trees(others, limits)}
        parts = apart if _num_tokens(parts) - _num_tokens(apart) > MAX_PADDING else parts
    return tuple(
        _forward_batch(grove, trunk) for trunk, trees in parts.items() for grove in _groves(trees, limits, len(trunk))
    )


def generate_batches(
    rows: Sequence[Row], limits: BatchLimits, max_new_tokens: int, stop: str
) -> tuple[GenerateBatch, ...]:
    """All rows in batches, shortest first; room for the new tokens is counted."""
    trunk = limits.trunk or ()
    behind, others = _divided(rows, trunk, 1)
    saved = (len(behind) - 1) * len(trunk)
    parts = [(trunk, behind), ((), others)] if saved > MAX_PADDING else [((), rows)]
    batches = []
    for first, part in parts:
        for bucket in _buckets(part, limits, extra=max_new_tokens):
            input_ids, attention_mask = _padded(bucket)
            examples = np.array([row.example for row in bucket], dtype=np.int64)
            is_read_before = limits.trunk is not None and len(bucket[0].tokens) > 1
            prompt = _prompt_batch(bucket, first) if is_read_before else None
            batches.append(GenerateBatch(input_ids, attention_mask, max_new_tokens, stop, examples, prompt))
    return tuple(batches)


def _trunk(rows: Sequence[Row]) -> tuple[int, ...]:
    """The beginning that saves the most tokens if it is read once for all rows that have it and are scored later.

    In order, rows that begin alike are neighbours, so it is the largest rectangle below what neighbours share.
    """
    ordered = sorted(rows, key=lambda row: row.tokens)
    shared = [min(_num_alike(one.tokens, other.tokens), one.start, other.start) for one, other in pairwise(ordered)]
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


def _num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """In how many tokens two sequences begin alike."""
    fewest, most = 0, min(len(one), len(other))
    while fewest < most:
        middle = (fewest + most + 1) // 2
        if one[fewest:middle] == other[fewest:middle]:
            fewest = middle
        else:
            most = middle - 1
    return fewest


def _divided(rows: Sequence[Row], trunk: tuple[int, ...], num_own: int) -> tuple[list[Row], list[Row]]:
    """Rows that begin with the trunk and have so many tokens more before the first that is scored, and the others."""
    size = len(trunk)
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[not (row.tokens[:size] == trunk and row.start >= size + num_own)].append(row)
    return parts


def _buckets(rows: Sequence[Row], limits: BatchLimits, extra: int) -> Iterator[list[Row]]:
    """Rows of similar length that fit into one batch with `extra` tokens more each."""
    bucket: list[Row] = []
    padding = 0
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        length, count = len(row.tokens), len(bucket) + 1  # the newest row is the longest
        padding += len(bucket) * (length - len(bucket[-1].tokens)) if bucket else 0
        if bucket and (count * (length + extra) > limits.batch_tokens or padding > MAX_PADDING):
            yield bucket
            bucket, padding = [], 0
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


class _Tree:
    """Rows in ascending order, each sharing with the one before it the tokens in which both begin alike.

    tokens: of the nodes, in depth-first order. places: for each row its nodes, from the root on.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tokens: list[int] = []
        self.places: list[npt.NDArray[np.int64]] = []

    def num_shared(self, row: Row) -> int:
        """How many tokens the row has in common with the beginning of the last one."""
        return _num_alike(self.rows[-1].tokens, row.tokens) if self.rows else 0

    def add(self, row: Row) -> None:
        shared = self.num_shared(row)
        own = np.arange(len(self.tokens), len(self.tokens) + len(row.tokens) - shared)
        self.places.append(np.concatenate([self.places[-1][:shared], own]) if shared else own)
        self.tokens.extend(row.tokens[shared:])
        self.rows.append(row)

    @property
    def scored(self) -> npt.NDArray[np.int64]:
        """The nodes whose logits are needed, ascending."""
        nodes = [places[row.start :] for row, places in zip(self.rows, self.places, strict=True)]
        return np.unique(np.concatenate(nodes))


def _trees(rows: Sequence[Row], limits: BatchLimits, trunk: int = 0) -> list[_Tree]:
    """All rows in trees of at most TREE_TOKENS nodes, or as many as the longest row has, within the limits.

    What all rows have in common stands in every tree once, and takes at most about a quarter of it. trunk: how
    many tokens stand before every root; what they add to a tree is at most as much as the tree itself.
    """
    ordered = sorted(rows, key=lambda row: row.tokens)
    longest = max((len(row.tokens) for row in rows), default=0)
    common = _num_alike(ordered[0].tokens, ordered[-1].tokens) if ordered else 0  # in order, so all in between
    wide = max(TREE_TOKENS, longest, _COMMON_WIDTHS * common, trunk // TRUNK_TOKENS)
    width = min(wide, limits.batch_tokens)
    trees: list[_Tree] = []
    for row in ordered:
        fits = trees and len(trees[-1].tokens) + len(row.tokens) - trees[-1].num_shared(row) <= width
        if not (fits and limits.trees):
            trees.append(_Tree())
        trees[-1].add(row)
    return trees


def _num_tokens(parts: Mapping[tuple[int, ...], Sequence[_Tree]]) -> int:
    """Of trunks and the trees behind them."""
    return sum(len(trunk) + sum(len(tree.tokens) for tree in trees) for trunk, trees in parts.items())


def _groves(trees: Sequence[_Tree], limits: BatchLimits, trunk: int) -> Iterator[list[_Tree]]:
    """Trees of similar size that fit into one batch; trunk: how many tokens stand before every root."""
    grove: list[_Tree] = []
    num_scored = padding = 0
    for tree in sorted(trees, key=lambda tree: len(tree.tokens)):
        width, count = len(tree.tokens), len(grove) + 1  # the newest tree is the largest
        num_scored += len(tree.scored)
        padding += len(grove) * (width - len(grove[-1].tokens)) if grove else 0
        num_tokens = count * (width + trunk // TRUNK_TOKENS)
        too_large = num_tokens > limits.batch_tokens or num_scored * limits.vocabulary > MAX_LOGITS
        if grove and (too_large or padding > MAX_PADDING):
            yield grove
            grove, num_scored, padding = [], len(tree.scored), 0
        grove.append(tree)
    if grove:
        yield grove


def _prompt_batch(rows: Sequence[Row], trunk: tuple[int, ...]) -> ForwardBatch:
    """All but the last token of each row, each a tree of its own behind the trunk; nothing is scored."""
    trees = []
    for row in rows:
        trees.append(_Tree())
        trees[-1].add(Row(row.example, row.tokens[len(trunk) : -1], len(row.tokens) - 1 - len(trunk)))
    return _forward_batch(trees, trunk)


def _forward_batch(trees: Sequence[_Tree], trunk: tuple[int, ...] = ()) -> ForwardBatch:
    width = max(len(tree.tokens) for tree in trees)
    input_ids, position_ids, counts = (np.zeros((len(trees), width), dtype=np.int64) for _ in range(3))
    ends = np.tile(np.arange(1, width + 1), (len(trees), 1))  # padding sees itself alone
    for number, tree in enumerate(trees):
        input_ids[number, : len(tree.tokens)] = tree.tokens
        for places in tree.places:  # the last of a node's rows ends last
            position_ids[number, places] = np.arange(len(trunk), len(trunk) + len(places))
            ends[number, places] = places[-1] + 1
            counts[number, places] += 1
    needed = np.concatenate([tree.scored + number * width for number, tree in enumerate(trees)])
    placed = [
        (row, nodes + number * width)
        for number, tree in enumerate(trees)
        for row, nodes in zip(tree.rows, tree.places, strict=True)
    ]
    kept = np.zeros((len(trees), width), dtype=np.bool_)
    kept.reshape(-1)[needed] = True
    num_rows, num_scored = len(placed), max(row.num_scored for row, _ in placed)
    num_answers = max(len(row.answers) for row, _ in placed)
    positions = np.zeros((num_rows, num_scored), dtype=np.int64)
    scored = np.zeros((num_rows, num_scored), dtype=np.bool_)
    targets = np.full((num_rows, num_scored, num_answers), IGNORED, dtype=np.int64)
    answers = np.full((num_rows, num_answers), IGNORED, dtype=np.int64)
    for index, (row, nodes) in enumerate(placed):
        positions[index, : row.num_scored] = np.searchsorted(needed, nodes[row.start :])
        scored[index, : row.num_scored] = True
        for slot, (which, tokens) in enumerate(row.answers):
            targets[index, : len(tokens), slot] = tokens
            answers[index, slot] = which
    return ForwardBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        ends=torch.from_numpy(ends),
        counts=torch.from_numpy(counts),
        kept=torch.from_numpy(kept),
        positions=torch.from_numpy(positions),
        scored=torch.from_numpy(scored),
        targets=torch.from_numpy(targets),
        examples=np.array([row.example for row, _ in placed], dtype=np.int64),
        answers=answers,
        trunk=trunk,
    )
