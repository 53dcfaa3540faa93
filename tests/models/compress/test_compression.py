"""Compressing the experts of every family: which matrices they are, what changes, and what does not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import logits, tiny_model, tokens

from moe_evo.models.compress.compression import InputNorms, compressed_experts, experts_replaced, relative_error
from moe_evo.models.compress.low_rank import LowRankPlusColumns
from moe_evo.models.compress.sparsity import Pattern, RouterWeightedPruning
from moe_evo.models.experts.matrices import expert_matrices, intermediate
from moe_evo.models.view import MoEModel

LOW_RANK = LowRankPlusColumns(3, 0.2)


def norms_of(moe: MoEModel, *, idle: int | None = None) -> list[InputNorms]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for layer in moe.layers:
        num_experts, hidden, inner = expert_matrices(layer.experts, layer.expert_tensors())["down"].shape
        sizes = ((num_experts,), (num_experts, hidden), (num_experts, inner))
        norms = [torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in sizes]
        if idle is not None:
            for one in norms:
                one[idle] = 0
        found.append(InputNorms(*norms))
    return found


def test_matrices_and_the_librarys_gate_are_what_the_experts_compute(moe: MoEModel) -> None:
    hidden = torch.randn(5, moe.language_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer in moe.layers:
        down = expert_matrices(layer.experts, layer.expert_tensors())["down"]
        for expert in (0, 5):
            answer = intermediate(layer.experts, expert, hidden) @ down[expert].T
            if "down_proj_bias" in layer.expert_tensors():
                answer = answer + layer.experts.down_proj_bias[expert]
            index, one = torch.full((5, 1), expert), torch.ones(5, 1)
            torch.testing.assert_close(answer, layer.experts(hidden, index, one), rtol=1e-5, atol=1e-6)


def test_gate_and_up_are_told_apart(moe: MoEModel) -> None:
    language_model = tiny_model(moe.shape.family)
    layer = MoEModel(language_model).layers[0]
    tensors = layer.expert_tensors()
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.data.zero_()
    hidden = torch.randn(4, language_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    matrices = expert_matrices(layer.experts, tensors)
    assert matrices["gate"].shape == matrices["up"].shape == matrices["down"].mT.shape
    entering = hidden @ matrices["gate"][0].T, hidden @ matrices["up"][0].T
    module = layer.experts
    if moe.shape.family == "gpt_oss":
        limited = entering[0].clamp(max=module.limit), entering[1].clamp(-module.limit, module.limit)
        expected = (limited[1] + 1) * limited[0] * torch.sigmoid(module.alpha * limited[0])
    else:
        expected = torch.nn.functional.silu(entering[0]) * entering[1]
    torch.testing.assert_close(intermediate(module, 0, hidden), expected)
    with torch.no_grad():
        matrices["gate"].zero_()
    assert not intermediate(module, 0, hidden).any()  # it is a view: what is written to it is written to the expert


def test_exchanging_gate_and_up_exchanges_what_becomes_of_them(moe: MoEModel) -> None:
    exchanged = MoEModel(tiny_model(moe.shape.family))
    for layer in exchanged.layers:
        matrices = expert_matrices(layer.experts, layer.expert_tensors())
        gate = matrices["gate"].clone()
        matrices["gate"].copy_(matrices["up"])
        matrices["up"].copy_(gate)
    plain = compressed_experts(MoEModel(tiny_model(moe.shape.family)), LOW_RANK, None)
    other = compressed_experts(exchanged, LOW_RANK, None)
    for layer, one, two in zip(exchanged.layers, plain.layers, other.layers, strict=True):
        first, second = expert_matrices(layer.experts, one), expert_matrices(layer.experts, two)
        for name, partner in (("gate", "up"), ("up", "gate"), ("down", "down")):
            assert torch.equal(first[name], second[partner])
        ranks = torch.linalg.matrix_rank(expert_matrices(layer.experts, plain_low_rank(layer, 3))["gate"], rtol=1e-4)
        assert (ranks == 3).all()


def plain_low_rank(layer: object, rank: int) -> dict[str, torch.Tensor]:
    """The experts' tensors of one layer with every matrix of `rank`, by numpy."""
    stacked = {name: tensor.clone() for name, tensor in layer.expert_tensors().items()}  # type: ignore[attr-defined]
    for matrices in expert_matrices(layer.experts, stacked).values():  # type: ignore[attr-defined]
        vectors, values, others = np.linalg.svd(matrices.double().numpy(), full_matrices=False)
        product = vectors[:, :, :rank] * values[:, None, :rank] @ others[:, :rank]
        matrices.copy_(torch.from_numpy(product))
    return stacked


