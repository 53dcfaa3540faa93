"""Token trees: rows that begin alike, laid so that what they have in common stands there once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_evo.tasks.base import PREFIX_TOKENS_PER_TOKEN
from moe_evo.tasks.rows import BatchLimits, Row, num_alike

_COMMON_WIDTHS = 4  # without a shared prefix, a tree is at least so many times as wide as what all rows have in common
TREE_TOKENS = 64  # a wider tree shares more beginnings, but each of its tokens attends to all of it


class TokenTree:
    """Rows in ascending order, each sharing with the one before it the tokens in which both begin alike.

    tokens: of the nodes, in depth-first order. places: for each row its nodes, from the root on.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tokens: list[int] = []
        self.places: list[npt.NDArray[np.int64]] = []

    def num_shared(self, row: Row) -> int:
        """How many tokens the row has in common with the beginning of the last one."""
        return num_alike(self.rows[-1].tokens, row.tokens) if self.rows else 0

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


def token_trees(rows: Sequence[Row], limits: BatchLimits, prefix_tokens: int = 0) -> list[TokenTree]:
    """All rows in trees of at most TREE_TOKENS nodes, or as many as the longest row has, within the limits.

    What all rows have in common stands in every tree once, and takes at most about a quarter of it. prefix_tokens: how
    many tokens stand before every root; what they add to a tree is at most as much as the tree itself.
    """
    ordered = sorted(rows, key=lambda row: row.tokens)
    longest = max((len(row.tokens) for row in rows), default=0)
    common = num_alike(ordered[0].tokens, ordered[-1].tokens) if ordered else 0  # in order, so all in between
    wide = max(TREE_TOKENS, longest, _COMMON_WIDTHS * common, prefix_tokens // PREFIX_TOKENS_PER_TOKEN)
    width = min(wide, limits.batch_tokens)
    trees: list[TokenTree] = []
    for row in ordered:
        fits = trees and len(trees[-1].tokens) + len(row.tokens) - trees[-1].num_shared(row) <= width
        if not (fits and limits.trees):
            trees.append(TokenTree())
        trees[-1].add(row)
    return trees
