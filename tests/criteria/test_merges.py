"""Every merge of several families against loops over tokens, experts and pairs; what any merge must leave alone."""

from __future__ import annotations

import brute_force_merges as oracle
import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from asking import gang_evaluators, observer_of, spoilt_padding, write_gang_files
from process_groups import run_gang
from tiny_models import CONFIGS, EXPERT_FIELDS, tiny_model

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.criteria.grouping import Group
from moe_evo.criteria.merges import MERGES, merged_layer
from moe_evo.criteria.questions import AllOutputs, RouterLogits
from moe_evo.criteria.sums import LayerLogits, LayerObservation, Observation
from moe_evo.errors import ConfigError, ModelError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.models.experts.alignment import align_neurons, alignment_of
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.load import load_model
from moe_evo.models.ranks import ALONE
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
PROMPTS = [" ".join(WORDS[n % 4 : n % 4 + 1 + (3 * n) % 7]) + (f" {n}" if n % 3 else "") for n in range(12)]
ROWS = [{"prompt": prompt, "choices": [" yes", " no no"], "label": 0} for prompt in PROMPTS]
FAMILIES = ("mixtral", "olmoe", "deepseek_v3", "gpt_oss")


def view(family):
    changes = {"norm_topk_prob": False} if family == "olmoe" else {}
    model = tiny_model(family, vocab_size=350, **changes).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    return MoEModel(model, tiny.tiny_tokenizer(bos=True))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """An evaluator of a view in float64, whose batches are padded, and what loops find on its prompts."""
    moe = view(request.param)
    task = tiny.make_task(tmp_path_factory.mktemp(request.param), ROWS, moe.tokenizer, batch_tokens=128)
    counts = torch.cat([one.counts.reshape(-1) for one in task.prompt_batches("search", trees=moe.reads_trees)])
    assert (counts == 0).any() and (counts > 1).any() == moe.reads_trees, "no padding, or nothing shared"
    sequences = [moe.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return Evaluator(moe, [task], EvaluationConfig()), oracle.known(moe.language_model, sequences)


def space_of(moe, num_kept):
    return SearchSpace.build(moe.shape, num_kept=num_kept)


def test_logits_and_outputs_equal_loops_over_tokens_and_experts(case):
    evaluator, expected = case
    observer = observer_of(evaluator)
    logits, outputs = observer.about(RouterLogits()).layers, observer.about(AllOutputs()).layers
    for z, f, layer in zip(logits, outputs, expected, strict=True):
        assert z.tokens == f.tokens == layer["tokens"]
        lengths = np.sqrt(np.diagonal(z.products))
        np.testing.assert_allclose(z.products / np.outer(lengths, lengths), layer["gate"], atol=1e-6)
        np.testing.assert_allclose(f.outputs / f.tokens, layer["mean"], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(f.cosines / f.tokens, layer["output"], atol=1e-6)


@pytest.mark.parametrize("num_kept", [4, 6])
@pytest.mark.parametrize("name", sorted(MERGES))
def test_merges_equal_loops_over_tokens_experts_and_pairs(case, name, num_kept):
    evaluator, expected = case
    moe = evaluator.model
    genome = MERGES[name].genome(observer_of(evaluator), space_of(moe, num_kept))
    parts = moe.shape.num_expert_groups
    for layer, gene, known in zip(moe.layers, genome.layers, expected, strict=True):
        groups = oracle.of_parts(known, parts, lambda own: oracle.GROUPS[name](num_kept // parts, own))
        weights = [oracle.WEIGHTS[name](known, expert) for expert in range(gene.num_experts)]
        assert np.array_equal(gene.router_mapping, np.eye(gene.num_experts)[[dominant for dominant, _ in groups]])
        for tensor, merged in layer.merged_tensors(gene.expert_merging).items():
            stacked = layer.expert_tensors()[tensor].numpy()
            for slot, (dominant, members) in enumerate(groups):
                wanted = oracle.merged_expert(stacked, weights, dominant, members)
                np.testing.assert_allclose(merged[slot].numpy(), wanted, rtol=1e-6, atol=1e-6, err_msg=tensor)


@pytest.mark.parametrize("name", sorted(MERGES))
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_merging_identical_experts_returns_that_expert(tmp_path, family, name):
    moe = view(family)
    originals = []
    for layer in moe.layers:
        for tensor in layer.expert_tensors().values():
            tensor[:3] = tensor[0].clone()  # three that are the same, and five others
        for tensor in layer.router_tensors().values():
            tensor[:3] = tensor[0].clone() + 1e-9 * torch.randn_like(tensor[:3])
        originals.append({key: tensor[0].clone() for key, tensor in layer.expert_tensors().items()})
    task = tiny.make_task(tmp_path, ROWS, moe.tokenizer, batch_tokens=128)
    found = 0
    for num_kept in (3, 4, 6):
        genome = MERGES[name].genome(observer_of(Evaluator(moe, [task], EvaluationConfig())), space_of(moe, num_kept))
        for layer, gene, original in zip(moe.layers, genome.layers, originals, strict=True):
            merged = layer.merged_tensors(gene.expert_merging)
            for slot, members in enumerate(gene.members):
                if set(members) <= {0, 1, 2}:
                    found += len(members) > 1
                    for key, tensor in merged.items():
                        torch.testing.assert_close(tensor[slot], original[key], rtol=1e-6, atol=1e-7)
    if name in ("hc_smoe", "uncurl"):  # others may let all three lead, or put them with one more
        assert found


@pytest.mark.parametrize("name", sorted(MERGES))
@pytest.mark.parametrize("family", FAMILIES)
def test_merges_of_every_family_are_smaller_stock_checkpoints(tmp_path, family, name):
    tiny_model(family, vocab_size=350).save_pretrained(tmp_path / "full")
    tiny.tiny_tokenizer(bos=True).save_pretrained(tmp_path / "full")
    moe = load_model(ModelSource(ModelConfig(path=str(tmp_path / "full"), device="cpu", self_check=False)))
    task = tiny.make_task(tmp_path / "data", ROWS, moe.tokenizer, batch_tokens=128)
    genome = MERGES[name].genome(observer_of(Evaluator(moe, [task], EvaluationConfig())), space_of(moe, 4))
    align_neurons(moe, alignment_of(moe, genome))
    report = export_checkpoint(moe, genome, tmp_path / "small", provenance={})  # reloads and compares logits
    assert report.loader == "transformers" and report.parameters_after < report.parameters_before
    small = tiny_model(family, vocab_size=350, **{one: 4 for one in EXPERT_FIELDS if one in CONFIGS[family]})
    distinct = {one.data_ptr(): one.numel() for one in small.state_dict().values()}  # embeddings may be tied
    assert report.parameters_after == sum(distinct.values())


def test_padding_that_answers_no_number_changes_nothing(tmp_path):
    moe = view("mixtral")
    task = tiny.make_task(tmp_path, ROWS, moe.tokenizer, batch_tokens=128)
    evaluator = Evaluator(moe, [task], EvaluationConfig())
    questions = (RouterLogits(), AllOutputs())
    expected = [observer_of(evaluator).about(question) for question in questions]
    with spoilt_padding(evaluator):
        found = [observer_of(evaluator).about(question) for question in questions]
    assert_alike(found, expected)


def assert_alike(found, expected, rtol=1e-9):
    for one, other in zip(found, expected, strict=True):
        for got, wanted in zip(one.layers, other.layers, strict=True):
            for name in got.names():
                value = getattr(wanted, name)
                np.testing.assert_allclose(
                    getattr(got, name), value, rtol=rtol, atol=rtol * np.abs(value).max(), err_msg=name
                )


def gang_finds(ranks, folder, sharding):
    found = []
    for evaluator in gang_evaluators(ranks, folder, sharding):
        observer = observer_of(evaluator)
        found += [observer.about(question) for question in (RouterLogits(), AllOutputs(), AllOutputs(layer=1))]
    return found


@pytest.mark.parametrize("sharding", ["tensor_parallel", "zero3"])
def test_ranks_together_find_what_one_process_finds(tmp_path, sharding):
    write_gang_files(tmp_path, ROWS[:9])
    alone = gang_finds(ALONE, str(tmp_path), "single")
    for of_rank in run_gang(gang_finds, 2, str(tmp_path), sharding):
        assert_alike(of_rank, alone, rtol=1e-5)


SHAPE = ModelShape("mixtral", num_experts=(4, 4), top_k=(1, 1), decoder_layers=(0, 1))


class Told:
    """An observer that answers what it was told."""

    def __init__(self, usage, products):
        routed = [LayerObservation(*[np.array(one, dtype=float)] * len(LayerObservation.names())) for one in usage]
        logits = [LayerLogits(np.array(9.0), np.array(products, dtype=float))] * len(usage)
        self._answers = {"Routed": Observation(tuple(routed)), "RouterLogits": Observation(tuple(logits))}

    def about(self, question):
        return self._answers[type(question).__name__]


PRODUCTS = [[1.0, 0.5, 0.0, 0.9], [0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.2], [0.9, 0.0, 0.2, 1.0]]


def test_a_group_without_votes_keeps_its_dominant_expert_and_unused_experts_do_not_lead_used_ones():
    space = SearchSpace.build(SHAPE, num_kept=2)
    observer = Told([[0, 0, 0, 0], [0, 6, 0, 3]], PRODUCTS)
    unused, used = MERGES["m_smoe"].genome(observer, space).layers
    assert unused.kept == (0, 1) and unused.is_pruning
    assert used.members == [[1], [3]], "an expert that nobody used has no share"
    merged = merged_layer([Group(2, (1, 2)), Group(0, (0, 3))], np.array([3.0, 0.0, 0.0, 1.0]), top_k=1)
    np.testing.assert_allclose(merged.expert_merging, [[0, 0, 1, 0], [0.75, 0, 0, 0.25]])


def test_equal_weights_of_average_count_unused_members_too():
    genome = MERGES["average"].genome(Told([[5, 4, 0, 0]] * 2, PRODUCTS), SearchSpace.build(SHAPE, num_kept=2))
    np.testing.assert_allclose(genome.layers[0].expert_merging, [[1 / 3, 0, 1 / 3, 1 / 3], [0, 1, 0, 0]], rtol=1e-6)


def test_globally_the_experts_with_the_largest_shares_lead_and_layers_differ():
    observer = Told([[10, 1, 1, 0], [3, 3, 3, 3]], PRODUCTS)
    genome = MERGES["m_smoe"].global_genome(observer, SearchSpace.build(SHAPE, num_kept=2))
    assert genome.num_kept == (1, 3)
    assert genome.layers[0].members == [[0, 1, 2]]
    grouped = ModelShape("deepseek_v3", (8,), (2,), (0,), num_expert_groups=2, top_k_groups=1, min_kept_per_group=2)
    with pytest.raises(ConfigError, match="--allocation: got 'global', but deepseek_v3 chooses groups"):
        told = Told([np.ones(8)], np.eye(8))
        MERGES["m_smoe"].global_genome(told, SearchSpace.build(grouped, num_kept=4))


def test_sums_that_are_not_finite_are_refused_in_one_line():
    observer = Told([[1, 1, 1, 1]] * 2, np.full((4, 4), np.nan))
    with pytest.raises(ModelError, match="MoE layer 0: its products sum up to numbers that are not finite"):
        MERGES["m_smoe"].genome(observer, SearchSpace.build(SHAPE, num_kept=2))
