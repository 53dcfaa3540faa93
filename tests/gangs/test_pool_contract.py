"""What every pool promises, with the embedded model: in this process, on one gang and on two.

The gangs are shared services, so that each model is loaded once for all tests here.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster
from request_runs import MODEL, TASK, complete, genomes, requests

from moe_evo.commands.search import search as search_command
from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.criteria.answering import answer
from moe_evo.criteria.questions import Routed, Weights
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.pool import Pool, Request
from moe_evo.genomes.population import Evaluation, Outcome
from moe_evo.models.source import ModelSource
from moe_evo.records.journal import Journal
from moe_evo.runs import open_pool
from moe_evo.tasks.data import SPLITS, check_tasks
from moe_evo.tracking.terminal import TerminalTracker

CONFIG = RunConfig(
    model=MODEL,
    tasks=[TASK],
    search=SearchConfig(algorithm="random", num_kept=4, evaluations=16, seed=3),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=3),
)
CLUSTERS = {
    "in this process": ClusterConfig(),
    "one gang": ClusterConfig(address="local", num_gangs=1, service="one gang"),
    "two gangs": ClusterConfig(address="local", num_gangs=2, service="two gangs"),
}


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return open_pool.load_evaluator(ModelSource(MODEL), check_tasks([TASK]), CONFIG.evaluation, TerminalTracker())


@pytest.fixture(scope="module")
def folders(cluster: Cluster, evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs of CONFIG, one a pool. They start the services, so they hear all that happens."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
        for name, where in CLUSTERS.items():
            folder = tmp_path_factory.mktemp("run") / "run"
            with TerminalTracker() as tracker:
                search_command(replace(CONFIG, cluster=where, folder=str(folder)), tracker)
            found[name] = folder
    return found


@pytest.fixture(params=CLUSTERS)
def pool(request: pytest.FixtureRequest, folders: dict[str, Path], evaluator: Evaluator) -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
        config = replace(CONFIG, cluster=CLUSTERS[request.param])
        with open_pool.open_pool(
            config, ModelSource(config.model), check_tasks(config.tasks), TerminalTracker()
        ) as pool:
            yield pool


def numbers(outcome: Outcome) -> tuple[object, ...]:
    """All that an outcome says but for how long it took, as float32."""
    assert isinstance(outcome, Evaluation)
    metrics = tuple((name, np.float32(value)) for name, value in sorted(outcome.metrics.items()))
    scores = (outcome.fitness, outcome.tie_break, outcome.standard_error)
    return (*map(np.float32, scores), outcome.num_examples, metrics)


def test_the_shape_is_that_of_the_model(pool: Pool, evaluator: Evaluator) -> None:
    assert pool.shape == evaluator.model.shape


def test_there_are_free_slots_at_the_start_and_none_when_they_are_taken(pool: Pool) -> None:
    slots = pool.free_slots
    assert slots > 0
    pool.submit(requests(slots, seed=1))
    assert pool.free_slots == 0
    done = 0
    while done < slots:
        done += len(pool.next_outcomes())
    assert done == slots
    assert pool.free_slots > 0


@pytest.mark.parametrize("split", SPLITS)
def test_every_request_is_answered_once_with_the_scores_of_its_genome(
    pool: Pool, evaluator: Evaluator, split: str
) -> None:
    wanted = requests(12, seed=SPLITS.index(split) + 10, split=split)
    outcomes = complete(pool, wanted).outcomes
    expected = evaluator.evaluate([one.genome for one in wanted], split)
    assert {key: numbers(one) for key, one in outcomes.items()} == {
        (request.number, split): numbers(one) for request, one in zip(wanted, expected, strict=True)
    }


def test_equal_genomes_under_two_numbers_are_both_answered(pool: Pool) -> None:
    (genome,) = genomes(1, seed=20)
    outcomes = complete(pool, [Request("search", n, genome, "search") for n in range(3)]).outcomes
    assert len({numbers(one) for one in outcomes.values()}) == 1


def test_answers_about_experts_are_those_of_the_evaluator(pool: Pool, evaluator: Evaluator) -> None:
    questions = [Routed(task.name) for task in evaluator.tasks] + [Weights()]
    answers = {question.key: answer for question, answer in pool.ask(questions)}
    assert answers.keys() == {question.key for question in questions}
    for question in questions:
        for found, expected in zip(answers[question.key].layers, answer(question, evaluator).layers, strict=True):
            for name in expected.names():
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_a_search_leaves_the_same_journal_whatever_its_pool(folders: dict[str, Path]) -> None:
    journals = {name: scores(folder) for name, folder in folders.items()}
    assert len(journals["in this process"]) > CONFIG.search.evaluations
    assert journals["one gang"] == journals["in this process"]
    assert journals["two gangs"] == journals["in this process"]


def scores(folder: Path) -> dict[tuple[object, ...], tuple[object, ...]]:
    """(search, number, digest, split) -> scores, of all outcomes in a journal."""
    with Journal(folder / "journal.sqlite", read_only=True) as journal:
        return {
            (search, one.number, one.genome.digest, split): numbers(one.outcome)
            for search in ("search", "reference")
            for split in SPLITS
            for one in journal.individuals(search, split)
        }


def test_the_journal_of_a_run_on_gangs_tells_what_happened_to_them(folders: dict[str, Path]) -> None:
    for name, num_gangs in (("one gang", 1), ("two gangs", 2)):
        with Journal(folders[name] / "journal.sqlite", read_only=True) as journal:
            kinds = [kind for _, _, kind, _ in journal.gang_events()]
            status = journal.pool_status()
        assert kinds.count("placed") == num_gangs
        assert "ready" in kinds
        assert status is not None
        assert len(status["gangs"]) == num_gangs
        assert status["gangs"][0]["pids"]
        assert json.loads((folders[name] / "result.json").read_text())["search"]["evaluations"] == 16


def test_the_journal_of_a_run_in_this_process_tells_nothing_of_gangs(folders: dict[str, Path]) -> None:
    with Journal(folders["in this process"] / "journal.sqlite", read_only=True) as journal:
        assert journal.gang_events() == []
        assert journal.pool_status() is None


@pytest.mark.parametrize("pool", ["one gang"], indirect=True)
def test_an_idle_gang_that_is_killed_is_built_anew_and_its_scores_stay_the_same(
    pool: Pool, evaluator: Evaluator
) -> None:
    wanted = requests(8, seed=30)
    before = complete(pool, wanted[:4])
    os.kill(before.pids()[0], signal.SIGKILL)
    after = complete(pool, wanted[4:])
    assert after.kinds() == ["broken", "placed", "ready"]
    expected = evaluator.evaluate([one.genome for one in wanted], "search")
    outcomes = before.outcomes | after.outcomes
    assert [numbers(outcomes[n, "search"]) for n in range(8)] == [numbers(one) for one in expected]
