"""How token rows become batches: to score in token trees, to generate padded on the left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from moe_evo.tasks.base import IGNORED, PREFIX_TOKENS_PER_TOKEN, ForwardBatch, GenerateBatch
from moe_evo.tasks.rows import BatchLimits, Row
from moe_evo.tasks.trees import TokenTree, token_trees

MAX_LOGITS = 2**27  # numbers in one batch's logits: 512 MiB in float32
MAX_PADDING = 256  # tokens of padding that cost about as much as one more forward pass


def forward_batches(rows: Sequence[Row], limits: BatchLimits) -> tuple[ForwardBatch, ...]:
    """All rows as token trees of similar size, behind the shared prefix where it pays."""
    parts: dict[tuple[int, ...], list[TokenTree]] = {(): token_trees(rows, limits)}
    if limits.shared_prefix:
        size = len(limits.shared_prefix)
        behind, others = _divided(rows, limits.shared_prefix, 0)
        own = [replace(row, tokens=row.tokens[size:], start=row.start - size) for row in behind]
        apart = {limits.shared_prefix: token_trees(own, limits, prefix_tokens=size), (): token_trees(others, limits)}
        parts = apart if _num_tokens(parts) - _num_tokens(apart) > MAX_PADDING else parts
    return tuple(
        _forward_batch(trees_of_batch, shared_prefix)
        for shared_prefix, trees in parts.items()
        for trees_of_batch in _tree_batches(trees, limits, len(shared_prefix))
    )


def generate_batches(
    rows: Sequence[Row], limits: BatchLimits, max_new_tokens: int, stop: str
) -> tuple[GenerateBatch, ...]:
    """All rows in batches, shortest first; room for the new tokens is counted."""
    shared_prefix = limits.shared_prefix or ()
    behind, others = _divided(rows, shared_prefix, 1)
    saved = (len(behind) - 1) * len(shared_prefix)
    parts = [(shared_prefix, behind), ((), others)] if saved > MAX_PADDING else [((), rows)]
    batches = []
    for first, part in parts:
        for bucket in _buckets(part, limits, extra=max_new_tokens):
            input_ids, attention_mask = _padded(bucket)
            examples = np.array([row.example for row in bucket], dtype=np.int64)
            is_read_before = limits.shared_prefix is not None and len(bucket[0].tokens) > 1
            prompt = _prompt_batch(bucket, first) if is_read_before else None
            batches.append(GenerateBatch(input_ids, attention_mask, max_new_tokens, stop, examples, prompt))
    return tuple(batches)


def _divided(rows: Sequence[Row], shared_prefix: tuple[int, ...], num_own: int) -> tuple[list[Row], list[Row]]:
    """Rows that begin with the shared prefix and have `num_own` more tokens before the first scored; the others."""
    size = len(shared_prefix)
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[not (row.tokens[:size] == shared_prefix and row.start >= size + num_own)].append(row)
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


def _num_tokens(parts: Mapping[tuple[int, ...], Sequence[TokenTree]]) -> int:
    """Of shared prefixes and the trees behind them."""
    return sum(len(shared_prefix) + sum(len(tree.tokens) for tree in trees) for shared_prefix, trees in parts.items())


def _tree_batches(trees: Sequence[TokenTree], limits: BatchLimits, prefix_tokens: int) -> Iterator[list[TokenTree]]:
    """Trees of similar size that fit into one batch; prefix_tokens: how many tokens stand before every root."""
    trees_of_batch: list[TokenTree] = []
    num_scored = padding = 0
    for tree in sorted(trees, key=lambda tree: len(tree.tokens)):
        width, count = len(tree.tokens), len(trees_of_batch) + 1  # the newest tree is the largest
        num_scored += len(tree.scored)
        padding += len(trees_of_batch) * (width - len(trees_of_batch[-1].tokens)) if trees_of_batch else 0
        num_tokens = count * (width + prefix_tokens // PREFIX_TOKENS_PER_TOKEN)
        too_large = num_tokens > limits.batch_tokens or num_scored * limits.vocabulary > MAX_LOGITS
        if trees_of_batch and (too_large or padding > MAX_PADDING):
            yield trees_of_batch
            trees_of_batch, num_scored, padding = [], len(tree.scored), 0
        trees_of_batch.append(tree)
    if trees_of_batch:
        yield trees_of_batch


def _prompt_batch(rows: Sequence[Row], shared_prefix: tuple[int, ...]) -> ForwardBatch:
    """All but the last token of each row, each a tree of its own behind the shared prefix; nothing is scored."""
    trees = []
    for row in rows:
        trees.append(TokenTree())
        trees[-1].add(Row(row.example, row.tokens[len(shared_prefix) : -1], len(row.tokens) - 1 - len(shared_prefix)))
    return _forward_batch(trees, shared_prefix)


def _forward_batch(trees: Sequence[TokenTree], shared_prefix: tuple[int, ...] = ()) -> ForwardBatch:
    width = max(len(tree.tokens) for tree in trees)
    input_ids, position_ids, counts = (np.zeros((len(trees), width), dtype=np.int64) for _ in range(3))
    ends = np.tile(np.arange(1, width + 1), (len(trees), 1))  # padding sees itself alone
    for number, tree in enumerate(trees):
        input_ids[number, : len(tree.tokens)] = tree.tokens
        for places in tree.places:  # the last of a node's rows ends last
            position_ids[number, places] = np.arange(len(shared_prefix), len(shared_prefix) + len(places))
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
        shared_prefix=shared_prefix,
    )
