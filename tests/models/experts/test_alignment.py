"""Neurons in another order: what stays, what is found again, and what a file of it must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import CONFIGS, largest_difference, logits, random_merge, random_pruning, tiny_model, tokens

from moe_evo.config.model import ModelConfig
from moe_evo.criteria.grouping import Group
from moe_evo.criteria.merges import merged_layer
from moe_evo.errors import ConfigError, ModelError
from moe_evo.genomes.genome import Genome
from moe_evo.models.experts.alignment import align_neurons, alignment_of
from moe_evo.models.experts.alignment_file import Alignment, load_alignment, save_alignment
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel


def view(family):
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    return MoEModel(model)


def num_neurons(layer):
    down = layer.expert_tensors()["down_proj"]
    return down.shape[1] if layer.experts.is_transposed else down.shape[2]


def random_permutations(moe, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        np.stack([rng.permutation(num_neurons(layer)) for _ in range(layer.num_experts)]).astype(np.int32)
        for layer in moe.layers
    )


def tensors_of(moe):
    return [{name: one.clone() for name, one in layer.expert_tensors().items()} for layer in moe.layers]


def halves(moe):
    """Each layer's experts in two groups, led by the experts 1 and 6, with unequal weights."""
    groups = [Group(1, (0, 1, 2, 3)), Group(6, (4, 5, 6, 7))]
    weights = np.array([1.0, 4, 2, 3, 1, 2, 5, 2])
    return Genome(tuple(merged_layer(groups, weights, 2) for _ in moe.layers))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_permuting_neurons_changes_the_weights_and_no_logits(family):
    moe = view(family)
    expected, before = logits(moe.language_model, tokens()), tensors_of(moe)
    align_neurons(moe, random_permutations(moe))
    assert largest_difference(logits(moe.language_model, tokens()), expected) < 1e-12
    for old, new in zip(before, tensors_of(moe), strict=True):
        for name, tensor in old.items():
            assert torch.equal(tensor, new[name]) == (name == "down_proj_bias"), name


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_alignment_for_a_merge_changes_no_logits_of_the_model_but_those_of_the_merge(family):
    moe = view(family)
    genome = halves(moe)
    if moe.shape.num_expert_groups > 1:
        genome = random_merge(moe.shape, 4)
    full = logits(moe.language_model, tokens())
    with moe.applied(genome):
        merged = logits(moe.language_model, tokens())
    align_neurons(moe, alignment_of(moe, genome))
    assert largest_difference(logits(moe.language_model, tokens()), full) < 1e-12
    with moe.applied(genome):  # also where merged layers were kept from before
        assert largest_difference(logits(moe.language_model, tokens()), merged) > 1e-6


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_alignment_of_permuted_copies_finds_the_permutations_back(family):
    moe = view(family)
    genome = halves(moe)
    for layer in moe.layers:
        for tensor in layer.expert_tensors().values():
            tensor[:4] = tensor[1].clone()
            tensor[4:] = tensor[6].clone()
    originals, permutations = tensors_of(moe), random_permutations(moe)
    align_neurons(moe, permutations)
    found = alignment_of(moe, genome)
    for orders, made in zip(found, permutations, strict=True):
        for expert in range(8):
            leader = 1 if expert < 4 else 6
            assert np.array_equal(made[expert][orders[expert]], made[leader])
        assert np.array_equal(orders[[1, 6]], np.tile(np.arange(orders.shape[1]), (2, 1)))
    align_neurons(moe, found)
    align_neurons(moe, tuple(np.argsort(made[[1] * 4 + [6] * 4], axis=1).astype(np.int32) for made in permutations))
    for layer, gene, original in zip(moe.layers, genome.layers, originals, strict=True):
        for name, tensor in layer.expert_tensors().items():
            assert torch.equal(tensor, original[name])
        for name, tensor in layer.merged_tensors(gene.expert_merging).items():
            torch.testing.assert_close(tensor, original[name][[1, 6]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_aligned_experts_match_as_well_as_any_order_can(family):
    moe = view(family)
    genome = halves(moe)

    def products():
        found = []
        for layer in moe.layers:
            tensors = [one.reshape(8, -1) for name, one in layer.expert_tensors().items() if name != "down_proj_bias"]
            flat = torch.cat(tensors, dim=1)
            found.append([float(flat[expert] @ flat[1 if expert < 4 else 6]) for expert in range(8)])
        return np.array(found)

    align_neurons(moe, alignment_of(moe, genome))
    best = products()
    for seed in range(20):
        orders = [one.copy() for one in random_permutations(moe, seed)]
        for one in orders:
            one[[1, 6]] = np.arange(one.shape[1])
        align_neurons(moe, tuple(orders))
        assert (products() <= best + 1e-9).all()
        align_neurons(moe, tuple(np.argsort(one, axis=1).astype(np.int32) for one in orders))
    np.testing.assert_allclose(products(), best)


def test_prunings_align_nothing():
    moe = view("mixtral")
    for orders in alignment_of(moe, random_pruning(moe.shape, 4)):
        assert np.array_equal(orders, np.tile(np.arange(24), (8, 1)))


def test_an_aligned_merge_is_exported_as_it_was_evaluated(tmp_path):
    moe = load_model(ModelSource(ModelConfig(path=saved(tmp_path), device="cpu", self_check=False)))
    genome = halves(moe)
    align_neurons(moe, alignment_of(moe, genome))
    report = export_checkpoint(moe, genome, tmp_path / "small", provenance={})
    assert report.max_logit_difference == 0 and report.bytes_after < report.bytes_before


def saved(folder, family="mixtral", **changes):
    tiny_model(family, **changes).save_pretrained(folder / family)
    return str(folder / family)


@pytest.fixture
def aligned(tmp_path):
    """A config, the genome, the model aligned in memory, and the file of its alignment."""
    config = ModelConfig(path=saved(tmp_path), device="cpu")
    moe = load_model(ModelSource(config))
    genome = halves(moe)
    permutations = alignment_of(moe, genome)
    align_neurons(moe, permutations)
    file = tmp_path / "alignment.safetensors"
    save_alignment(file, Alignment(ModelSource(config).hash, permutations))
    return config, genome, moe, file


def test_a_merge_with_an_alignment_at_load_equals_one_aligned_in_memory_bit_for_bit(aligned):
    config, genome, moe, file = aligned
    loaded = load_model(ModelSource(ModelConfig(path=config.path, device="cpu", alignment=str(file))))
    plain = load_model(ModelSource(config))
    found = []
    for one in (moe, loaded, plain):
        with one.applied(genome):
            found.append(logits(one.language_model, tokens()))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_another_alignment_is_another_model(aligned):
    config, _, moe, file = aligned
    other = file.with_name("other.safetensors")
    save_alignment(other, Alignment(ModelSource(config).hash, random_permutations(moe)))
    hashes = {
        ModelSource(ModelConfig(path=config.path, alignment=one and str(one))).hash for one in (None, file, other)
    }
    assert len(hashes) == 3


def test_an_alignment_survives_its_file(aligned):
    config, genome, _, file = aligned
    known_as = ModelSource(config).hash
    plain = load_model(ModelSource(config))
    expected = alignment_of(plain, genome)
    found = load_alignment(file, known_as)
    assert found.model_hash == known_as and found.digest == Alignment(known_as, expected).digest
    assert all(map(np.array_equal, found.permutations, expected))
    assert [one.dtype for one in found.permutations] == [np.int32] * 3


def refusal(function, *arguments):
    with pytest.raises(ModelError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_alignment_of_this_model_are_refused_in_one_line(aligned, tmp_path):
    config, _, _, file = aligned
    known_as = ModelSource(config).hash
    assert "cannot be read" in refusal(load_alignment, tmp_path / "none", known_as)
    assert "alignment of the model " in refusal(load_alignment, file, "another")
    (tmp_path / "text").write_text("hello, this is a text that is no file of tensors")
    assert "not a safetensors file" in refusal(load_alignment, tmp_path / "text", known_as)
    tensors, path = load_file(file), tmp_path / "changed.safetensors"
    good = {"format": "moe_evo.alignment", "version": "1", "model_hash": known_as}
    save_file(tensors, path, {**good, "format": "other"})
    assert "without an alignment of moe_evo" in refusal(load_alignment, path, known_as)
    save_file(tensors, path, {**good, "version": "2"})
    assert "alignment of version 2, this moe_evo reads 1" in refusal(load_alignment, path, known_as)
    for changed in (
        {"layers.0": tensors["layers.0"], "layers.2": tensors["layers.2"]},
        {**tensors, "layers.1": np.zeros((8, 24), np.int32)},
        {**tensors, "layers.1": np.arange(24, dtype=np.int32)},
        {**tensors, "layers.1": tensors["layers.1"].astype(np.float32)},
    ):
        save_file(changed, path, good)
        assert "damaged" in refusal(load_alignment, path, known_as)


def test_an_alignment_of_another_shape_is_refused_before_anything_is_changed(aligned, tmp_path):
    config, _, moe, _ = aligned
    before = tensors_of(moe)
    told = refusal(align_neurons, moe, random_permutations(moe)[:2])
    assert "of 2 MoE layers of (experts, neurons) (8, 24), the model has 3 of (8, 24)" in told
    wider = tuple(np.tile(np.arange(25, dtype=np.int32), (8, 1)) for _ in range(3))
    assert "(8, 25), the model has 3 of (8, 24)" in refusal(align_neurons, moe, wider)
    for old, new in zip(before, tensors_of(moe), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    save_alignment(tmp_path / "wide.safetensors", Alignment(ModelSource(config).hash, wider))
    wide = ModelConfig(path=config.path, device="cpu", self_check=False, alignment=str(tmp_path / "wide.safetensors"))
    assert "(8, 25), the model has 3 of (8, 24)" in refusal(load_model, ModelSource(wide))


def test_experts_that_are_elsewhere_are_refused_in_one_line():
    for sharding in ("device_map", "tensor_parallel", "zero3"):
        with pytest.raises(
            ConfigError, match=r"model\.alignment: got 'some', expected none: only model\.sharding single"
        ):
            ModelConfig(sharding=sharding, alignment="some")
    moe = view("mixtral")
    genome = halves(moe)
    moe.layers[1].experts.to("meta")
    assert "experts of MoE layer 1 are not whole in this process" in refusal(alignment_of, moe, genome)
