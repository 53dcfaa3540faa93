"""Factors and columns: the best of their rank, exact where nothing is left out, counted as real arrays."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from moe_evo.models.compress.low_rank import LowRankPlusColumns, factorised, truncated_svd


def matrix(out: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_product_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    weight = matrix(*shape)
    left, right = truncated_svd(weight, rank)
    assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
    vectors, values, others = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    expected = vectors[:, :rank] * values[:rank] @ others[:rank]
    np.testing.assert_allclose((left @ right).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
@pytest.mark.parametrize(("rank", "columns"), [(9, 0.0), (1.0, 0.0), (2, 1.0), (0.5, 1.0)])
def test_full_rank_or_all_columns_are_the_matrix_itself(
    shape: tuple[int, int], rank: int | float, columns: float
) -> None:
    weight = matrix(*shape)
    new = LowRankPlusColumns(rank, columns).compressed(weight, None)
    assert new.dtype == weight.dtype
    torch.testing.assert_close(new, weight, rtol=1e-6, atol=1e-6)


def test_no_other_columns_leave_a_smaller_error() -> None:
    weight = matrix(6, 8).double()
    found = factorised(weight, 2, 3)
    error = torch.linalg.vector_norm(found.dense() - weight)
    residual = weight - found.left @ found.right
    for chosen in combinations(range(8), 3):
        rest = [column for column in range(8) if column not in chosen]
        assert error <= torch.linalg.vector_norm(residual[:, rest]) + 1e-12


def test_a_matrix_of_low_rank_needs_no_columns() -> None:
    weight = matrix(10, 3) @ matrix(3, 12, seed=1)
    new = LowRankPlusColumns(3, 0.0).compressed(weight, None)
    torch.testing.assert_close(new, weight, rtol=1e-5, atol=1e-5)


def test_kept_columns_are_those_of_the_matrix() -> None:
    weight = matrix(6, 10)
    found = factorised(weight, 2, 4)
    assert found.columns.tolist() == sorted(set(found.columns.tolist())) and len(found.columns) == 4
    torch.testing.assert_close(found.dense()[:, found.columns].float(), weight[:, found.columns])


@pytest.mark.parametrize(("rank", "of"), [(3, 3), (0.25, 4), (1.0, 16), (0.001, 1)])
def test_a_rank_is_a_number_or_a_share_of_the_full_rank(rank: int | float, of: int) -> None:
    assert LowRankPlusColumns(rank, 0.1).rank_of(24, 16) == LowRankPlusColumns(rank, 0.1).rank_of(16, 24) == of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_bytes_are_those_of_real_arrays(dtype: torch.dtype) -> None:
    compression = LowRankPlusColumns(3, 0.25)
    weight = matrix(10, 16).to(dtype)
    found = compression.factors(weight)
    stored = [tensor.to(dtype) for tensor in (found.left, found.right, found.values)] + [found.columns.int()]
    packed = compression.packed_bytes(compression.compressed(weight, None))
    assert packed == {"factors and columns": sum(tensor.nbytes for tensor in stored)}
