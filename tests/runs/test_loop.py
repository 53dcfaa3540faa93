"""A whole run on the embedded model: what it leaves behind, resuming, and surviving SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from child_runs import content, in_child, num_outcomes, wait_for_outcomes

from moe_evo.cli.main import main
from moe_evo.commands.search import search as search_command
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import EEPConfig, SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ModelError, OutOfMemory, RunError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.file import load_genome
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import EvaluationFailure, Outcome
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder, resumed_config
from moe_evo.records.journal import Journal
from moe_evo.report.terminal import print_run
from moe_evo.runs import open_pool
from moe_evo.tasks.data import check_tasks
from moe_evo.tasks.registry import build_task
from moe_evo.tracking.terminal import TerminalTracker

TASK = TaskConfig(data="syll", num_search=16, num_validation=8, num_test=16)
CONFIG = RunConfig(
    model=ModelConfig(self_check=False),
    tasks=[TASK],
    search=SearchConfig(algorithm="eep", num_kept=4, evaluations=24, seed=3),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=3, random_search=True),
)
UNOBSERVED = replace(CONFIG, selection=replace(CONFIG.selection, baselines=[]))
"""For tests whose model has other tasks than their config, about which nothing can be asked."""


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    data = check_tasks(CONFIG.tasks)
    return open_pool.load_evaluator(ModelSource(CONFIG.model), data, CONFIG.evaluation, TerminalTracker())


@pytest.fixture
def resident(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    """Runs of this test share one loaded model in place of loading it each time."""
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
    return evaluator


def run(folder: Path, config: RunConfig = CONFIG) -> RunFolder:
    with TerminalTracker() as tracker:
        return search_command(replace(config, folder=str(folder)), tracker)


@pytest.fixture(scope="module")
def finished(evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """An uninterrupted run of CONFIG."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
        yield run(tmp_path_factory.mktemp("finished") / "run")


def test_a_finished_run_leaves_config_result_genomes_and_pictures(finished: RunFolder) -> None:
    result = finished.read_result()
    assert [row.key for row in result.rows] == ["full", "frequency", "reap", "random_search", "best_pruning", "best"]
    for row in result.rows:
        assert set(row.scores) == {"search", "validation", "test"}
        assert row.test is not None and row.test.low <= row.test.fitness <= row.test.high
        assert row.test.num_examples == 16
    assert result.search == replace(result.search, evaluations=24, failures=0, seed=3, algorithm="eep")
    assert result.model.hash and result.tasks[0].hash and result.software["torch"]
    assert load_genome(finished.best).digest == result.best.digest
    assert load_genome(finished.best_pruning).is_pruning
    for picture in (finished.figure, finished.kept_figure):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_written_config_runs_again_as_it_is(finished: RunFolder, resident: Evaluator, tmp_path: Path) -> None:
    again = replace(resumed_config(str(finished.path)), folder=str(tmp_path / "again"))
    run(tmp_path / "again", again)
    assert content(tmp_path / "again") == content(finished.path)


