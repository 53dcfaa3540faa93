"""Observing: what counts and how often, in any batches, on any ranks, and the model that is left behind."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from asking import gang_evaluators, observed, observer_of, spoilt_padding, write_gang_files
from process_groups import run_gang
from tiny_models import logits, random_merge, random_pruning, tiny_model, tokens

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.criteria.questions import GateRatios, OfPrompts, Outputs, Routed, Trials, Weights
from moe_evo.criteria.routed import _GateRatios, _Routed, counting
from moe_evo.criteria.sums import LayerObservation, Observation, together
from moe_evo.criteria.weights import expert_weights
from moe_evo.errors import ObservationError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.models.experts.outputs import observed_experts, residual_streams
from moe_evo.models.ranks import ALONE, Ranks
from moe_evo.models.view import MoEModel

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
PROMPTS = [" ".join(WORDS[n % 4 : n % 4 + 1 + (3 * n) % 7]) + (f" {n}" if n % 3 else "") for n in range(24)]
ROWS = [{"prompt": prompt, "choices": [" yes", " no no", " x"], "label": 0} for prompt in PROMPTS]
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss")


QUESTIONS = (Routed(), Outputs(), GateRatios(), Trials())


def assert_alike(got: Observation, expected: Observation, rtol: float = 1e-9) -> None:
    assert len(got.layers) == len(expected.layers)
    for one, other in zip(got.layers, expected.layers, strict=True):
        assert type(one) is type(other)
        for name in one.names():
            expected_sums = getattr(other, name)
            if name == "counts" and rtol > 1e-9:  # a ratio at the edge of a bin may go either way
                below, expected_below = np.cumsum(one.counts), np.cumsum(other.counts)
                assert (below[1:] >= expected_below[:-1]).all() and (below[:-1] <= expected_below[1:]).all()
                assert below[-1] == expected_below[-1]
                continue
            atol = 0.1 * rtol * np.abs(expected_sums).max()  # sums of both signs
            exact = {"rtol": 0, "atol": 0} if name in ("tokens", "num_tokens") else {"rtol": rtol, "atol": atol}
            np.testing.assert_allclose(getattr(one, name), expected_sums, err_msg=name, **exact)


@pytest.fixture(scope="module", params=FAMILIES)
def moe(request):
    model = tiny_model(request.param, vocab_size=350).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    return MoEModel(model, tiny.tiny_tokenizer(bos=True))


def make_task(moe, folder: Path, rows=ROWS, batch_tokens=128, **options):
    return tiny.make_task(folder, rows, moe.tokenizer, batch_tokens=batch_tokens, **options)


def evaluator_of(moe, folder: Path, rows=ROWS, **options) -> Evaluator:
    return Evaluator(moe, [make_task(moe, folder, rows, **options)], EvaluationConfig())


def answered(question: OfPrompts, moe, folder: Path, rows=ROWS, **options) -> Observation:
    return observer_of(evaluator_of(moe, folder, rows, **options)).about(question)


def test_shared_tokens_count_for_every_prompt_and_padding_never(tmp_path, moe):
    task = make_task(moe, tmp_path)
    batches = task.prompt_batches("search", trees=moe.reads_trees)
    counts = np.concatenate([batch.counts.numpy().reshape(-1) for batch in batches])
    assert (counts == 0).any(), "no padding here"
    assert (counts > 1).any() == moe.reads_trees
    observer = observer_of(Evaluator(moe, [task], EvaluationConfig()))
    num_tokens = sum(len(moe.tokenizer(row["prompt"])["input_ids"]) for row in ROWS)
    found = [observer.about(question).layers for question in QUESTIONS]
    for routed, outputs, ratios, trials, top_k in zip(*found, moe.shape.top_k, strict=True):
        assert routed.tokens.sum() == outputs.tokens.sum() == num_tokens * top_k
        assert ratios.counts.sum() == trials.num_tokens == num_tokens
        np.testing.assert_allclose(outputs.squared_norms, routed.squared_norms)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: type(question).__name__)
def test_padding_that_answers_no_number_changes_nothing(tmp_path, moe, question):
    expected = answered(question, moe, tmp_path / "clean")
    evaluator = evaluator_of(moe, tmp_path / "padded")
    with spoilt_padding(evaluator):
        found = observer_of(evaluator).about(question)
    assert_alike(found, expected)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: type(question).__name__)
def test_the_order_and_size_of_batches_change_nothing(tmp_path, moe, question):
    expected = answered(question, moe, tmp_path / "whole")
    rng = np.random.default_rng(0)
    for number, batch_tokens in enumerate((1, 16, 40, 1000)):
        shuffled = [ROWS[place] for place in rng.permutation(len(ROWS))]
        found = answered(question, moe, tmp_path / str(number), shuffled, batch_tokens=batch_tokens)
        assert_alike(found, expected)


def test_halves_of_the_data_add_up_to_the_whole(tmp_path, moe):
    tasks = [
        make_task(moe, tmp_path / name, rows, name=name) for name, rows in (("first", ROWS[:5]), ("second", ROWS[5:]))
    ]
    observer = observer_of(Evaluator(moe, tasks, EvaluationConfig()))
    whole = observer_of(evaluator_of(moe, tmp_path / "whole"))
    for question in QUESTIONS:
        halves = observer.about_tasks(question)
        assert list(halves) == ["first", "second"]
        assert_alike(halves["first"] + halves["second"], whole.about(question))
        assert_alike(observer.about(question), whole.about(question))


def test_parts_of_the_examples_add_up_to_the_whole(tmp_path, moe):
    observer = observer_of(evaluator_of(moe, tmp_path))
    parts = [observer.about(Routed(part=(place, 5))) for place in range(5)]
    assert len({float(part.layers[0].tokens.sum()) for part in parts}) > 1
    assert_alike(together(parts), observer.about(Routed()))
    many = [observer.about(Routed(part=(place, 30))) for place in range(30)]  # more than there are examples
    assert_alike(together(many), observer.about(Routed()))


def test_a_single_layer_is_observed_as_among_all(tmp_path, moe):
    observer = observer_of(evaluator_of(moe, tmp_path))
    for question in QUESTIONS:
        (last,) = observer.about(replace(question, layer=moe.shape.num_layers - 1)).layers
        assert_alike(Observation((last,)), Observation(observer.about(question).layers[-1:]))


def test_the_model_computes_the_same_while_it_is_observed_and_is_left_as_it_was(moe):
    implementation = moe.language_model.config._experts_implementation
    untouched = logits(moe.language_model, tokens())
    with observed_experts(moe, lambda *_: None):
        torch.testing.assert_close(logits(moe.language_model, tokens()), untouched, rtol=1e-9, atol=1e-9)
    expert_weights(moe)
    assert moe.language_model.config._experts_implementation == implementation
    assert torch.equal(logits(moe.language_model, tokens()), untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_implementation_of_experts_is_observed_alike(tmp_path, family, dtype):
    moe = MoEModel(tiny_model(family, vocab_size=350).to(dtype), tiny.tiny_tokenizer(bos=True))
    found = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        moe.language_model.set_experts_implementation(implementation)
        found[implementation] = observed(evaluator_of(moe, tmp_path / implementation))
    rtol = 1e-5
    if dtype == torch.bfloat16:  # tokens between two experts may go either way, and no two products round alike
        found = {name: Observation(one.layers[:1]) for name, one in found.items()}
        rtol = 2e-2
    for implementation in ("batched_mm", "grouped_mm"):
        assert_alike(found[implementation], found["eager"], rtol)


@pytest.mark.parametrize("make", [random_pruning, random_merge])
def test_a_genome_in_force_is_observed_whichever_is_applied_first(moe, make):
    genome = make(moe.shape, 4)
    seen: list[list[tuple[torch.Tensor, ...]]] = [[], []]

    def see(into):
        return lambda _layer, *tensors: into.append(tuple(map(torch.clone, tensors)))

    with moe.applied(genome), observed_experts(moe, see(seen[0])):
        inside = logits(moe.language_model, tokens())
    with observed_experts(moe, see(seen[1])), moe.applied(genome):
        outside = logits(moe.language_model, tokens())
    with moe.applied(genome):
        expected = logits(moe.language_model, tokens())
    torch.testing.assert_close(inside, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(inside, outside)
    for one, other in zip(*seen, strict=True):
        assert all(map(torch.equal, one, other))
    slots = [expert for index, _, _ in seen[0] for expert in index.reshape(-1).tolist()]
    allowed = {expert for layer in genome.kept for expert in layer} if genome.is_pruning else set(range(4))
    assert set(slots) <= allowed


def test_memory_that_runs_out_once_leaves_no_trace(tmp_path, moe):
    expected = observed(evaluator_of(moe, tmp_path / "whole"))
    task = make_task(moe, tmp_path / "short", batch_tokens=64)
    evaluator = Evaluator(moe, [task], EvaluationConfig(batch_tokens=64))
    forward, calls = evaluator.forward, 0

    def forward_once_short(batch):
        nonlocal calls
        calls += 1
        found = forward(batch)
        if calls == 2:  # the first batch has been counted already
            raise torch.OutOfMemoryError("out of memory")
        return found

    evaluator.forward = forward_once_short
    found = observed(evaluator)
    assert evaluator.batch_tokens < 64
    assert_alike(found, expected)


def test_an_observation_is_frozen_also_after_a_journey():
    layer = LayerObservation(*np.arange(18.0).reshape(6, 3))
    source = np.ones(3)
    copied = LayerObservation(*[source] * 6)
    source[0] = 7
    assert copied.tokens[0] == 1
    for one in (layer, pickle.loads(pickle.dumps(Observation((layer,)))).layers[0]):
        np.testing.assert_array_equal(one.gates, [3, 4, 5])
        with pytest.raises(ValueError, match="read-only"):
            one.gates[0] = 1


def test_streams_past_the_layers_are_let_go_once_they_are_seen(tmp_path, moe):
    evaluator = evaluator_of(moe, tmp_path)
    (task,) = evaluator.tasks
    batch = task.prompt_batches("search", trees=moe.reads_trees)[0]
    collector = _Routed(moe)
    collector.times = batch.counts.reshape(-1)
    with torch.inference_mode(), collector.watching(moe, None):
        evaluator.forward(batch)
        assert not collector._streams
    with torch.inference_mode(), residual_streams(moe, 1) as streams:
        evaluator.forward(batch)
    assert list(streams) == [1]


def test_two_gates_of_zero_have_the_ratio_zero(moe):
    collector = _GateRatios(moe)
    collector.times = torch.ones(2)
    collector._see(0, torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.0, 0.0], [0.5, 0.25]]), torch.zeros(2, 2, 4))
    counts = collector.layers()[0].counts
    assert counts.sum() == 2 and counts[0] == 1 and counts[len(counts) // 2] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a device map puts layers on two devices")
def test_tokens_are_counted_where_the_layer_lies_and_not_where_inputs_do():
    counted, times = counting(torch.tensor([2, 0, 1], device="cuda"), torch.zeros(3, 4))
    assert counted.tolist() == [True, False, True] and times.tolist() == [2.0, 1.0]
    assert counted.device.type == times.device.type == "cpu"


def test_what_does_not_fit_is_refused():
    small, large = (LayerObservation(*np.ones((6, number))) for number in (3, 4))
    with pytest.raises(ObservationError, match=r"tokens of shape \(3,\) and of \(4,\); add those of one model"):
        Observation((small,)) + Observation((large,))
    with pytest.raises(ObservationError, match="of 1 and of 2 MoE layers"):
        Observation((small,)) + Observation((small, small))


ASKED = (*QUESTIONS, Weights())
Found = list[list[dict[str, Observation]]]
"""For each checkpoint and question the answers by task."""


def gang_finds(ranks: Ranks, folder: str, sharding: str) -> Found:
    found: Found = []
    for evaluator in gang_evaluators(ranks, folder, sharding):
        unequal, trees = evaluator.tasks[1], evaluator.model.reads_trees
        shares = [unequal.prompt_batches("search", range(first, 9, 2), trees=trees) for first in (0, 1)]
        assert len(shares[0]) > len(shares[1])  # so that one rank repeats a batch, only to keep in step
        observer = observer_of(evaluator)
        found.append([observer.about_tasks(question) for question in ASKED])
    return found


@pytest.mark.parametrize("sharding", ["tensor_parallel", "zero3"])
def test_ranks_together_find_what_one_process_finds(tmp_path, sharding):
    write_gang_files(tmp_path, ROWS[:9])
    alone = gang_finds(ALONE, str(tmp_path), "single")
    for of_rank in run_gang(gang_finds, 2, str(tmp_path), sharding):
        for answers, expected in zip(of_rank, alone, strict=True):
            for question, by_task, expected_by_task in zip(ASKED, answers, expected, strict=True):
                assert list(by_task) == (["equal", "unequal"] if question.needs_data else [""])
                for name, observation in by_task.items():
                    assert_alike(observation, expected_by_task[name], rtol=1e-5 if question.needs_data else 1e-9)
