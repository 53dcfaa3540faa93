"""The arithmetic of merging against numpy in float64, and the cache of merged layers."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from moe_evo.models import merging
from moe_evo.models.merged_cache import MergedCache, MergedTensors, merged_key
from moe_evo.models.merging import copied_experts, is_selection, mix_rows


def random_matrix(num_kept: int = 3, num_experts: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_kept, num_experts)).astype(np.float32)


@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 3, 4), (5, 6, 2, 3)])
@pytest.mark.parametrize("chunk_elements", [1, 7, 1 << 20])
def test_mix_rows_equals_the_sum_in_float64(
    shape: tuple[int, ...], chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merging._CHUNK_ELEMENTS, "cpu", chunk_elements)
    stacked, matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)), random_matrix()
    expected = np.tensordot(matrix.astype(np.float64), stacked.double().numpy(), axes=1)
    mixed = mix_rows(matrix, stacked)
    assert mixed.shape == (3, *shape[1:]) and mixed.dtype == torch.float32
    assert np.abs(mixed.numpy() - expected).max() < 1e-6


def test_one_hot_rows_are_exact_copies_and_zero_rows_are_zero() -> None:
    matrix = random_matrix(4)
    matrix[1] = [0, 0, 0, 1, 0]
    matrix[3] = 0
    stacked = torch.randn(5, 6).to(torch.bfloat16)
    mixed = mix_rows(matrix, stacked)
    assert torch.equal(mixed[1], stacked[3])
    assert not mixed[3].any()
    assert copied_experts(matrix) == (None, 3, None, None)
    assert is_selection(np.eye(5, dtype=np.float32)[[4, 4, 0]])
    assert not mix_rows(np.zeros((1, 5), dtype=np.float32), stacked).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_kept", "num_experts", "width"),
    [(4, 8, 70_000), (32, 64, 9_001), (9, 60, 5), (9, 60, 11), (8, 64, 17), (3, 5, 1), (5, 600, 300)],
)
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_the_bits_of_a_row_do_not_depend_on_the_rows_that_it_is_mixed_with(
    num_kept: int, num_experts: int, width: int, density: float, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(0)
    matrix = random_matrix(num_kept, num_experts) * (rng.random((num_kept, num_experts)) < density).astype(np.float32)
    stacked = torch.randn((num_experts, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    together = mix_rows(matrix, stacked)
    for row in range(num_kept):
        assert torch.equal(mix_rows(matrix[[row]], stacked)[0], together[row])
    for _ in range(5):
        some = rng.permutation(num_kept)[: rng.integers(1, num_kept + 1)]
        assert torch.equal(mix_rows(matrix[some], stacked), together[torch.from_numpy(some)])


def test_an_expert_that_no_row_mixes_may_be_broken() -> None:
    stacked, matrix = torch.randn(5, 7), random_matrix()
    matrix[:, 2] = 0
    stacked[2] = torch.inf
    assert mix_rows(matrix, stacked).isfinite().all()


def test_low_precision_is_accumulated_in_float32() -> None:
    stacked = torch.full((256, 1), 1.0, dtype=torch.bfloat16)
    stacked[0] = 256.0
    mixed = mix_rows(np.ones((1, 256), dtype=np.float32), stacked)
    assert float(mixed) == 512.0  # bfloat16 additions would stay at 256


def test_the_stacked_tensor_is_not_changed() -> None:
    stacked = torch.randn(5, 6)
    before = stacked.clone()
    mix_rows(np.eye(5, dtype=np.float32)[:2], stacked).zero_()
    mix_rows(random_matrix(), stacked)
    assert torch.equal(stacked, before)


def entry(kib: int) -> MergedTensors:
    return {"down_proj": torch.zeros(kib * 256)}


def refuse(into: MergedTensors) -> MergedTensors:
    raise AssertionError("built although it is kept")


def test_cache_throws_out_the_least_recently_used() -> None:
    cache = MergedCache(budget_gib=3 / 2**20)
    for layer in range(3):
        cache.get((layer, "a"), 1 * 1024, lambda _: entry(1))
    cache.get((0, "a"), 1024, refuse)
    cache.get((3, "a"), 1 * 1024, lambda _: entry(1))
    assert (len(cache), cache.size_bytes) == (3, 3 * 1024)
    cache.get((0, "a"), 1024, refuse)
    with pytest.raises(AssertionError, match="built although"):
        cache.get((1, "a"), 1024, refuse)


def test_layers_in_use_are_never_thrown_out_for_one_another() -> None:
    cache = MergedCache(budget_gib=2 / 2**20)
    cache.get((9, "old"), 1 * 1024, lambda _: entry(1))
    cache.use([(layer, "a") for layer in range(4)])
    for layer in range(4):
        cache.get((layer, "a"), 1 * 1024, lambda _: entry(1))
    for layer in range(2):
        cache.get((layer, "a"), 1024, refuse)
    assert len(cache) == 2
    cache.get((0, "too large"), 9 * 1024, lambda _: entry(9))
    assert len(cache) == 2


def test_what_comes_may_be_written_where_something_of_its_size_went() -> None:
    cache, given = MergedCache(budget_gib=2 / 2**20), []

    def build(into: MergedTensors) -> MergedTensors:
        given.append((cache.size_bytes, into))
        return into or entry(1)

    first, second, third = (cache.get((layer, "a"), 1024, build) for layer in range(3))
    assert [size for size, _ in given] == [0, 1024, 1024]
    assert given[0][1] == given[1][1] == {} and third is first is not second
    cache.get((3, "half"), 512, lambda into: given.append((0, into)) or {"down_proj": torch.zeros(128)})
    cache.get((4, "too large"), 4096, lambda into: given.append((0, into)) or entry(4))
    assert given[3][1] == given[4][1] == {}


def test_what_went_does_not_stay_while_something_of_another_size_is_built() -> None:
    cache = MergedCache(budget_gib=2 / 2**20)
    cache.get((0, "a"), 1024, lambda _: entry(1))
    went = weakref.ref(cache.get((0, "a"), 1024, refuse)["down_proj"])
    stayed: list[bool] = []

    def build(into: MergedTensors) -> MergedTensors:
        stayed.append(went() is not None)
        return into or entry(2)

    cache.get((1, "a"), 2048, build)
    assert stayed == [False]


def test_rows_are_written_over_what_stood_there() -> None:
    matrix, stacked = random_matrix(4), torch.randn(5, 3, 7)
    matrix[0], matrix[1] = 0, np.eye(5, dtype=np.float32)[2]
    out = torch.full((4, 3, 7), torch.nan)
    assert mix_rows(matrix, stacked, out=out) is out
    assert torch.equal(out, mix_rows(matrix, stacked))


def test_keys_tell_layers_shapes_and_values_apart() -> None:
    matrix = random_matrix()
    keys = {merged_key(0, matrix), merged_key(1, matrix), merged_key(0, 2 * matrix), merged_key(0, matrix.T)}
    assert len(keys) == 4
    assert merged_key(0, matrix) == merged_key(0, matrix.copy())
