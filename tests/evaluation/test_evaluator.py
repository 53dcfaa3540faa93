"""The evaluator: which outcomes genomes get, and how they are summed up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_tasks as tiny
import torch

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.errors import GenomeError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, EvaluationFailure
from moe_evo.models.view import MoEModel
from moe_evo.tasks.task import Task

WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
CHOICE = [
    {
        "prompt": " ".join(WORDS[n % 4 : n % 4 + 1 + n % 5]) + f" {n}",
        "choices": [" yes", " no no", " dog"],
        "label": n % 3,
    }
    for n in range(12)
]
TEXTS = [{"text": " ".join(WORDS[n : n + 4])} for n in range(5)]
PRUNED = Genome.from_kept([[0, 2], [1, 3]], 4, 2)


@pytest.fixture(scope="module")
def moe():
    return MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))


@pytest.fixture
def tasks(tmp_path, moe):
    return [
        tiny.make_task(tmp_path / "choice", CHOICE, moe.tokenizer),
        tiny.make_task(tmp_path / "texts", TEXTS, moe.tokenizer),
    ]


def all_kinds(tmp_path, moe):
    prompts = [{"prompt": row["prompt"]} for row in CHOICE]
    return [
        tiny.make_task(tmp_path / "choice", CHOICE, moe.tokenizer),
        tiny.make_task(tmp_path / "texts", TEXTS, moe.tokenizer),
        tiny.make_task(tmp_path / "like", prompts, moe.tokenizer, kind="distillation"),
        tiny.make_task(
            tmp_path / "write", [{**row, "answers": "x"} for row in prompts], moe.tokenizer, max_new_tokens=3
        ),
    ]


def without_time(outcome):
    assert isinstance(outcome, Evaluation)
    return (outcome.fitness, outcome.tie_break, outcome.standard_error, outcome.num_examples, dict(outcome.metrics))


def test_outcomes_are_those_of_the_applied_model(moe, tasks):
    evaluator = Evaluator(moe, tasks, EvaluationConfig())
    examined = evaluator.examine([PRUNED], "search")[0]
    with moe.applied(PRUNED):
        for task in tasks:
            alone = tiny.run_task(task, moe.language_model, moe.tokenizer)
            np.testing.assert_allclose(examined[task.name].score, alone.score, rtol=0, atol=1e-6)
            assert examined[task.name].metrics == pytest.approx(alone.metrics)


def test_fitness_is_the_mean_over_tasks_with_its_standard_error(moe, tasks):
    evaluator = Evaluator(moe, tasks, EvaluationConfig())
    scores = evaluator.examine([PRUNED], "search")[0]
    (outcome,) = evaluator.evaluate([PRUNED], "search")
    first, second = (scores[name].score for name in ("choice", "texts"))
    assert outcome.fitness == pytest.approx((first.mean() + second.mean()) / 2)
    variance = first.var(ddof=1) / 12 + second.var(ddof=1) / 5
    assert outcome.standard_error == pytest.approx(math.sqrt(variance) / 2)
    likelihoods = [scores[name].log_likelihood.mean() for name in ("choice", "texts")]
    assert outcome.tie_break == pytest.approx(sum(likelihoods) / 2)
    assert outcome.num_examples == 17
    assert outcome.duration_s > 0
    assert set(outcome.metrics) == {
        "choice/accuracy", "choice/accuracy_norm", "choice/log_likelihood", "choice/probability",
        "choice/probability_norm", "texts/log_likelihood", "texts/perplexity",
    }  # fmt: skip
    assert outcome.metrics["choice/accuracy"] == pytest.approx(first.mean())


def test_the_worst_task_may_be_the_fitness(moe, tasks):
    evaluator = Evaluator(moe, tasks, EvaluationConfig(fitness="worst"))
    (outcome,) = evaluator.evaluate([PRUNED], "search")
    worst = evaluator.examine([PRUNED], "search")[0]["texts"].score  # log-likelihoods are below any accuracy
    assert outcome.fitness == pytest.approx(worst.mean())
    assert outcome.standard_error == pytest.approx(worst.std(ddof=1) / math.sqrt(5))


def test_the_identity_scores_as_the_untouched_model_on_every_kind_of_task(tmp_path, moe):
    evaluator = Evaluator(moe, all_kinds(tmp_path, moe), EvaluationConfig())
    untouched, identity, pruned = evaluator.evaluate([None, moe.shape.identity(), PRUNED], "search")
    assert without_time(identity) == without_time(untouched) != without_time(pruned)
    assert untouched.metrics["like/negative_kl"] == 0
    assert pruned.metrics["like/negative_kl"] < 0


def test_tie_break_counts_tasks_without_likelihood_as_zero(tmp_path, moe):
    tasks = all_kinds(tmp_path, moe)
    alone = Evaluator(moe, tasks[:1], EvaluationConfig()).evaluate([PRUNED], "search")[0]
    write = Evaluator(moe, [tasks[3]], EvaluationConfig()).evaluate([PRUNED], "search")[0]
    both = Evaluator(moe, [tasks[0], tasks[3]], EvaluationConfig()).evaluate([PRUNED], "search")[0]
    assert write.tie_break == 0
    assert both.tie_break == pytest.approx(alone.tie_break / 2)


def test_equal_genomes_are_computed_once(moe, tasks, monkeypatch):
    evaluator = Evaluator(moe, tasks, EvaluationConfig())
    calls = []
    original = Task.score
    monkeypatch.setattr(Task, "score", lambda *given: calls.append(1) or original(*given))
    evaluator.evaluate([PRUNED], "search")
    once = len(calls)
    same = Genome.from_kept([[2, 0], [3, 1]], 4, 2)
    outcomes = evaluator.evaluate([PRUNED, None, same, None], "search")
    assert once > 0 and len(calls) == 3 * once
    assert outcomes[0] is outcomes[2]
    assert outcomes[1] is outcomes[3]


def test_outcomes_do_not_depend_on_what_was_evaluated_before(moe, tasks):
    evaluator = Evaluator(moe, tasks, EvaluationConfig())
    first = without_time(evaluator.evaluate([PRUNED], "search")[0])
    evaluator.evaluate([None, Genome.from_kept([[1, 2, 3]] * 2, 4, 2)], "validation")
    assert without_time(evaluator.evaluate([PRUNED], "search")[0]) == first


def test_a_genome_for_another_model_is_refused_before_any_forward(moe, tasks, monkeypatch):
    evaluator = Evaluator(moe, tasks, EvaluationConfig())
    monkeypatch.setattr(evaluator, "forward", lambda batch: pytest.fail("a forward pass ran"))
    with pytest.raises(GenomeError, match="made for 3 MoE layers"):
        evaluator.evaluate([PRUNED, Genome.from_kept([[0, 1]] * 3, 4, 2)], "search")


def test_indices_choose_examples_by_task(moe, tasks):
    evaluator = Evaluator(moe, tasks, EvaluationConfig())
    whole = evaluator.examine([PRUNED], "search")[0]
    part = evaluator.examine([PRUNED], "search", {"choice": [3, 1, 8]})[0]
    assert part["choice"].examples.tolist() == [1, 3, 8]
    np.testing.assert_allclose(part["choice"].log_likelihood, whole["choice"].log_likelihood[[1, 3, 8]], atol=1e-5)
    np.testing.assert_array_equal(part["texts"].score, whole["texts"].score)
    (outcome,) = evaluator.evaluate([PRUNED], "search", {"choice": [3, 1, 8]})
    assert outcome.num_examples == 8


@pytest.mark.parametrize("kind", ["choice", "texts", "like", "write"])
def test_numbers_that_are_not_finite_are_a_failure_of_that_genome_alone(tmp_path, kind):
    moe = MoEModel(tiny.tiny_mixtral(), tiny.tiny_tokenizer(bos=True))
    with torch.no_grad():
        moe.language_model.model.layers[0].mlp.experts.down_proj[1].fill_(torch.inf)  # expert 1 of layer 0
    tasks = [task for task in all_kinds(tmp_path, moe) if task.name == kind]
    evaluator = Evaluator(moe, tasks, EvaluationConfig())
    healthy = Genome.from_kept([[0, 2], [0, 1]], 4, 2)
    broken = Genome.from_kept([[0, 1], [0, 1]], 4, 2)
    first, failure, last = evaluator.evaluate([healthy, broken, healthy], "search")
    if kind != "like":  # there the full model itself is broken
        assert isinstance(first, Evaluation)
        assert first is last
    assert isinstance(failure, EvaluationFailure)
    assert failure.kind == "non_finite"
    assert "not finite" in failure.reason
    assert failure.duration_s > 0


def test_threads_are_set_while_evaluating_and_restored(moe, tasks, monkeypatch):
    before = torch.get_num_threads()
    evaluator = Evaluator(moe, tasks, EvaluationConfig(threads=before + 1))
    seen = []
    original = moe.language_model.forward
    monkeypatch.setattr(
        moe.language_model, "forward", lambda **given: seen.append(torch.get_num_threads()) or original(**given)
    )
    evaluator.evaluate([None], "search")
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_genomes_generate_together_where_they_fit_and_one_that_breaks_fails_alone(tmp_path, moe, monkeypatch):
    write = all_kinds(tmp_path, moe)[3]
    fewer = Genome.from_kept([[0, 2], [1, 3]], 4, 1)
    genomes = [PRUNED, None, tiny.tiny_merge(moe.shape), tiny.tiny_merge(moe.shape, scale=1e37), fewer]
    alone = Evaluator(moe, [write], EvaluationConfig()).evaluate(genomes, "search")
    calls = []
    generate = moe.language_model.generate
    monkeypatch.setattr(
        moe.language_model, "generate", lambda **given: calls.append(len(given["input_ids"])) or generate(**given)
    )
    together = Evaluator(moe, [write], EvaluationConfig(pack_tokens=8192)).evaluate(genomes, "search")
    (batches,) = {len(write.batches("search"))}
    assert len(calls) == 2 * batches and max(calls) == 4 * max(len(one.input_ids) for one in write.batches("search"))
    assert [isinstance(one, EvaluationFailure) for one in together] == [False, False, False, True, False]
    assert isinstance(alone[3], EvaluationFailure) and together[3].reason == alone[3].reason
    for number in (0, 1, 2, 4):
        assert without_time(together[number]) == without_time(alone[number])
