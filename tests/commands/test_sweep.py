"""Sweeps: which runs they make, that runs share gangs, and that nothing that dies is lost or done twice."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from moe_evo.cli.main import main
from moe_evo.commands.search import search as search_command
from moe_evo.commands.sweep import grid, sweep
from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.file import config_parser, parse_config
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.sweep import GridConfig, SweepConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError, RunError, TaskError
from moe_evo.gangs.connection import connected
from moe_evo.gangs.tune_runs import Report, trainable, tune
from moe_evo.models.source import ModelSource
from moe_evo.records.journal import Journal
from moe_evo.records.result import ModelFacts, Row, RunResult, Score, SearchFacts, TaskFacts
from moe_evo.records.sweep import SweepFolder
from moe_evo.report.sweep import print_sweep, sweep_result
from moe_evo.tracking.terminal import TerminalTracker

TASK = TaskConfig(data="syll", num_search=16, num_validation=8, num_test=16)
CONFIG = SweepConfig(
    model=ModelConfig(self_check=False),
    tasks=[TASK],
    search=SearchConfig(algorithm="random", evaluations=6),
    selection=SelectionConfig(finalists=2),
    sweep=GridConfig(num_kept=[2, 1], seeds=[0, 1]),
)


def runs_of(config: SweepConfig, folder: Path = Path("/sweep")):  # type: ignore[no-untyped-def]
    return grid(config, ModelSource(config.model).shape, SweepFolder(folder))


def test_every_combination_is_one_run_in_a_folder_of_its_name() -> None:
    swept = GridConfig(num_kept=[2, 4], seeds=[0, 7], algorithms=["eep", "random"], tasks=["nli", "syll"])
    runs = runs_of(replace(CONFIG, sweep=swept))
    assert len(runs) == 16
    run = runs["syll-random-keep2-seed7"]
    assert (run.search.num_kept, run.search.seed, run.search.algorithm) == (2, 7, "random")
    assert [task.data for task in run.tasks] == ["syll"]
    assert run.tasks[0].num_search == 16  # the options of the config's task
    assert run.folder == "/sweep/runs/syll-random-keep2-seed7"


def test_a_name_says_only_what_differs() -> None:
    assert list(runs_of(CONFIG)) == ["keep2-seed0", "keep2-seed1", "keep1-seed0", "keep1-seed1"]
    assert list(runs_of(replace(CONFIG, sweep=GridConfig()))) == ["keep4-seed0"]


def test_fewer_experts_than_a_token_uses_lower_top_k() -> None:
    runs = runs_of(CONFIG)
    assert [runs[f"keep{kept}-seed0"].search.top_k for kept in (2, 1)] == [None, 1]


def test_with_a_warm_start_a_run_begins_from_the_next_larger_of_its_seed(tmp_path: Path) -> None:
    search = SearchConfig(algorithm="eep", evaluations=8)
    grid_config = GridConfig(num_kept=[2, 6, 4], seeds=[0, 1], warm_start=True)
    config = replace(CONFIG, search=search, sweep=grid_config, folder=str(tmp_path / "sweep"))
    runs = runs_of(config, tmp_path / "sweep")
    assert [run.search.num_kept for run in runs.values()] == [6, 6, 4, 4, 2, 2]
    assert runs["keep6-seed1"].search.warm_start is None
    assert runs["keep2-seed1"].search.warm_start == runs["keep4-seed1"].folder
    folder = sweep(config, TerminalTracker(Console(quiet=True)), use_tune=False)
    with Journal(folder.run("keep2-seed1").journal, read_only=True) as journal:
        narrowed = [one.genome for one in journal.candidates("search") if one.operator == "narrowed"]
    with Journal(folder.run("keep4-seed1").journal, read_only=True) as journal:
        wider = [one.genome for one in journal.candidates("search") if one.genome.is_pruning]
    assert narrowed
    for genome in narrowed:
        assert any(all(set(few) <= set(many) for few, many in zip(genome.kept, one.kept, strict=True)) for one in wider)


def test_an_impossible_run_is_refused_before_any_starts(tmp_path: Path) -> None:
    config = replace(CONFIG, sweep=GridConfig(num_kept=[4, 9]), folder=str(tmp_path / "sweep"))
    with pytest.raises(ConfigError, match="num_kept"):
        sweep(config, TerminalTracker(Console(quiet=True)), use_tune=False)
    config = replace(config, sweep=GridConfig(), selection=replace(CONFIG.selection, baselines=["luck"]))
    with pytest.raises(ConfigError, match=r"selection\.baselines: got 'luck'"):
        sweep(config, TerminalTracker(Console(quiet=True)), use_tune=False)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sweep.num_kept", "2,4,6", "--sweep.seeds=0,1"], GridConfig(num_kept=[2, 4, 6], seeds=[0, 1])),
        (["--sweep.num_kept", "[2, 4]"], GridConfig(num_kept=[2, 4])),
        (["--sweep.num_kept", "4", "--sweep.tasks", "nli,syll"], GridConfig(num_kept=[4], tasks=["nli", "syll"])),
        (["--sweep.algorithms", "eep,random"], GridConfig(algorithms=["eep", "random"])),
    ],
)
def test_lists_are_written_with_commas(words: list[str], expected: GridConfig) -> None:
    parser = config_parser("sweep", "", "", SweepConfig)
    assert parse_config(parser, words, SweepConfig)[1].sweep == expected


def test_a_search_says_that_it_leaves_a_sweep_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.yaml"
    wrong = ["--tasks", "nowhere.jsonl"]  # so that neither command begins
    file.write_text("sweep: {seeds: [0, 1]}\n")
    assert main(["search", str(file), *wrong]) == 2
    note, _ = capsys.readouterr().err.splitlines()
    assert note.startswith(f"moe-evo: note: {file}: has a sweep: section; `moe-evo sweep {file}` runs it")
    assert main(["sweep", str(file), *wrong]) == 2
    assert "note" not in capsys.readouterr().err
    file.write_text("sweep: {}\n")
    assert main(["search", str(file), *wrong]) == 2
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"num_kept": [2, 2]}, {"num_kept": [0]}, {"seeds": [-1]}, {"max_concurrent": 0}, {"max_failures": -1}]
)
def test_a_grid_checks_itself(options: dict[str, list[int]]) -> None:
    with pytest.raises(ConfigError, match=f"sweep.{next(iter(options))}"):
        GridConfig(**options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    folder = tmp_path_factory.mktemp("sweep") / "plain"
    return sweep(replace(CONFIG, folder=str(folder)), TerminalTracker(Console(quiet=True)), use_tune=False)


def test_a_sweep_ends_with_a_table_and_a_figure(one_by_one: SweepFolder) -> None:
    result = one_by_one.read_result()
    assert result.runs == ("keep1-seed0", "keep1-seed1", "keep2-seed0", "keep2-seed1")
    assert result.unfinished == ()
    assert {line.key for line in result.lines} == {"full", "frequency", "reap", "best"}
    assert one_by_one.figure.read_bytes().startswith(b"\x89PNG")
    console = Console(width=60, record=True, file=io.StringIO())
    print_sweep(result, console)
    text = console.export_text()
    assert text.count("random") == 2  # one line a number of experts, both seeds together
    assert "3.02 M" in text


def test_what_is_finished_is_not_run_again(one_by_one: SweepFolder) -> None:
    before = {file: file.stat().st_mtime_ns for file in one_by_one.path.glob("runs/*/journal.sqlite")}
    assert len(before) == 4
    config = replace(CONFIG, folder=str(one_by_one.path), sweep=replace(CONFIG.sweep, num_kept=[2, 1, 3]))
    sweep(config, TerminalTracker(Console(quiet=True)), use_tune=False)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert (one_by_one.path / "runs" / "keep3-seed1" / "result.json").is_file()


def test_another_config_on_an_old_folder_is_refused_and_nothing_is_written(one_by_one: SweepFolder) -> None:
    before = one_by_one.config.read_bytes()
    search = replace(CONFIG.search, evaluations=5)
    config = replace(CONFIG, folder=str(one_by_one.path), search=search)
    with pytest.raises(RunError, match=r"search\.evaluations: got 5, expected 6 or more"):
        sweep(config, TerminalTracker(Console(quiet=True)), use_tune=False)
    assert one_by_one.config.read_bytes() == before


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    tasks = [str(tmp_path / name / "data.jsonl") for name in ("a", "b")]
    with pytest.raises(ConfigError, match="two tasks have the name 'data'"):
        runs_of(replace(CONFIG, sweep=GridConfig(tasks=tasks)))


def test_what_is_wrong_with_examples_is_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    config = replace(CONFIG, tasks=[replace(TASK, max_length=2)], folder=str(tmp_path / "sweep"))
    with pytest.raises(TaskError, match="max_length"):
        sweep(config, TerminalTracker(Console(quiet=True)), use_tune=False)
    assert not (tmp_path / "sweep").exists()


def made_result(row: Row, algorithm: str = "eep", seed: int = 0) -> RunResult:
    return RunResult(
        model=ModelFacts("embedded", "", "mixtral", (2,), (1,), (0,)),
        tasks=(TaskFacts("a", "choice", "accuracy", "", {}),),
        search=SearchFacts(algorithm, seed, 1),
        rows=(row,),
    )


def made_row(key: str, title: str, size: int, score: Score) -> Row:
    row = Row(key, title, 1, 0, "x", (), title, True, (1,), (1,), ((0,),), {"test": score})
    return replace(row, parameters=size, bytes=size)


def test_the_front_holds_what_nothing_beats_in_both_size_and_score() -> None:
    def run(name: str, parameters: int, test: float) -> tuple[str, RunResult]:
        return name, made_result(made_row("best", "best", parameters, Score(test, test, test)))

    runs = [run("small", 1, 0.5), run("better", 2, 0.7), run("beaten", 3, 0.7), run("worse", 2, 0.6)]
    lines = sweep_result(dict(runs)).lines
    assert [line.run for line in lines if line.front] == ["small", "better"]


def test_soups_of_two_algorithms_are_two_lines_of_the_table() -> None:
    score = Score(0.5, 0.4, 0.6)
    runs = {
        str(number): made_result(made_row("soup", f"soup of {number + 2}", 1, score), algorithm, number)
        for number, algorithm in enumerate(["eep", "eep", "eep_release"])
    }
    printed = io.StringIO()
    print_sweep(sweep_result(runs), Console(file=printed, width=200))
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("soup ")]
    assert len(lines) == 2 and not any(line.startswith("soup of") for line in lines)


def test_seeds_that_share_a_budget_in_other_ways_are_one_line_of_the_table() -> None:
    row = made_row("best", "surrogate", 1, Score(0.5, 0.4, 0.6))
    runs = {
        str(seed): made_result(replace(row, num_kept=kept), "surrogate", seed)
        for seed, kept in enumerate([(2, 6), (4, 4), (5, 3)])
    }
    printed = io.StringIO()
    print_sweep(sweep_result(runs), Console(file=printed, width=200))
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("surrogate ")]
    assert "4.0 (2-6)" in line and line.split()[4] == "3"


def content(folder: SweepFolder) -> dict[str, set[tuple[object, ...]]]:
    """Scores by digest and split of every run."""
    found = {}
    for path in sorted(folder.path.glob("runs/*")):
        with Journal(path / "journal.sqlite", read_only=True) as journal:
            digests = {one.number: one.genome.digest for one in journal.candidates("search")}
            found[path.name] = {
                (split, digests[number], outcome.fitness)  # type: ignore[union-attr]
                for split in ("search", "validation", "test")
                for number, outcome in journal.outcomes("search", split).items()
            }
    return found


class SweepProcess:
    """`moe-evo sweep` in a process group of its own, with its Ray."""

    def __init__(self, folder: Path, evaluations: int, swept: dict[str, object]) -> None:
        """swept: the config's section `sweep`."""
        config = {
            "model": {"self_check": False},
            "tasks": [{"data": "syll", "num_search": 16, "num_validation": 8, "num_test": 16}],
            "search": {"algorithm": "random", "evaluations": evaluations},
            "selection": {"finalists": 2},
            "cluster": {"address": "local", "num_gangs": 1},
            "sweep": swept,
        }
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "moe_evo", "sweep", str(file), "--folder", str(folder)]
        self.folder = folder
        self.output = folder.with_suffix(".txt")
        with self.output.open("a") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def wait_until(self, happened: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert self._process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def wait(self, timeout_s: float = 150) -> int:
        return self._process.wait(timeout_s)

    def kill_everything(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def trial(self, name: str) -> int:
        """The process that works on a run."""
        return int((self.folder / "runs" / name / "journal.lock").read_text())

    def evaluated(self, name: str) -> int:
        """Evaluations in the journal of a run."""
        journal = self.folder / "runs" / name / "journal.sqlite"
        if not journal.is_file():
            return 0
        with Journal(journal, read_only=True) as opened:
            return len(opened.outcomes("search", "search"))


def test_runs_share_one_pool_and_survive_the_death_of_a_trial_and_of_the_sweep(tmp_path: Path) -> None:
    swept: dict[str, object] = {"num_kept": [6, 4, 2], "seeds": [0, 1], "max_concurrent": 2}
    names = [f"keep{kept}-seed{seed}" for kept in (6, 4, 2) for seed in (0, 1)]
    first = SweepProcess(tmp_path / "sweep", 150, swept)
    try:
        first.wait_until(lambda: first.evaluated(names[0]) >= 3)
        os.kill(first.trial(names[0]), signal.SIGKILL)
        first.wait_until(lambda: (first.folder / "runs" / names[0] / "result.json").is_file())
        assert "crashed, starts again" in first.output.read_text()
        first.wait_until(lambda: any(first.evaluated(name) >= 3 for name in names[2:]))
    finally:
        first.kill_everything()
    loads = gang_loads(tmp_path / "sweep")
    assert len(loads) == 1  # however many runs it has served
    second = SweepProcess(tmp_path / "sweep", 150, swept)
    try:
        assert second.wait() == 0, second.output.read_text()
    finally:
        second.kill_everything()
    assert len(gang_loads(tmp_path / "sweep") - loads) <= 1
    kept = yaml.safe_load((tmp_path / "sweep" / "runs" / names[0] / "config.yaml").read_text())
    assert kept["cluster"]["service"] is None  # the sweep's own gangs are gone: the run must not look for them
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert result["runs"] == sorted(names)
    found = content(SweepFolder(tmp_path / "sweep"))
    assert all(sum(split == "search" for split, _, _ in rows) == 150 for rows in found.values())
    plain = SweepConfig(
        model=ModelConfig(self_check=False),
        tasks=[TASK],
        search=SearchConfig(algorithm="random", evaluations=150),
        selection=SelectionConfig(finalists=2),
        sweep=GridConfig(num_kept=[4], seeds=[1]),
        folder=str(tmp_path / "plain"),
    )
    undisturbed = sweep(plain, TerminalTracker(Console(quiet=True)), use_tune=False)
    assert found["keep4-seed1"] == content(undisturbed)["keep4-seed1"]


def test_tune_restores_a_sweep_that_was_killed(tmp_path: Path) -> None:
    done, half = "keep4-seed0", "keep4-seed1"
    killed = SweepProcess(tmp_path / "sweep", 120, {"num_kept": [4], "seeds": [0, 1], "max_concurrent": 1})
    try:
        killed.wait_until(lambda: killed.evaluated(half) >= 3)
    finally:
        killed.kill_everything()
    os.kill(killed.trial(half), signal.SIGKILL)  # it outlives its Ray by seconds, and would go on
    folder = SweepFolder(killed.folder)
    before, written = content(folder), folder.run(done).journal.stat().st_mtime_ns
    assert folder.run(done).result.is_file() and killed.evaluated(done) == 120
    assert 3 <= killed.evaluated(half) < 120
    parser = config_parser("sweep", "", "", SweepConfig)
    runs = runs_of(parse_config(parser, [str(folder.config)], SweepConfig)[1], folder.path)

    def search(config: RunConfig, report: Report) -> None:
        search_command(config, TerminalTracker(Console(quiet=True)), cluster=ClusterConfig())

    with connected("local"):
        trials = tune.Tuner.restore(str(folder.tune), trainable(runs, search)).fit()
    assert trials.num_errors == 0
    assert [killed.evaluated(name) for name in (done, half)] == [120, 120]
    assert folder.run(done).journal.stat().st_mtime_ns == written
    assert content(folder)[half] > before[half]
    assert folder.run(half).result.is_file()


def gang_loads(folder: Path) -> set[float]:
    """When gangs had loaded the model, by all journals of a sweep."""
    times = set()
    for path in folder.glob("runs/*/journal.sqlite"):
        with Journal(path, read_only=True) as journal:
            times |= {at for at, _, kind, _ in journal.gang_events() if kind == "ready"}
    return times
