"""Ranks that hold one model together score as one process does, whatever goes wrong with a genome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tasks as tiny
import torch
from asking import observed
from process_groups import run_gang

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import GenomeError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, EvaluationFailure, Outcome
from moe_evo.genomes.space import ModelShape
from moe_evo.models.load import load_model
from moe_evo.models.ranks import ALONE, Ranks
from moe_evo.tasks.base import TaskScores
from moe_evo.tasks.data import read_task
from moe_evo.tasks.registry import build_task

KINDS = ("choice", "texts", "like", "write")
SHARDINGS = ("tensor_parallel", "zero3")
SHARED_PREFIX = "one two three four five six " * 8  # read once for all examples, where ranks share layers
ALL_TASKS = {
    "choice": {"prefix": SHARED_PREFIX},
    "texts": {},
    "like": {"kind": "distillation"},
    "write": {"max_new_tokens": 6, "stop": "e", "prefix": SHARED_PREFIX},
}
WORDS = ["one", "two", "three", "four", "five", "six", "yes", "no", "good", "bad", "maybe"]
SPOILED = "Q"  # a letter of one example, number 3, of each task
PROMPTS = [" ".join(WORDS[n % 4 : n % 4 + 1 + n % 5]) + (SPOILED if n == 3 else f" {n}") for n in range(13)]
PRUNED = Genome.from_kept([[0, 2], [1, 3]], 4, 2)


SHAPE = ModelShape("mixtral", num_experts=(4, 4), top_k=(2, 2), decoder_layers=(0, 1))
MERGED, HUGE = tiny.tiny_merge(SHAPE), tiny.tiny_merge(SHAPE, scale=1e37)


@dataclass(frozen=True)
class Answers:
    """Everything that an evaluator was asked in `interview`."""

    scores: Mapping[str, TaskScores]
    outcomes: list[Outcome]
    few: Outcome
    one_row: Mapping[str, TaskScores]
    huge: list[Outcome]
    after: Outcome
    refusal: str
    counts: list[np.ndarray]
    spoiled: list[Outcome]
    unspoiled: Outcome
    shares_layers: bool


def interview(ranks: Ranks, folder: str, sharding: str) -> Answers:
    tasks = [TaskConfig(data=f"{folder}/{kind}", name=kind, **ALL_TASKS[kind]) for kind in KINDS]
    data = [read_task(task) for task in tasks]

    def evaluator(model: str, batch_tokens: int, kinds: tuple[str, ...] = KINDS) -> Evaluator:
        moe = models[model]
        chosen = [build_task(one, moe.tokenizer, 64) for one in data if one.name in kinds]
        return Evaluator(moe, chosen, EvaluationConfig(batch_tokens=batch_tokens))

    options = {"device": "cpu", "sharding": sharding}
    models = {
        "healthy": load_model(ModelConfig(path=f"{folder}/healthy", **options), ranks),
        "spoiled": load_model(ModelConfig(path=f"{folder}/spoiled", self_check=False, **options), ranks),
    }
    whole = evaluator("healthy", 64)
    few = {"choice": [3], "texts": [4, 1, 2], "like": [0], "write": [2]}
    others = {kind: [0, 1, 2, 4, 6] for kind in KINDS}
    counts = [layer.tokens for layer in observed(whole).layers]
    outcomes = whole.evaluate([None, PRUNED, MERGED, PRUNED], "search")
    try:
        whole.evaluate([PRUNED, Genome.from_kept([[0, 1]] * 3, 4, 2)], "search")
        refusal = ""
    except GenomeError as error:
        refusal = str(error)
    return Answers(
        scores=found(whole, MERGED),
        outcomes=outcomes,
        few=whole.evaluate([MERGED], "search", few)[0],
        one_row=found(evaluator("healthy", 1), PRUNED),
        huge=[evaluator("healthy", 64, (kind,)).evaluate([HUGE], "search")[0] for kind in KINDS],
        after=whole.evaluate([PRUNED], "search")[0],
        refusal=refusal,
        counts=counts,
        spoiled=[evaluator("spoiled", 64, (kind,)).evaluate([PRUNED], "search")[0] for kind in KINDS],
        unspoiled=evaluator("spoiled", 64).evaluate([PRUNED], "search", others)[0],
        shares_layers=whole.shares_layers,
    )


def found(evaluator: Evaluator, genome: Genome) -> Mapping[str, TaskScores]:
    (examined,) = evaluator.examine([genome], "search")
    assert not isinstance(examined, EvaluationFailure)
    return examined


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two checkpoints, of which one knows no number for a letter, and data for a task of each kind."""
    root: Path = tmp_path_factory.mktemp("lockstep")
    tokenizer = tiny.tiny_tokenizer(bos=True)
    model = tiny.tiny_mixtral()
    for name in ("healthy", "spoiled"):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        with torch.no_grad():
            model.model.embed_tokens.weight[tokenizer(SPOILED)["input_ids"][-1]] = torch.nan
    rows = {
        "choice": [{"prompt": p, "choices": [" yes", " no no", " dog"], "label": n % 3} for n, p in enumerate(PROMPTS)],
        "texts": [{"text": f"{prompt} no"} for prompt in PROMPTS[:7]],
        "like": [{"prompt": prompt} for prompt in PROMPTS],
        "write": [{"prompt": prompt, "answers": "x"} for prompt in PROMPTS[:9]],
    }
    for kind, of_kind in rows.items():
        tiny.write_splits(root / kind, of_kind)
    return str(root)