def test_each_matrix_of_each_expert_is_its_own_truncated_svd(moe: MoEModel) -> None:
    done = compressed_experts(moe, LowRankPlusColumns(3, 0.0), None)
    for layer, stacked in zip(moe.layers, done.layers, strict=True):
        for name, expected in plain_low_rank(layer, 3).items():
            torch.testing.assert_close(stacked[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_every_output_row_is_half_zero_in_every_family(moe: MoEModel, pattern: Pattern | None) -> None:
    done = compressed_experts(moe, RouterWeightedPruning(0.5, pattern), norms_of(moe))
    for layer, stacked in zip(moe.layers, done.layers, strict=True):
        for matrices in expert_matrices(layer.experts, stacked).values():
            groups = matrices.reshape(*matrices.shape[:2], -1, 4 if pattern else matrices.shape[-1])
            assert ((groups == 0).sum(dim=-1) == groups.shape[-1] // 2).all()
    assert done.size.num_nonzero * 2 == done.size.num_weights


def test_biases_shapes_and_the_model_itself_stay(moe: MoEModel) -> None:
    untouched = logits(moe.language_model, tokens())
    for compression, norms in ((LOW_RANK, None), (RouterWeightedPruning(0.5), norms_of(moe))):
        done = compressed_experts(moe, compression, norms)
        for layer, stacked in zip(moe.layers, done.layers, strict=True):
            for name, tensor in layer.expert_tensors().items():
                assert stacked[name].shape == tensor.shape and stacked[name].dtype == tensor.dtype
                assert torch.equal(stacked[name], tensor) == name.endswith("bias")
    assert torch.equal(logits(moe.language_model, tokens()), untouched)


def test_the_model_computes_with_other_experts_until_the_block_is_left(moe: MoEModel) -> None:
    untouched = logits(moe.language_model, tokens())
    done = compressed_experts(moe, LOW_RANK, None)
    with pytest.raises(KeyError), experts_replaced(moe, done.layers):
        inside = logits(moe.language_model, tokens())
        raise KeyError
    assert torch.equal(logits(moe.language_model, tokens()), untouched)
    by_hand = copy.deepcopy(moe.language_model)
    for layer, stacked in zip(MoEModel(by_hand).layers, done.layers, strict=True):
        for name, tensor in layer.expert_tensors().items():
            tensor.copy_(stacked[name])
    assert torch.equal(logits(by_hand, tokens()), inside) and not torch.equal(inside, untouched)


def test_changes_are_relative_frobenius_norms_and_their_mean(mixtral: MoEModel) -> None:
    norms = norms_of(mixtral, idle=2)
    done = compressed_experts(mixtral, RouterWeightedPruning(0.5), norms)
    for layer, stacked, change, of_layer in zip(mixtral.layers, done.layers, done.changes, norms, strict=True):
        plain, weighted = [], []
        old, new = (expert_matrices(layer.experts, one) for one in (layer.expert_tensors(), stacked))
        for name in old:
            factors = (of_layer.inner if name == "down" else of_layer.hidden).numpy()
            for expert in range(8):
                one, two = (x[name][expert].double().numpy() for x in (old, new))
                plain.append(np.linalg.norm(two - one) / np.linalg.norm(one))
                if expert != 2:
                    weighted.append(
                        np.linalg.norm((two - one) * factors[expert]) / np.linalg.norm(one * factors[expert])
                    )
        np.testing.assert_allclose(change.relative_error, np.mean(plain))
        np.testing.assert_allclose(change.weighted_error, np.mean(weighted))
        assert change.num_idle == 1
    assert compressed_experts(mixtral, LOW_RANK, None).changes[0].weighted_error is None


def test_a_matrix_of_zeros_that_stays_has_no_error() -> None:
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_sizes_are_counted_over_all_matrices(mixtral: MoEModel) -> None:
    done = compressed_experts(mixtral, RouterWeightedPruning(0.5, Pattern(2, 4)), norms_of(mixtral))
    number = sum(tensor.numel() for layer in mixtral.layers for tensor in layer.expert_tensors().values())
    assert done.size.num_weights == number and done.size.dense_bytes == 4 * number
    assert done.size.packed_bytes == {
        "values and bitmask": number // 2 * 4 + number // 8,
        "2:4 (values and 2-bit indices)": number // 2 * 4 + number // 2 * 2 // 8,
    }
