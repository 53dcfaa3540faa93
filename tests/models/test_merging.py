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


def test_known_rows_are_copied_and_only_the_others_are_mixed() -> None:
    matrix, stacked = random_matrix(20), torch.randn(5, 3, 7)
    earlier = mix_rows(matrix, stacked)
    child = matrix[::-1].copy()
    child[[4, 11]] += 1
    known = {slot: (earlier, 19 - slot) for slot in range(20) if slot not in (4, 11)}
    assert torch.equal(mix_rows(child, stacked, known), mix_rows(child, stacked))
    broken = mix_rows(child, torch.full_like(stacked, torch.nan), known)
    assert [slot for slot, row in enumerate(broken) if row.isnan().all()] == [4, 11]


def test_known_rows_are_copied_where_that_saves_a_multiplication_or_rows_are_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, broken = random_matrix(20), torch.full((5, 7), torch.nan)
    earlier = mix_rows(matrix, torch.randn(5, 7))

    def num_copied(num_known: int, num_rows: int) -> int:
        known = {slot: (earlier, slot) for slot in range(num_known)}
        mixed = mix_rows(matrix[:num_rows], broken, known)
        return sum(torch.equal(*pair) for pair in zip(mixed, earlier, strict=False))

    asked = [(4, 4), (3, 4), (4, 20), (3, 20), (20, 20)]
    assert [num_copied(*one) for one in asked] == [4, 0, 4, 0, 20]
    monkeypatch.setattr(merging, "_LONG_ROW", 7)
    assert [num_copied(*one) for one in asked] == [4, 3, 4, 3, 20]


def test_known_rows_are_mixed_again_where_their_bits_depend_on_the_others() -> None:
    stacked = torch.empty((5, 7), device="meta")
    assert mix_rows(random_matrix(), stacked, {}).shape == mix_rows(random_matrix(), stacked, {0: None}).shape


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


def kept(cache: MergedCache, layer: int, matrix: np.ndarray) -> MergedTensors:
    """What `cache` gives for a layer merged by `matrix`: 4 KiB a row."""
    return cache.get(
        merged_key(layer, matrix), len(matrix) * 4096, lambda _: {"down_proj": torch.zeros(len(matrix), 1024)}
    )


def test_rows_are_found_in_kept_layers_of_the_same_number() -> None:
    first, second = random_matrix(3, seed=0), random_matrix(4, seed=1)
    cache = MergedCache(1)
    of_first, of_second = kept(cache, 0, first), kept(cache, 0, second)
    kept(cache, 1, random_matrix(3, seed=2))
    child = np.stack([second[3], first[0], first[1] + 1, second[3]])
    known = cache.known_rows(merged_key(0, child))
    assert {slot: number for slot, (_, number) in known.items()} == {0: 3, 1: 0, 3: 3}
    assert known[0][0] is of_second and known[1][0] is of_first
    assert cache.known_rows(merged_key(1, child)) == {}
    cache.clear()
    assert cache.known_rows(merged_key(0, child)) == {}


def test_rows_go_with_the_layer_that_has_them() -> None:
    matrices = [random_matrix(2, seed=seed) for seed in range(4)]
    matrices[2][0] = matrices[1][0]
    keys = [merged_key(0, matrix) for matrix in matrices]
    cache = MergedCache(budget_gib=3 * 8 / 2**20)
    for matrix in matrices[:3]:
        kept(cache, 0, matrix)
    assert [len(cache.known_rows(key)) for key in keys] == [2, 2, 2, 0]
    kept(cache, 0, matrices[3])
    assert [len(cache.known_rows(key)) for key in keys] == [0, 2, 2, 2]
    kept(cache, 1, matrices[0])
    newest = kept(cache, 0, matrices[2])
    assert [len(cache.known_rows(key)) for key in keys] == [0, 1, 2, 2]
    assert cache.known_rows(keys[1])[0][0] is newest
    kept(cache, 0, np.repeat(matrices[1][:1], 6, axis=0))  # all else goes
    assert (len(cache), [len(cache.known_rows(key)) for key in keys]) == (1, [0, 1, 1, 0])


def test_layers_that_share_rows_go_in_any_order() -> None:
    older, newer = random_matrix(2, seed=0), random_matrix(2, seed=1)
    newer[0] = older[0]
    cache = MergedCache(budget_gib=2 * 8 / 2**20)
    for matrix in (older, newer, older):
        kept(cache, 0, matrix)
    for layer in (1, 2):
        kept(cache, layer, older)
    assert cache.known_rows(merged_key(0, older)) == cache.known_rows(merged_key(0, newer)) == {}


def test_layer_that_does_not_fit_is_not_where_rows_are_found() -> None:
    cache, matrix = MergedCache(0), random_matrix()
    kept(cache, 0, matrix)
    assert cache.known_rows(merged_key(0, matrix)) == {}
