"""Sparse matrices: exactly so many zeros, in the right places, and counted as real arrays would be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_evo.errors import ConfigError
from moe_evo.models.compress.sparsity import (
    Pattern,
    RouterWeightedPruning,
    best_of_rows,
    bitmask_bytes,
    importance,
    num_zeros,
    pattern_bytes,
)


def matrix(out: int = 6, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator), torch.rand(width, generator=generator).double() + 0.01


@pytest.mark.parametrize(("sparsity", "width", "zeros"), [(0.5, 16, 8), (0.5, 7, 4), (0.25, 8, 2), (0.9, 10, 9)])
def test_every_row_has_exactly_its_share_of_zeros(sparsity: float, width: int, zeros: int) -> None:
    weight, norms = matrix(width=width)
    new = RouterWeightedPruning(sparsity).compressed(weight, norms)
    assert num_zeros(sparsity, width) == zeros
    assert ((new == 0).sum(dim=1) == zeros).all()
    assert torch.equal(new[new != 0], weight[new != 0]) and new.dtype == weight.dtype


def test_a_row_is_never_all_zero() -> None:
    weight, norms = matrix(width=8)
    new = RouterWeightedPruning(0.99).compressed(weight, norms)
    assert ((new != 0).sum(dim=1) == 1).all()


def test_weights_compete_within_their_row_by_size_times_input_norm() -> None:
    weight, norms = matrix()
    weight[0] *= 1000  # would win everything if rows competed with each other
    new = RouterWeightedPruning(0.5).compressed(weight, norms)
    for row, kept in zip(weight.tolist(), new.tolist(), strict=True):
        scores = [abs(value) * norm for value, norm in zip(row, norms.tolist(), strict=True)]
        best = sorted(range(len(row)), key=lambda place: -scores[place])[:8]
        assert [place for place, value in enumerate(kept) if value] == sorted(best)


@pytest.mark.parametrize(("text", "kept", "group"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
def test_exactly_n_of_every_m_consecutive_weights_stay_and_they_are_the_best(text: str, kept: int, group: int) -> None:
    weight, norms = matrix()
    pruning = RouterWeightedPruning(1 - kept / group, Pattern.parse(text))
    new = pruning.compressed(weight, norms).reshape(-1, group)
    assert ((new != 0).sum(dim=1) == kept).all()
    scores = (weight.abs() * norms).reshape(-1, group)
    lowest_kept = torch.where(new != 0, scores, torch.inf).min(dim=1).values
    assert (torch.where(new == 0, scores, 0).max(dim=1).values <= lowest_kept).all()


def test_the_first_wins_a_tie_and_no_more_than_asked_for_stay() -> None:
    assert best_of_rows(torch.ones(2, 5), 2).tolist() == [[True, True, False, False, False]] * 2


def test_an_expert_that_saw_no_token_is_judged_by_size_alone() -> None:
    weight, norms = matrix()
    assert torch.equal(importance(weight, torch.zeros_like(norms)), weight.double().abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_bytes_are_those_of_real_arrays(dtype: torch.dtype) -> None:
    weight, norms = matrix(out=5, width=12)
    pruning = RouterWeightedPruning(0.5, Pattern(2, 4))
    new = pruning.compressed(weight.to(dtype), norms)
    values, mask = new[new != 0], (new != 0).numpy()
    places = np.nonzero(mask.reshape(-1, 4))[1].astype(np.uint8)
    bits = np.unpackbits(places[:, None], axis=1)[:, -2:]  # two bits each
    packed = pruning.packed_bytes(new)
    assert packed["values and bitmask"] == values.nbytes + np.packbits(mask).nbytes
    assert packed["2:4 (values and 2-bit indices)"] == values.nbytes + np.packbits(bits).nbytes
    assert bitmask_bytes(30, 60, 4) == 128 and pattern_bytes(Pattern(2, 4), 60, 4) == 128
    assert list(RouterWeightedPruning(0.5).packed_bytes(new)) == ["values and bitmask"]


@pytest.mark.parametrize("text", ["2", "4:4", "0:4", "5:4", "a:b", "2:4:8", "-1:4", ""])
def test_a_pattern_that_is_none_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--pattern: got .* expected N:M with 0 < N < M, such as 2:4$"):
        Pattern.parse(text)
