"""One-shot methods in a search: beside its winner, and as what it begins from."""

from __future__ import annotations

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
from moe_evo.config.search import EEPConfig, SearchConfig, SurrogateConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.observation_file import load_observations
from moe_evo.criteria.registry import METHODS
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool
from moe_evo.genomes.population import Candidate
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, REFERENCE, Journal
from moe_evo.runs import open_pool, selection
from moe_evo.runs.workload import evaluations_by_split
from moe_evo.searches.beginning import origins
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.terminal import TerminalTracker

NAMES = ["syll", "nli"]
CONFIG = RunConfig(
    model=ModelConfig(self_check=False),
    tasks=[TaskConfig(data=name, num_search=12, num_validation=8, num_test=8) for name in NAMES],
    search=SearchConfig(
        algorithm="eep", num_kept=4, evaluations=32, eep=EEPConfig(num_initial=8), init=["random", "reap", "aimer"]
    ),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=2, baselines=["reap", "frequency"]),
)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return open_pool.load_evaluator(
        ModelSource(CONFIG.model), check_tasks(CONFIG.tasks), CONFIG.evaluation, TerminalTracker()
    )


@pytest.fixture
def asked(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pools of this process are asked; their model is loaded once."""
    names: list[str] = []
    ask = LocalPool.ask

    def noting(pool: LocalPool, questions: Any) -> Iterator[Any]:
        for question in questions:
            names.append(f"{type(question).__name__} {question.task}")
            yield from ask(pool, [question])

    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
    monkeypatch.setattr(LocalPool, "ask", noting)
    return names


def run(folder: Path, config: RunConfig = CONFIG) -> RunFolder:
    with TerminalTracker() as tracker:
        return search_command(replace(config, folder=str(folder)), tracker)


def candidates(folder: RunFolder, search: str) -> list[Candidate]:
    with folder.open_journal() as journal:
        return list(journal.candidates(search))


def test_baselines_stand_in_the_table_and_seeds_at_the_beginning_of_the_search(
    asked: list[str], evaluator: Evaluator, tmp_path: Path
) -> None:
    folder = run(tmp_path / "run")
    assert asked == ["Routed syll", "Routed nli", "Weights "], "each question once, for all methods together"
    rows = folder.read_result().rows
    assert [row.key for row in rows] == ["full", "reap", "frequency", "best_pruning", "best"]
    assert [row.title for row in rows[1:3]] == ["reap pruning", "frequency pruning"]
    space = SearchSpace.build(evaluator.model.shape, num_kept=4)
    genomes = {name: METHODS[name].genome(observer_of(evaluator), space) for name in ("reap", "frequency", "aimer")}
    assert {row.key: row.digest for row in rows[1:3]} == {name: genomes[name].digest for name in ("reap", "frequency")}
    first = candidates(folder, MAIN)[:8]
    operators = ["reap"] + ["reap_mutation"] * 2 + ["aimer"] + ["aimer_mutation"] + ["random_pruning"] * 3
    assert [one.operator for one in first] == operators
    assert [first[0].genome, first[3].genome] == [genomes["reap"], genomes["aimer"]]
    assert {one.parents for one in first[1:3]} == {(0,)} and first[4].parents == (3,)
    assert len({one.genome.digest for one in first}) == 8


def test_a_run_that_was_interrupted_asks_only_what_it_does_not_know(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    assert asked
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        ask = LocalPool.ask

        def stopping(pool: LocalPool, questions: Any) -> Iterator[Any]:
            yield from ask(pool, questions[:1])
            raise KeyboardInterrupt

        patch.setattr(LocalPool, "ask", stopping)
        run(tmp_path / "run")
    asked.clear()
    again = run(tmp_path / "run")
    assert asked == ["Routed nli", "Weights "]
    assert candidates(again, MAIN) == candidates(whole, MAIN)
    assert candidates(again, REFERENCE) == candidates(whole, REFERENCE)
    stored = load_observations(again.observations)
    assert len(stored.answers) == 3


def test_a_run_that_keeps_all_experts_has_neither_baselines_nor_seeds(asked: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path / "run", replace(CONFIG, search=replace(CONFIG.search, num_kept=8)))
    assert not asked
    assert [row.key for row in folder.read_result().rows] == ["full", "best"]


def test_seeds_share_genes_where_the_search_does(asked: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path / "run", replace(CONFIG, search=replace(CONFIG.search, num_layer_groups=2)))
    for one in candidates(folder, MAIN)[:5]:
        layers = one.genome.layers
        assert layers[0] == layers[1] and layers[2] == layers[3]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"random": 1}, {"random": 31}),
        ({"random": 1, "reap": 1}, {"reap": 16, "random": 15}),
        ({"reap": 3, "random": 0, "ean": 1}, {"reap": 23, "ean": 8}),
        ({"reap": 1e-9, "random": 1}, {"random": 31}),
    ],
)
def test_shares_of_initial_candidates_are_kept_to_and_what_is_random_comes_last(
    shares: dict[str, float], expected: dict[str, int]
) -> None:
    found = origins(shares, 31)
    assert found == [name for name, number in expected.items() for _ in range(number)]


def test_no_initial_candidate_is_lost_between_shares() -> None:
    rng = np.random.default_rng(0)
    for number in range(1, 40):
        shares = dict(zip(["random", "reap", "ean", "msan"], rng.random(4) + 1e-3, strict=True))
        assert len(origins(shares, number)) == number


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--selection.baselines", "[reap, best]"], "selection.baselines: got 'best', expected one of frequency, "),
        (["--search.init", "[rnd]"], "search.init: got 'rnd', did you mean 'random'? expected one of random, "),
        (["--search.init", "{reap: -1}"], "search.init: got {'reap': -1.0}, expected names, or names with shares"),
        (["--search.init", "[]"], "search.init: got [], expected names"),
        (["--search.init", "[reap]", "--search.algorithm", "random"], "only 'random' in a random search"),
        (
            ["--search.algorithm", "eep", "--search.init", "[m_smoe]", "--search.num_layer_groups", "2"],
            "m_smoe gives each layer experts of its own",
        ),
    ],
)
def test_names_that_mean_nothing_end_a_run_before_a_model_is_loaded(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(open_pool, "load_evaluator", None)
    assert main(["search", "--folder", str(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize("method", ["m_smoe", "naee", "task_specific"])
def test_a_search_may_begin_from_any_method(method: str, asked: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path / "run", replace(CONFIG, search=replace(CONFIG.search, init=[method])))
    first = candidates(folder, MAIN)[:8]
    assert [one.operator for one in first] == [method] + [f"{method}_mutation"] * 7
    assert len({one.genome.digest for one in first}) == 8
    assert first[0].genome.is_pruning == (method != "m_smoe")


def test_a_journal_tells_which_method_made_what(asked: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    with Journal(folder.path / "journal.sqlite", read_only=True) as journal:
        assert [one.operator for one in journal.candidates(REFERENCE)] == ["full", "reap", "frequency", "aimer"]


def test_what_criteria_think_of_experts_is_known_to_a_search_that_learns(
    asked: list[str], evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    made = selection.build_search
    monkeypatch.setattr(selection, "build_search", lambda *given: (told.append(given[-1]), made(*given))[1])
    surrogate = SurrogateConfig(num_warmup=8, priors=["reap", "aimer"])
    changed = replace(CONFIG.search, algorithm="surrogate", surrogate=surrogate, eep=EEPConfig())
    folder = run(tmp_path / "run", replace(CONFIG, search=changed))
    assert asked == ["Routed syll", "Routed nli", "Weights "]
    observer = observer_of(evaluator)
    for name, scores in told[0].items():
        np.testing.assert_allclose(scores, METHODS[name].scores(observer), rtol=1e-5)
    assert list(told[0]) == ["reap", "aimer"]
    found = candidates(folder, MAIN)
    assert [one.operator for one in found][:4] == ["aimer", "reap", "reap_mutation", "aimer_mutation"]
    assert not {one.operator for one in found[8:]} <= {"random_pruning"}
    assert [row.title for row in folder.read_result().rows][-1] == "surrogate"


def test_observing_for_opinions_is_planned_as_one_more_evaluation() -> None:
    knowing = replace(CONFIG, search=SearchConfig(algorithm="surrogate"), selection=SelectionConfig(baselines=[]))
    config = replace(knowing, search=replace(knowing.search, surrogate=SurrogateConfig(priors=[])))
    planned = [
        evaluations_by_split(one, {"search": [12], "validation": [8]}, can_prune=True) for one in (config, knowing)
    ]
    assert planned[1] == planned[0] | {"search": planned[0]["search"] + 1}
