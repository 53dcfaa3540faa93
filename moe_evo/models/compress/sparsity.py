"""MoE-Pruner (arXiv 2410.12013): which weights of an expert become zero, and how much the others take to store.

Pure functions of one matrix (out, in). The importance of a weight is its absolute value times the norm of its input.
The most important weights of each output row stay, or of each group within a row (N:M).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_evo.errors import ConfigError


@dataclass(frozen=True)
class Pattern:
    """N:M: of every `group` consecutive input weights of a row `kept` stay."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """'2:4'; raises ConfigError."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        kept, group = map(int, found.groups()) if found else (0, 0)
        if not 0 < kept < group:
            raise ConfigError(f"--pattern: got {text!r}, expected N:M with 0 < N < M, such as 2:4")
        return cls(kept, group)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def index_bits(self) -> int:
        """To tell the place of one kept weight in its group."""
        return (self.group - 1).bit_length()


@dataclass(frozen=True)
class RouterWeightedPruning:
    """Zeros where |W_ij| ||X_j g||_2 is small: a share `sparsity` of every row, or by `pattern`.

    X_j: input channel j over the tokens that are routed to the expert, g their gate weights.
    """

    sparsity: float
    pattern: Pattern | None = None

    needs_norms = True

    @property
    def description(self) -> str:
        if self.pattern is None:
            return f"{self.sparsity:.0%} of every row of every expert's weights is zero (MoE-Pruner)"
        kept, group = self.pattern.kept, self.pattern.group
        return f"of every {group} consecutive weights of a row of every expert, {group - kept} are zero (MoE-Pruner)"

    @property
    def needs(self) -> str:
        """What would have to run the checkpoint for it to take less memory."""
        if self.pattern is None:
            return (
                "a loader and kernel for unstructured sparse experts, which neither transformers nor vLLM has; a "
                "compressed file (bitmask) saves disk and transfer alone"
            )
        return (
            f"grouped matrix kernels for {self.pattern} sparse experts (GPUs since Ampere have them for 2:4); "
            "transformers computes densely, and vLLM has dropped its 2:4 support"
        )

    def compressed(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """weight (out, in) with zeros, for norms (in,): ||X_j g||_2."""
        assert norms is not None
        scores = importance(weight, norms)
        if self.pattern is None:
            mask = best_of_rows(scores, weight.shape[-1] - num_zeros(self.sparsity, weight.shape[-1]))
        else:
            mask = best_of_groups(scores, self.pattern)
        return torch.where(mask, weight, 0)

    def packed_bytes(self, compressed: Tensor) -> dict[str, int]:
        """What a matrix (out, in) with zeros would take, by the way of storing it."""
        num_nonzero, itemsize = int(compressed.count_nonzero()), compressed.element_size()
        packed = {"values and bitmask": bitmask_bytes(num_nonzero, compressed.numel(), itemsize)}
        if self.pattern is not None:
            name = f"{self.pattern} (values and {self.pattern.index_bits}-bit indices)"
            packed[name] = pattern_bytes(self.pattern, compressed.numel(), itemsize)
        return packed


def importance(weight: Tensor, norms: Tensor) -> Tensor:
    """S_ij = |W_ij| ||X_j g||_2 in float64; weight (out, in), norms (in,).

    Where all norms are zero, as no token was routed to the expert, the absolute value alone counts.
    """
    factors = norms.double() if norms.any() else torch.ones_like(norms, dtype=torch.float64)
    return weight.double().abs() * factors


def num_zeros(sparsity: float, row: int) -> int:
    """How many of `row` weights become zero, rounded to the nearest (a half up); at least one stays."""
    return min(int(sparsity * row + 0.5), row - 1)


def best_of_rows(scores: Tensor, num_kept: int) -> Tensor:
    """(..., n) whether a score is among the `num_kept` highest of its row; the first wins a tie."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :num_kept], True)


def best_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """(..., n) whether a score is among the best of its group of consecutive ones; n is a multiple of the group."""
    groups = scores.reshape(-1, pattern.group)
    return best_of_rows(groups, pattern.kept).reshape(scores.shape)


def bitmask_bytes(num_nonzero: int, num_weights: int, itemsize: int) -> int:
    """The values that are not zero, and a bit for each weight."""
    return num_nonzero * itemsize + (num_weights + 7) // 8


def pattern_bytes(pattern: Pattern, num_weights: int, itemsize: int) -> int:
    """The kept values, and the place in its group of each."""
    num_kept = num_weights // pattern.group * pattern.kept
    return num_kept * itemsize + (num_kept * pattern.index_bits + 7) // 8
