"""MC-SMoE's compression (arXiv 2310.01334): a matrix as the product of two thin ones and a few dense columns.

Pure functions of one matrix (out, in), in float64. They need no data: the dense columns are those where the product
is furthest from the matrix, while the paper ranks them by the gradient of a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INDEX_BYTES = 4


@dataclass(frozen=True, eq=False)
class Factors:
    """W ~ U V + S. left: U (out, r). right: V (r, in). columns: (c,) numbers, values: (out, c), all of S."""

    left: Tensor
    right: Tensor
    columns: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        """(out, in)"""
        return (self.left @ self.right).index_add(1, self.columns, self.values)

    def packed_bytes(self, itemsize: int) -> int:
        """In numbers of `itemsize` bytes, and 4 bytes for the number of each column."""
        numbers = self.left.numel() + self.right.numel() + self.values.numel()
        return numbers * itemsize + len(self.columns) * _INDEX_BYTES


@dataclass(frozen=True)
class LowRankPlusColumns:
    """W ~ U V + S of `rank` (a whole number, or a share of the full rank) and a share `columns` of S."""

    rank: int | float
    columns: float

    needs_norms = False

    @property
    def description(self) -> str:
        rank = f"rank {self.rank}" if isinstance(self.rank, int) else f"{self.rank:.0%} of the full rank"
        return f"every expert's matrix is of {rank} plus {self.columns:.0%} of its columns (MC-SMoE), stored densely"

    @property
    def needs(self) -> str:
        """What would have to run the checkpoint for it to take less memory."""
        return (
            "a model class whose experts hold and multiply factors and columns, as MC-SMoE's own code; no stock "
            "architecture of transformers or vLLM does"
        )

    def compressed(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """weight (out, in) as what its factors make, in its own dtype; norms are not used."""
        return self.factors(weight).dense().to(weight.dtype)

    def packed_bytes(self, compressed: Tensor) -> dict[str, int]:
        """What a matrix (out, in) would take, by the way of storing it."""
        (out, num_columns), rank = compressed.shape, self.rank_of(*compressed.shape)
        kept = self.columns_of(num_columns)
        numbers = rank * (out + num_columns) + kept * out
        return {"factors and columns": numbers * compressed.element_size() + kept * _INDEX_BYTES}

    def factors(self, weight: Tensor) -> Factors:
        return factorised(weight, self.rank_of(*weight.shape), self.columns_of(weight.shape[1]))

    def rank_of(self, out: int, num_columns: int) -> int:
        """The rank for a matrix (out, num_columns)."""
        full = min(out, num_columns)
        return self.rank if isinstance(self.rank, int) else max(int(self.rank * full + 0.5), 1)

    def columns_of(self, num_columns: int) -> int:
        return int(self.columns * num_columns + 0.5)


def factorised(weight: Tensor, rank: int, num_columns: int) -> Factors:
    """Truncated SVD of weight (out, in), and the `num_columns` columns of the residual with the largest norms.

    For these U and V no other choice of columns leaves a smaller Frobenius error.
    """
    left, right = truncated_svd(weight, rank)
    residual = weight.double() - left @ right
    order = torch.linalg.vector_norm(residual, dim=0).argsort(descending=True, stable=True)
    columns = order[:num_columns].sort().values
    return Factors(left, right, columns, residual[:, columns])


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, r) and V (r, in) in float64, whose product is the best approximation of that rank.

    The leading singular vectors are eigenvectors of the smaller Gram matrix: several times faster than an
    SVD, and in float64 as exact as weights of lower precision can tell.
    """
    wide = weight.double()
    if wide.shape[0] <= wide.shape[1]:
        vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]  # eigenvalues ascend
        return vectors, vectors.T @ wide
    vectors = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -rank:]
    return wide @ vectors, vectors.T
