"""A search that maximises another metric than it reports: what is journaled, chosen by, shown, and continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_tasks as tiny
from child_runs import content

import moe_evo
from moe_evo.cli.main import main
from moe_evo.commands.plan import plan
from moe_evo.commands.search import search as search_command
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import SPLITS, TaskConfig, fitness_label
from moe_evo.errors import RunError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.population import Evaluation
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, REFERENCE
from moe_evo.records.result import Row
from moe_evo.records.statistics import winners_curse
from moe_evo.report.record import read_records
from moe_evo.runs import open_pool
from moe_evo.tasks.data import REPORTED, check_tasks
from moe_evo.tracking.terminal import TerminalTracker

TASK = TaskConfig(data="syll", num_search=24, num_validation=8, num_test=16, search_metric="probability")
CONFIG = RunConfig(
    model=ModelConfig(self_check=False),
    tasks=[TASK],
    search=SearchConfig(algorithm="eep", num_kept=4, evaluations=20, seed=3),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=3, random_search=True),
)
NOTE = "the search maximised syll (probability); every column shows syll (accuracy)"


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    data = check_tasks(CONFIG.tasks)
    return open_pool.load_evaluator(ModelSource(CONFIG.model), data, CONFIG.evaluation, TerminalTracker())


@pytest.fixture(scope="module", autouse=True)
def resident(evaluator: Evaluator) -> Iterator[None]:
    """Runs of CONFIG share one loaded model in place of loading it each time."""
    load = open_pool.load_evaluator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            open_pool,
            "load_evaluator",
            lambda source, data, *more: (
                evaluator if [one.config for one in data] == CONFIG.tasks else load(source, data, *more)
            ),
        )
        yield


def run(folder: Path, config: RunConfig = CONFIG) -> RunFolder:
    with TerminalTracker() as tracker:
        return search_command(replace(config, folder=str(folder)), tracker)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(tmp_path_factory.mktemp("finished") / "run")


def outcome_of(folder: RunFolder, row: Row, split: str) -> Evaluation:
    search = {"best": MAIN, "best_pruning": MAIN, "random_search": "random"}.get(row.key, REFERENCE)
    with folder.open_journal() as journal:
        outcome = journal.outcomes(search, split)[row.candidate]
    assert isinstance(outcome, Evaluation) and outcome.scores is not None
    return outcome


def test_fitness_and_scores_in_the_journal_are_of_the_search_metric_on_the_search_split_alone(
    finished: RunFolder,
) -> None:
    with finished.open_journal() as journal:
        found = {split: journal.outcomes(MAIN, split).values() for split in (*SPLITS, REPORTED)}
    for split, metric in (("search", "probability"), *((one, "accuracy") for one in ("validation", "test", REPORTED))):
        for one in found[split]:
            assert isinstance(one, Evaluation) and one.scores is not None
            scores = one.scores["syll"]
            assert one.fitness == pytest.approx(one.metrics[f"syll/{metric}"]) == pytest.approx(scores.mean())
            assert one.standard_error == pytest.approx(scores.std(ddof=1) / np.sqrt(len(scores)))
            assert np.isin(scores, (0.0, 1.0)).all() == (metric == "accuracy")
    assert len(found["search"]) == 20


def test_every_column_of_the_final_table_is_of_the_metric(finished: RunFolder) -> None:
    result = finished.read_result()
    assert [row.key for row in result.rows] == ["full", "frequency", "reap", "random_search", "best_pruning", "best"]
    for row in result.rows:
        for split in SPLITS:
            score = row.scores[split]
            assert score.fitness == score.metrics["syll/accuracy"]
        assert row.scores["search"].fitness * 24 == pytest.approx(round(row.scores["search"].fitness * 24))
        reported = outcome_of(finished, row, REPORTED)
        assert row.scores["search"].fitness == reported.fitness
        if row.key not in ("frequency", "reap"):  # they take no part in the search
            assert outcome_of(finished, row, "search").metrics == reported.metrics
    (task,) = result.tasks
    assert (task.metric, task.search_metric) == ("accuracy", "probability")


def test_luck_is_of_the_scores_that_the_table_shows(finished: RunFolder) -> None:
    result = finished.read_result()
    winner, full = (
        {split: outcome_of(finished, row, REPORTED if split == "search" else split).scores or {} for split in SPLITS}
        for row in (result.best, result.full)
    )
    assert result.winners_curse == winners_curse(winner, np.random.default_rng(0), full)


def test_the_search_ranks_by_what_it_maximises_and_the_winner_is_chosen_by_what_is_reported(
    finished: RunFolder,
) -> None:
    with finished.open_journal() as journal:
        searched = {n: one for n, one in journal.outcomes(MAIN, "search").items() if isinstance(one, Evaluation)}
        validated = {n: one for n, one in journal.outcomes(MAIN, "validation").items() if isinstance(one, Evaluation)}
    best = sorted(searched, key=lambda number: (-searched[number].fitness, number))[:3]
    assert set(best) <= set(validated)
    winner = min(validated, key=lambda n: (-validated[n].fitness, -validated[n].tie_break, n))
    assert finished.read_result().best.candidate == winner


def test_show_names_both_under_the_table(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(finished.path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "mean over syll (accuracy); higher is better" in text and NOTE in text
    assert main(["show", str(finished.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0]["search_metric"] == "probability"
    assert NOTE in moe_evo.load_run(finished.path)._repr_html_()
    assert "fitness (probability) on the search split" in moe_evo.load_run(finished.path)._repr_html_()


def test_plan_names_both_and_counts_the_rows_that_are_scored_again(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = json.dumps([{"data": "syll", "search_metric": "probability"}])
    assert main(["plan", "--tasks", task, "--folder", str(tmp_path / "run")]) == 0
    assert "task        syll (choice, accuracy; the search maximises probability): " in capsys.readouterr().out
    planned = plan(replace(CONFIG, folder=str(tmp_path / "run"))).search
    assert planned is not None
    with finished.open_journal() as journal:
        found = {
            (search, one.genome.digest, split)
            for search in (MAIN, REFERENCE, "random")
            for split in ("search", REPORTED)
            for one in journal.individuals(search, split)
        }
    observed = 1  # a pass for the one-shot methods, which is no evaluation
    assert planned.evaluations["search"] == len(found) + observed


def test_the_report_labels_fitness_and_draws_no_finalists_of_another_metric_beside_it(
    finished: RunFolder, tmp_path: Path
) -> None:
    from moe_evo.report.page import render_page
    from moe_evo.report.payload import curve, lineage

    (record,) = read_records([finished.path])
    assert record.validation and record.full is not None
    drawn = curve(record)
    assert drawn["label"] == lineage(record)["label"] == "fitness (probability)" and drawn["validation"] == []
    assert drawn["full"] == pytest.approx(record.full.metrics["syll/probability"], rel=1e-4)
    assert NOTE in render_page([record])


def test_evaluate_reports_the_metric_on_every_split(finished: RunFolder) -> None:
    result = finished.read_result()
    for split in SPLITS:
        assert moe_evo.load_run(finished.path).evaluate(split=split).score == result.best.scores[split]


def test_the_model_card_names_what_the_search_maximised(finished: RunFolder, tmp_path: Path) -> None:
    moe_evo.load_run(finished.path).export(tmp_path / "small")
    assert "accuracy (the search maximised probability)" in (tmp_path / "small" / "README.md").read_text()


def test_an_interrupted_run_goes_on_and_ends_with_the_same_journal(
    finished: RunFolder, evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    evaluate, calls = Evaluator.evaluate, []

    def interrupted(*arguments: object, **more: object) -> object:
        calls.append(1)
        if len(calls) in (12, 40):
            raise KeyboardInterrupt
        return evaluate(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Evaluator, "evaluate", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    with pytest.raises(RunError, match=r"tasks\[0\]\.search_metric: 'probability' -> 'log_likelihood'"):
        run(tmp_path / "run", replace(CONFIG, tasks=[replace(TASK, search_metric="log_likelihood")]))
    capsys.readouterr()
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "best fitness (probability) 0." in capsys.readouterr().out
    (unfinished,) = read_records([tmp_path / "run"])
    from moe_evo.report.lines import lines_of
    from moe_evo.report.sections import section

    assert {line.search for line in lines_of(unfinished)} == {None}, "the metric's is not known yet"
    assert "best fitness (probability), search split" in {name for name, *_ in section(unfinished, 0).headline}
    run(tmp_path / "run")
    assert content(tmp_path / "run") == content(finished.path)


def test_a_run_without_it_evaluates_and_writes_what_it_did_before(tmp_path: Path) -> None:
    config = replace(CONFIG, tasks=[replace(TASK, search_metric="default")])
    named = replace(CONFIG, tasks=[replace(TASK, search_metric="accuracy")])
    first, second = run(tmp_path / "first", config), run(tmp_path / "second", named)
    found = first.read_result()
    assert content(first.path) == content(second.path), "the metric's own name is the default"
    assert {row[3] for row in content(first.path)["outcomes"]} == set(SPLITS)
    assert "search_metric" not in first.result.read_text() and found.search_note is None
    assert found.rows == second.read_result().rows


def test_racing_compares_by_the_search_metric(tmp_path: Path) -> None:
    tasks = [TaskConfig(data="nli", num_search=100, num_validation=8, num_test=8, search_metric="probability")]
    search = SearchConfig(algorithm="random", num_kept=2, evaluations=60, seed=1)
    config = replace(CONFIG, tasks=tasks, search=search, selection=SelectionConfig(baselines=[]))
    folder = run(tmp_path / "run", replace(config, evaluation=EvaluationConfig(threads=1, race=0.8)))
    with folder.open_journal() as journal:
        stopped = [
            one for one in journal.outcomes(MAIN, "search").values() if isinstance(one, Evaluation) and one.is_stopped
        ]
    assert stopped and all(one.fitness == pytest.approx(one.metrics["nli/probability"]) for one in stopped)
    result = folder.read_result()
    assert all(row.scores["search"].num_examples == 100 for row in result.rows)


def test_several_tasks_maximise_the_mean_of_their_search_metrics(tmp_path: Path) -> None:
    tasks = [
        TaskConfig(data="syll", num_search=12, num_validation=8, num_test=8, search_metric="probability"),
        TaskConfig(data="nli", num_search=12, num_validation=8, num_test=8),
    ]
    search = replace(CONFIG.search, evaluations=6)
    selection = SelectionConfig(finalists=2, baselines=[])
    folder = run(tmp_path / "run", replace(CONFIG, tasks=tasks, search=search, selection=selection))
    with folder.open_journal() as journal:
        for one in journal.outcomes(MAIN, "search").values():
            assert isinstance(one, Evaluation)
            expected = (one.metrics["syll/probability"] + one.metrics["nli/accuracy"]) / 2
            assert one.fitness == pytest.approx(expected)
    for row in (result := folder.read_result()).rows:
        metrics = row.scores["search"].metrics
        assert row.scores["search"].fitness == pytest.approx((metrics["syll/accuracy"] + metrics["nli/accuracy"]) / 2)
    assert result.search_note == (
        "the search maximised syll (probability), nli (accuracy); every column shows syll (accuracy), nli (accuracy)"
    )


def test_a_generation_task_is_searched_by_its_answers_likelihood_and_reported_by_what_is_generated(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"{a} plus {b} is", "answers": [str(a + b)]} for a in range(4) for b in range(3)]
    data = tiny.write_splits(tmp_path / "sums", rows)
    task = TaskConfig(data=data, metric="contains", search_metric="log_likelihood", max_new_tokens=4)
    search = replace(CONFIG.search, evaluations=6)
    selection = SelectionConfig(finalists=2, baselines=["frequency"])
    folder = run(tmp_path / "run", replace(CONFIG, tasks=[task], search=search, selection=selection))
    with folder.open_journal() as journal:
        for one in journal.outcomes(MAIN, "search").values():
            assert isinstance(one, Evaluation) and one.metrics.keys() == {"sums/log_likelihood"}
            assert one.fitness == one.metrics["sums/log_likelihood"] < 0
    for row in folder.read_result().rows:
        for split in SPLITS:
            score = row.scores[split]
            assert score.fitness == score.metrics["sums/contains"] >= 0 and score.low >= 0
            assert "sums/log_likelihood" not in score.metrics


def test_fitness_is_labelled_by_what_the_tasks_name() -> None:
    probable, plain = TaskConfig(data="syll", search_metric="probability"), TaskConfig(data="nli")
    assert fitness_label([plain]) == "fitness"
    assert fitness_label([replace(plain, metric="accuracy", search_metric="accuracy")]) == "fitness"
    assert fitness_label([probable, replace(probable, data="nli")]) == "fitness (probability)"
    assert fitness_label([probable, plain]) == "fitness (probability, default metric)"
    assert fitness_label([probable, replace(plain, metric="f1")]) == "fitness (probability, f1)"