@pytest.fixture(scope="module")
def alone(folder: str) -> Answers:
    return interview(ALONE, folder, "single")


@pytest.fixture(scope="module", params=SHARDINGS)
def sharding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def together(sharding: str, folder: str) -> list[Answers]:
    return run_gang(interview, 2, folder, sharding)


def close(got: Outcome, expected: Outcome, tolerance: float = 1e-6) -> bool:
    if isinstance(got, EvaluationFailure) or isinstance(expected, EvaluationFailure):
        return without_time(got) == without_time(expected)
    if got.num_examples != expected.num_examples or got.metrics.keys() != expected.metrics.keys():
        return False
    pairs = [
        (got.fitness, expected.fitness),
        (got.tie_break, expected.tie_break),
        *((got.metrics[name], expected.metrics[name]) for name in got.metrics),
    ]
    return all(abs(one - other) <= tolerance * max(1.0, abs(other)) for one, other in pairs)


def without_time(outcome: Outcome) -> Any:
    return replace(outcome, duration_s=0.0)


def same(first: TaskScores, second: TaskScores) -> bool:
    return np.array_equal(first.examples, second.examples) and np.array_equal(first.score, second.score)


def test_all_ranks_give_the_same_answers(together: list[Answers]) -> None:
    first, second = together
    for name in ("outcomes", "huge", "spoiled"):
        pairs = zip(getattr(first, name), getattr(second, name), strict=True)
        assert all(without_time(one) == without_time(other) for one, other in pairs), name
    for name in ("few", "after", "unspoiled"):
        assert without_time(getattr(first, name)) == without_time(getattr(second, name)), name
    for kind in KINDS:
        assert same(first.scores[kind], second.scores[kind]) and same(first.one_row[kind], second.one_row[kind])


def test_layers_are_shared_where_all_ranks_run_the_same_examples(together, alone, sharding) -> None:
    assert alone.shares_layers
    assert {one.shares_layers for one in together} == {sharding == "tensor_parallel"}


def test_every_example_scores_as_in_one_process(together: list[Answers], alone: Answers) -> None:
    for kind, expected in alone.scores.items():
        got = together[0].scores[kind]
        np.testing.assert_array_equal(got.examples, expected.examples)
        np.testing.assert_allclose(got.score, expected.score, rtol=1e-6, atol=1e-6)
        if expected.log_likelihood is not None:
            np.testing.assert_allclose(got.log_likelihood, expected.log_likelihood, rtol=1e-6, atol=1e-6)


def test_outcomes_are_those_of_one_process(together: list[Answers], alone: Answers) -> None:
    assert all(isinstance(outcome, Evaluation) for outcome in alone.outcomes)
    assert all(map(close, together[0].outcomes, alone.outcomes))
    assert together[0].outcomes[1] is not None and close(together[0].outcomes[3], together[0].outcomes[1], 0)


def test_examples_in_equal_batches_score_bit_for_bit_alike_under_zero3(together, alone, sharding) -> None:
    if sharding == "zero3":
        assert all(same(together[0].one_row[kind], alone.one_row[kind]) for kind in KINDS)


def test_fewer_examples_than_ranks_are_enough(together: list[Answers], alone: Answers) -> None:
    assert close(together[0].few, alone.few)
    assert alone.few.num_examples == 6


def test_a_genome_that_breaks_every_number_is_the_same_failure_and_leaves_ranks_in_step(together, alone) -> None:
    for kind, failure in zip(KINDS, alone.huge, strict=True):
        assert isinstance(failure, EvaluationFailure) and failure.kind == "non_finite"
        assert failure.reason.startswith(f"task {kind}: ")
    assert all(map(close, together[0].huge, alone.huge))
    assert without_time(together[0].after) == without_time(together[0].outcomes[1])


def test_numbers_that_break_on_one_rank_alone_are_the_failure_of_both(together, alone) -> None:
    assert all(isinstance(failure, EvaluationFailure) for failure in alone.spoiled)
    assert all(map(close, together[0].spoiled, alone.spoiled))
    assert isinstance(alone.unspoiled, Evaluation)
    assert close(together[0].unspoiled, alone.unspoiled)


def test_a_genome_of_another_model_is_refused_by_all_before_they_start(together, alone) -> None:
    assert "made for 3 MoE layers" in alone.refusal
    assert {one.refusal for one in together} == {alone.refusal}


def test_observed_tokens_are_those_of_one_process(together: list[Answers], alone: Answers) -> None:
    for answers in together:
        assert all(map(np.array_equal, answers.counts, alone.counts))