@pytest.fixture
def seen(resident: Evaluator, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Digest and split of every genome that is really evaluated, in order."""
    evaluated: list[tuple[str, str]] = []
    evaluate = resident.evaluate

    def counting(genomes: list[Genome], split: str, **more: Any) -> list[Outcome]:
        evaluated.extend((genome.digest, split) for genome in genomes)
        return evaluate(genomes, split, **more)

    monkeypatch.setattr(resident, "evaluate", counting)
    return evaluated


def test_no_digest_is_evaluated_twice(finished: RunFolder, seen: list[tuple[str, str]], tmp_path: Path) -> None:
    run(tmp_path / "run")
    assert len(seen) == len(set(seen)) > 24
    assert content(tmp_path / "run") == content(finished.path)


def test_the_search_and_the_choice_never_see_the_test_split(finished: RunFolder) -> None:
    rows = content(finished.path)["outcomes"]
    splits = [row[3] for row in rows]
    assert set(splits[: splits.index("test")]) == {"search", "validation"}
    assert set(splits[splits.index("test") :]) == {"test"}
    assert splits.count("test") == 6


def test_a_genome_that_two_searches_found_is_scored_once_for_both_rows(
    seen: list[tuple[str, str]], tmp_path: Path
) -> None:
    # one layer group and 7 of 8: both searches see all 8 prunings, so they choose the same winner
    search = SearchConfig(algorithm="eep", num_kept=7, num_layer_groups=1, evaluations=8, eep=EEPConfig(num_pruning=31))
    result = run(tmp_path / "run", replace(CONFIG, search=search)).read_result()
    digests = {row.key: row.digest for row in result.rows}
    assert digests["best"] == digests["random_search"]
    assert len(seen) == len(set(seen))


def test_where_and_how_fast_a_run_computes_may_change_when_it_goes_on(
    evaluator: Evaluator, finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: InterruptedRun(evaluator, 5))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
    other = replace(CONFIG.evaluation, batch_tokens=64, threads=2)
    run(tmp_path / "run", replace(CONFIG, evaluation=other, model=replace(CONFIG.model, device="cpu")))
    assert resumed_config(str(tmp_path / "run")).evaluation.batch_tokens == 64
    assert content(tmp_path / "run") == content(finished.path)


@pytest.mark.parametrize("baselines", [["frequency"], []])
def test_out_of_memory_is_one_line_that_says_what_to_lower(
    baselines: list[str], evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    other = Evaluator(evaluator.model, evaluator.tasks, CONFIG.evaluation)
    monkeypatch.setattr(evaluator.model.language_model, "forward", exhausted)
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: other)
    with pytest.raises(OutOfMemory, match=r"out of memory on cpu with one row in a batch: lower evaluation.batch_tok"):
        run(tmp_path / "run", replace(CONFIG, selection=SelectionConfig(baselines=baselines)))


def test_a_full_model_without_fitness_does_not_bind_the_folder(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: FailingEvaluator(evaluator, 1))
    with pytest.raises(ModelError, match=r"try model\.dtype float32"):
        run(tmp_path / "run")
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
    result = run(tmp_path / "run", replace(CONFIG, model=replace(CONFIG.model, dtype="float32"))).read_result()
    assert result.search.evaluations == 24


def test_a_config_written_before_an_option_existed_still_resumes(finished: RunFolder, resident: Evaluator) -> None:
    text = finished.config.read_text()
    assert "  multiple_of: 1\n" in text
    finished.config.write_text(text.replace("  multiple_of: 1\n", ""))
    run(finished.path)


def test_a_run_means_the_same_from_another_folder(
    resident: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    rows = [{"prompt": f"verb: go{n}\npast:", "choices": [" went.", " goed."], "label": 0} for n in range(60)]
    (tmp_path / "here" / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path / "here")
    run(tmp_path / "run", replace(UNOBSERVED, tasks=[TaskConfig(data="task.jsonl")]))
    monkeypatch.chdir(tmp_path / "there")
    config = resumed_config(str(tmp_path / "run"))
    assert config.tasks[0].data == str(tmp_path / "here" / "task.jsonl")
    run(tmp_path / "run", config)


def test_what_a_killed_start_left_behind_does_not_bar_the_next_one(resident: Evaluator, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.yaml.123").write_text("model:")
    Journal(folder / "journal.sqlite").close()
    assert run(folder).result.is_file()


def test_a_second_start_of_a_finished_run_changes_nothing(finished: RunFolder, resident: Evaluator) -> None:
    before = {path.name: path.read_bytes() for path in finished.path.iterdir() if path.name != "journal.lock"}
    run(finished.path)
    after = {path.name: path.read_bytes() for path in finished.path.iterdir() if path.name != "journal.lock"}
    assert before == after


def test_another_config_on_an_old_folder_is_refused_with_the_difference(finished: RunFolder) -> None:
    other = replace(CONFIG, search=replace(CONFIG.search, seed=4, num_kept=2))
    with pytest.raises(RunError, match=r"search.num_kept: 4 -> 2; search.seed: 3 -> 4.*--resume"):
        run(finished.path, other)


def test_changed_task_data_are_refused_on_resume(resident: Evaluator, tmp_path: Path) -> None:
    rows = [{"prompt": f"verb: go{n}\npast:", "choices": [" went.", " goed."], "label": 0} for n in range(60)]
    data = tmp_path / "task.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(UNOBSERVED, tasks=[TaskConfig(data=str(data))])
    stop = InterruptedRun(resident, after=2)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_pool, "load_evaluator", lambda *_: stop)
        run(tmp_path / "run", config)
    data.write_text(data.read_text().replace("goed", "wented"))
    with pytest.raises(RunError, match="task has changed since this run began"):
        run(tmp_path / "run", config)


class InterruptedRun:
    """An evaluator at which somebody presses Ctrl-C after so many evaluations."""

    def __init__(self, evaluator: Evaluator, after: int) -> None:
        self._evaluator = evaluator
        self._left = after
        self.model = evaluator.model

    def __getattr__(self, name: str) -> object:
        return getattr(self._evaluator, name)

    def evaluate(self, genomes: list[Genome], split: str, **more: Any) -> list[Outcome]:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return self._evaluator.evaluate(genomes, split, **more)


def test_an_interrupted_run_goes_on_where_it_stood(
    finished: RunFolder, evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for after in (0, 1, 10, 7, 20):
        monkeypatch.setattr(open_pool, "load_evaluator", lambda *_, n=after: InterruptedRun(evaluator, n))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
    run(tmp_path / "run")
    assert content(tmp_path / "run") == content(finished.path)


def test_a_race_stops_who_is_surely_worse_and_goes_on_after_an_interruption(
    resident: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = EvaluationConfig(race=0.8)
    task = replace(TASK, num_search=80)
    config = replace(CONFIG, tasks=[task], evaluation=evaluation, search=replace(CONFIG.search, evaluations=40))
    tasks = [build_task(one, resident.model.tokenizer, 4096) for one in check_tasks([task])]
    racing = Evaluator(resident.model, tasks, evaluation)
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: racing)
    run(tmp_path / "whole", config)
    for after in (9, 17):
        monkeypatch.setattr(open_pool, "load_evaluator", lambda *_, n=after: InterruptedRun(racing, n))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", config)
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: racing)
    run(tmp_path / "parts", config)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    with Journal(RunFolder(tmp_path / "whole").journal, read_only=True) as journal:
        outcomes = journal.outcomes("search", "search")
        validated = journal.outcomes("search", "validation")
    total = max(one.num_examples for one in outcomes.values())
    stopped = {number for number, one in outcomes.items() if one.is_stopped}
    assert 0 < len(stopped) < 34 and not stopped & set(range(6)) and not stopped & set(validated)
    assert all((one.num_examples < total) == (number in stopped) for number, one in outcomes.items())
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["search"]["stopped_early"] == len(stopped)
    assert main(["show", str(tmp_path / "whole")]) == 0
    assert f"40 evaluations (0 failed, {len(stopped)} stopped early)" in capsys.readouterr().out


def test_what_was_stopped_early_is_no_score_for_an_equal_genome(
    resident: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both searches begin with the same prunings; the rivals of one are not those of the other."""
    evaluation = EvaluationConfig(race=0.5)
    task = replace(TASK, num_search=80)
    search = SearchConfig(
        algorithm="eep", num_kept=4, evaluations=30, seed=3, eep=EEPConfig(num_initial=30, num_pruning=30)
    )
    config = replace(CONFIG, tasks=[task], evaluation=evaluation, search=search)
    tasks = [build_task(one, resident.model.tokenizer, 4096) for one in check_tasks([task])]
    racing = Evaluator(resident.model, tasks, evaluation)
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: racing)
    evaluate, scored = racing.evaluate, Counter[str]()

    def counting(genomes: list[Genome], split: str, **more: Any) -> list[Outcome]:
        scored.update(genome.digest for genome in genomes if split == "search")
        return evaluate(genomes, split, **more)

    monkeypatch.setattr(racing, "evaluate", counting)
    with run(tmp_path / "run", config).open_journal() as journal:
        own = {one.genome.digest: one.outcome.is_stopped for one in journal.individuals("search")}
        drawn = [one.genome.digest for one in journal.candidates("random")]
    both = set(own) & set(drawn)
    assert {own[digest] for digest in both} == {True, False}
    assert all(scored[digest] == 1 + own[digest] for digest in both)


