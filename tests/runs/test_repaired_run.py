"""A search that ends with repair of its best pruning: what it asks, which repairs may win, and what is exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import observer_of

from moe_evo.cli.main import main
from moe_evo.commands.search import search as search_command
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig, SurrogateConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.merges import router_likeness
from moe_evo.errors import ConfigError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, Individual, Population
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN
from moe_evo.runs import open_pool, selection
from moe_evo.runs.kept_repairs import with_their_prunings, without_idle_repairs
from moe_evo.runs.workload import evaluations_by_split
from moe_evo.searches.repair import REPAIR, Repairs
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.terminal import TerminalTracker

CONFIG = RunConfig(
    model=ModelConfig(self_check=False),
    tasks=[TaskConfig(data="syll", num_search=24, num_validation=16, num_test=16, search_metric="probability")],
    search=SearchConfig(
        algorithm="surrogate", num_kept=2, evaluations=40, surrogate=SurrogateConfig(num_warmup=8, repair=0.5)
    ),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=4, baselines=[]),
)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    data = check_tasks(CONFIG.tasks)
    return open_pool.load_evaluator(ModelSource(CONFIG.model), data, CONFIG.evaluation, TerminalTracker())


@pytest.fixture
def asked(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the pool is asked about the model, which is loaded once."""
    names: list[str] = []
    ask = LocalPool.ask

    def noting(pool: LocalPool, questions: Any) -> Iterator[Any]:
        names.extend(type(question).__name__ for question in questions)
        return ask(pool, questions)

    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
    monkeypatch.setattr(LocalPool, "ask", noting)
    return names


def run(folder: Path, config: RunConfig = CONFIG) -> RunFolder:
    with TerminalTracker() as tracker:
        return search_command(replace(config, folder=str(folder)), tracker)


def test_repairs_take_in_what_is_most_alike_by_the_router_and_stand_in_a_row_of_their_own(
    asked: list[str], evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    made = selection.build_search
    monkeypatch.setattr(selection, "build_search", lambda *given: (told.append(given[5]), made(*given))[1])
    folder = run(tmp_path / "run")
    assert asked == ["RouterLogits"]
    likeness = router_likeness(observer_of(evaluator))
    np.testing.assert_allclose(told[0], likeness, rtol=1e-5)
    assert all(np.allclose(np.diagonal(one), 1) and one.min() >= 0 for one in likeness)
    rows = folder.read_result().rows
    assert [(row.key, row.title) for row in rows[1:]] == [
        ("best_pruning", "surrogate"),
        ("best", "surrogate, repaired"),
    ]
    with folder.open_journal() as journal:
        found = journal.candidates(MAIN)
    assert [one.operator == REPAIR for one in found] == [False] * 20 + [True] * 20
    space = SearchSpace.build(evaluator.model.shape, num_kept=2)
    for one in found[20:]:
        repairs = Repairs(space, found[one.parents[0]].genome, likeness)
        assert np.count_nonzero(repairs.numbers(one.genome)) == repairs.size == 16


def test_an_interrupted_run_repairs_on(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    submit = LocalPool.submit

    def dying(pool: LocalPool, requests: Any) -> None:
        if any(one.number == 33 for one in requests):
            raise KeyboardInterrupt
        submit(pool, requests)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(LocalPool, "submit", dying)
        run(tmp_path / "run")
    again = run(tmp_path / "run")
    for folder in (whole, again):
        with folder.open_journal() as journal:
            asked.append(str([one.genome.digest for one in journal.candidates(MAIN)]))
    assert asked[-1] == asked[-2]


def test_a_repaired_winner_is_exported_and_scores_as_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run", replace(CONFIG, tasks=[replace(CONFIG.tasks[0], metric="probability")]))
    pruned, best = folder.read_result().rows[1:]
    assert best.operator == REPAIR and best.scores["validation"].fitness > pruned.scores["validation"].fitness
    small = str(tmp_path / "small")
    assert main(["export", str(folder.path), "--to", small]) == 0
    capsys.readouterr()
    tasks = json.dumps([{"data": "syll", "num_test": 16, "metric": "probability"}])
    assert main(["evaluate", "--model.path", small, "--tasks", tasks, "--split", "test", "--json", "true"]) == 0
    told = capsys.readouterr().out
    assert json.loads(told)["fitness"] == pytest.approx(best.scores["test"].fitness, abs=1e-5)


EXAMPLES = {"search": [24], "validation": [16], "test": [16]}


def test_asking_how_alike_experts_are_is_planned_as_one_more_evaluation() -> None:
    bare = replace(CONFIG, search=replace(CONFIG.search, surrogate=SurrogateConfig()))
    planned = [evaluations_by_split(one, EXAMPLES, can_prune=True)["search"] for one in (bare, CONFIG)]
    assert planned[1] == planned[0] + 2, "and one more row of the table, by another metric"


def individual(number: int, fitness: float, genome: Genome, operator: str, *parents: int) -> Individual:
    return Individual(Candidate(number, genome, operator, parents), Evaluation(fitness))


def test_a_repair_may_win_only_if_it_gains_on_validation() -> None:
    space = SearchSpace.build(ModelSource(CONFIG.model).shape, num_kept=2)
    pruning, other = (Genome.from_kept([kept] * 4, 8, 2) for kept in ([0, 1], [2, 3]))
    repairs = Repairs(space, pruning)
    made = [repairs.genome(np.full(repairs.size, size)) for size in (1.0, 2.0, 3.0)]
    some = [
        individual(1, 0.5, pruning, "swap_mutation", 0),
        individual(2, 0.7, other, "swap_mutation", 0),
        individual(8, 0.6, made[0], REPAIR, 1),
        individual(9, 0.5, made[1], REPAIR, 1),
        individual(10, 0.9, made[2], REPAIR, 5),
    ]
    assert [one.number for one in without_idle_repairs(some)] == [1, 2, 8]
    assert without_idle_repairs([]) == []
    assert [one.number for one in with_their_prunings([some[2], some[3]], Population(tuple(some)))] == [8, 9, 1]
    assert [one.number for one in with_their_prunings(some, Population(tuple(some)))] == [1, 2, 8, 9, 10]


def test_repair_and_several_objectives_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"search.surrogate.repair: got 0.5, expected 0, as a front"):
        replace(CONFIG.search, objectives=["quality", "active"])
