"""Whole runs: how the winner is chosen, and searches on fresh examples."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from child_runs import content, in_child, wait_for_outcomes

import moe_evo
from moe_evo.cli.main import main
from moe_evo.commands.plan import plan
from moe_evo.commands.search import search
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig, SurrogateConfig
from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.fresh_examples import FreshExamples
from moe_evo.genomes.population import Evaluation, Population
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, RANDOM, REFERENCE
from moe_evo.records.paired import Paired, PairedByTask
from moe_evo.records.statistics import Difference
from moe_evo.report.terminal import print_run
from moe_evo.runs.finalists import are_apart, finalists
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.searches.registry import build_space
from moe_evo.searches.scored import expected_scores
from moe_evo.tasks.data import REPORTED, check_tasks
from moe_evo.tasks.samples import Sample
from moe_evo.tracking.terminal import TerminalTracker

HALVED = RunConfig(
    model=ModelConfig(self_check=False),
    tasks=[TaskConfig(data="syll", num_search=32, num_validation=100, num_test=16)],
    search=SearchConfig(num_kept=4, evaluations=16, seed=3, algorithm="random"),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=8, baselines=[]),
)
FRESH = replace(
    HALVED,
    tasks=[TaskConfig(data="syll", num_search=96, num_validation=8, num_test=16)],
    search=SearchConfig(
        num_kept=4, evaluations=24, seed=3, algorithm="surrogate", surrogate=SurrogateConfig(num_warmup=10, priors=[])
    ),
    evaluation=EvaluationConfig(threads=1, examples="fresh", sample_size=24),
    selection=SelectionConfig(finalists=3, baselines=[], random_search=True),
)


def run(folder: Path, config: RunConfig) -> RunFolder:
    with TerminalTracker() as tracker:
        return search(replace(config, folder=str(folder)), tracker)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(tmp_path_factory.mktemp("halved") / "run", HALVED)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(tmp_path_factory.mktemp("fresh") / "run", FRESH)


def test_finalists_are_halved_on_a_quarter_and_another_before_they_see_the_whole_split(halved: RunFolder) -> None:
    with halved.open_journal() as journal:
        splits = ["validation/25/0", "validation/25/1", "validation"]
        seen = [set(journal.outcomes(MAIN, split)) for split in splits]
        examples = {one.num_examples for one in journal.outcomes(MAIN, splits[0]).values()}
        population = Population(tuple(journal.individuals(MAIN)))
    assert [len(one) for one in seen] == [8, 4, 2] and seen[0] > seen[1] > seen[2]
    assert examples == {25}
    space = build_space(ModelSource(HALVED.model).shape, HALVED.search)
    first = finalists(population, expected_scores(space, population), 8)
    assert {one.number for one in first} == seen[0]
    assert all(are_apart(one.genome, other.genome) for one in first for other in first if one is not other)


def test_the_winner_saw_the_whole_split_and_the_result_says_what_to_expect(
    halved: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    result = halved.read_result()
    with halved.open_journal() as journal:
        assert result.best.candidate in journal.outcomes(MAIN, "validation")
    assert result.best.validation is not None and result.expected is not None
    assert main(["show", str(halved.path)]) == 0
    told = f"expected {result.expected:.3f} of the winner on new examples ({result.best.validation.fitness:.3f} on the"
    assert told in capsys.readouterr().out
    assert main(["report", str(halved.path), "--to", str(halved.path / "page.html")]) == 0
    assert "expected of the winner on new examples" in (halved.path / "page.html").read_text()


def test_plan_counts_parts_of_the_validation_split_as_parts(halved: RunFolder, tmp_path: Path) -> None:
    planned = plan(replace(HALVED, folder=str(tmp_path / "run"))).search
    with halved.open_journal() as journal:
        made = sum(
            one.num_examples
            for name in (MAIN, REFERENCE)
            for split in journal.splits(name)
            if split.startswith("validation")
            for one in journal.outcomes(name, split).values()
        )
    assert planned is not None and made / 100 <= planned.evaluations["validation"] <= made / 100 + 1


def test_ten_candidates_are_scored_on_a_sample_and_the_journal_names_it(fresh: RunFolder) -> None:
    with fresh.open_journal() as journal:
        for name in (MAIN, RANDOM):
            split_of = {number: s for s in journal.splits(name) for number in journal.outcomes(name, s) if "/" in s}
            assert split_of == {number: f"search/24/{number // 10}" for number in range(24)}
            assert {one.sample for one in journal.told(name).values()} == {0, 1, 2}
            assert {one.num_examples for one in journal.told(name).values()} == {24}


def test_a_journaled_score_is_that_of_the_examples_it_names_corrected_by_the_full_models(fresh: RunFolder) -> None:
    data = check_tasks(FRESH.tasks)
    with fresh.open_journal() as journal:
        individuals, full = journal.individuals(MAIN), journal.outcomes(REFERENCE, "search")[0]
    examples = {one.name: one.splits["search"] for one in data}
    correct = FreshExamples(24, "mean", examples, full.scores).corrected
    with TerminalTracker() as tracker:
        evaluator: Evaluator = load_evaluator(ModelSource(FRESH.model), data, FRESH.evaluation, tracker)
    for one in (individuals[0], individuals[13], individuals[23]):
        sample = Sample("search", 24, one.number // 10)
        numbers = {name: sample.of(some) for name, some in examples.items()}
        (outcome,) = evaluator.evaluate([one.genome], "search", numbers)
        wanted = correct(outcome, sample)
        assert isinstance(wanted, Evaluation)
        assert one.evaluation.fitness == pytest.approx(wanted.fitness)
        assert one.evaluation.standard_error == pytest.approx(wanted.standard_error)


def test_the_final_table_is_of_the_whole_search_split(fresh: RunFolder) -> None:
    result = fresh.read_result()
    assert {row.scores["search"].num_examples for row in result.rows} == {96}
    assert result.winners_curse is not None
    with fresh.open_journal() as journal:
        assert result.best.candidate in journal.outcomes(MAIN, REPORTED)


def test_readers_of_a_run_know_scores_on_samples(fresh: RunFolder, tmp_path: Path) -> None:
    assert main(["show", str(fresh.path)]) == 0
    assert main(["report", str(fresh.path), "--to", str(tmp_path / "page.html")]) == 0
    run_ = moe_evo.load_run(fresh.path)
    assert run_.evaluate(split="search").score == run_.result.best.search
    assert run_.export(tmp_path / "small").report.max_logit_difference < 1e-4


def test_a_killed_run_on_samples_goes_on_and_ends_with_the_same_journal(fresh: RunFolder, tmp_path: Path) -> None:
    child = in_child(partial(run, tmp_path / "run", FRESH))
    wait_for_outcomes(tmp_path / "run", 14, child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert content(run(tmp_path / "run", FRESH).path) == content(fresh.path)


def test_plan_counts_samples_as_parts_and_refuses_large_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan(replace(FRESH, folder=str(tmp_path / "run"))).search
    assert planned is not None and planned.evaluations["search"] == 2 * 24 * 24 / 96 + 1 + 3
    words = ["search", "--tasks", "syll", "--evaluation.examples", "fresh", "--evaluation.sample_size", "200"]
    assert main([*words, "--folder", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "evaluation.sample_size: got 200, expected at most half of the 300 search examples of task syll" in told


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (
            Difference(0.279, 0.2, 0.3, 48),
            "+0.368 on the search split, +0.089 on the test split: lower by 0.279 [0.200, 0.300]",
        ),
        (
            Difference(-0.167, -0.3, 0.1, 48),
            "-0.078 on the search split, +0.089 on the test split: higher by 0.167 [-0.100, 0.300]",
        ),
    ],
)
def test_luck_says_which_way_the_lead_went(
    halved: RunFolder, capsys: pytest.CaptureFixture[str], lost: Difference, told: str
) -> None:
    result = halved.read_result()
    assert result.winners_curse is not None
    lead = PairedByTask(Paired(Difference(0.089, 0.01, 0.16, 48)))
    curse = replace(result.winners_curse, search_test=lost)
    print_run(halved, replace(result, winners_curse=curse, against_full=lead))
    out = capsys.readouterr().out
    assert f"luck     winner minus full model is {told}\n" in out
    assert (
        "verdict  the winner is better than the full model: +0.089 [+0.010, +0.160] on the same 48 test examples" in out
    )