def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_journal(
    finished: RunFolder, resident: Evaluator, tmp_path: Path
) -> None:
    folder, kills, rng = tmp_path / "run", 0, np.random.default_rng(0)
    stood_at = set()
    while kills < 20:
        child = in_child(partial(run, folder))
        wait_for_outcomes(folder, num_outcomes(folder) + int(rng.integers(0, 6)), child)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        stood_at.add(num_outcomes(folder))
        if (folder / "result.json").exists():  # it was quicker than we: the remaining kills hit another run
            assert content(folder) == content(finished.path)
            folder = tmp_path / f"run-{kills}"
    run(folder)
    assert content(folder) == content(finished.path)
    assert len(stood_at) >= 8  # the kills were spread over the run


class FailingEvaluator(InterruptedRun):
    """An evaluator that finds no fitness for some genomes, as a model with NaN logits does."""

    def evaluate(self, genomes: list[Genome], split: str, **_: Any) -> list[Outcome]:
        failure = EvaluationFailure("non_finite", "logits are NaN")
        return [failure if self._fails(genome) else self._evaluator.evaluate([genome], split)[0] for genome in genomes]

    def _fails(self, genome: Genome) -> bool:
        return self._left == 1 or (not genome.layers[0].is_identity and 0 in genome.layers[0].kept)


def test_failed_genomes_are_kept_in_the_journal_and_never_win(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: FailingEvaluator(evaluator, 0))
    config = replace(CONFIG, selection=SelectionConfig(finalists=3, baselines=[]))
    result = run(tmp_path / "run", config).read_result()
    assert 0 < result.search.failures < 24
    assert result.search.failure_reasons == ("logits are NaN",)
    assert all(0 not in row.kept[0] for row in result.rows if row.key != "full")
    print_run(RunFolder(tmp_path / "run"), result)
    assert "failed   logits are NaN" in capsys.readouterr().out


def test_a_full_model_without_fitness_ends_the_run_with_one_message(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: FailingEvaluator(evaluator, 1))
    with pytest.raises(ModelError, match="the full model has no fitness"):
        run(tmp_path / "run")


def test_a_small_space_ends_when_all_of_it_is_evaluated(resident: Evaluator, tmp_path: Path) -> None:
    search = SearchConfig(algorithm="random", num_kept=7, num_layer_groups=1, evaluations=50)
    result = run(tmp_path / "run", replace(CONFIG, search=search)).read_result()
    assert result.search.evaluations == 8
    assert result.best.title == "random, best of 8"


def test_a_run_that_keeps_all_experts_only_merges(resident: Evaluator, tmp_path: Path) -> None:
    search = SearchConfig(algorithm="eep", num_kept=8, top_k=1, evaluations=8)
    result = run(tmp_path / "run", replace(CONFIG, search=search)).read_result()
    assert result.best.num_kept == (8, 8, 8, 8)
    assert result.best.top_k == (1, 1, 1, 1)
