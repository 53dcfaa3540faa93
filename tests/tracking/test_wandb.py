"""Real offline runs of W&B, read back with wandb's own reader, and a stand-in for a service that fails."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from wandb_stand_in import KEY, StandIn, stand_in

from moe_evo import commands, evaluators
from moe_evo.cli import main
from moe_evo.config import (
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
    SelectionConfig,
    TaskConfig,
    TrackingConfig,
)
from moe_evo.errors import ConfigError
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.pool import GangStatus, PoolNews, PoolStatus
from moe_evo.genome import Genome
from moe_evo.journal import MAIN, RANDOM, Journal
from moe_evo.population import Candidate, Evaluation, EvaluationFailure, Individual, Outcome
from moe_evo.run_folder import RunFolder
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking import wandb_thread
from moe_evo.tracking.base import Tracker, Trackers
from moe_evo.tracking.statistics import SearchStatistics
from moe_evo.tracking.terminal import TerminalTracker
from moe_evo.tracking.wandb_thread import WandbRun, WandbTracker, wandb_mode, wandb_tracker

WANDB = str(Path(sys.executable).with_name("wandb"))
DOCUMENT = Path(__file__).parents[2] / "experiments" / "wandb.md"
CONFIG = RunConfig(
    model=ModelConfig(self_check=False),
    tasks=[TaskConfig(data="syll", num_search=16, num_validation=8, num_test=16)],
    search=SearchConfig(num_kept=4, evaluations=40, seed=3),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=3, random_search=True),
    tracking=TrackingConfig(wandb="offline", group="ratios", tags=["first"]),
)
SMALL = replace(
    CONFIG,
    search=replace(CONFIG.search, evaluations=12),
    selection=SelectionConfig(finalists=2),
    tracking=TrackingConfig(),
)


class SomeFail:
    """An evaluator without fitness for some genomes, at which somebody may press Ctrl-C after so many evaluations."""

    def __init__(self, evaluator: Evaluator, after: int = 10**9) -> None:
        self._evaluator, self._left, self.model = evaluator, after, evaluator.model

    def __getattr__(self, name: str) -> object:
        return getattr(self._evaluator, name)

    def evaluate(self, genomes: list[Genome], split: str) -> list[Outcome]:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        failure = EvaluationFailure("non_finite", "logits are NaN", 0.1)
        fails = [not one.layers[0].is_identity and one.layers[0].kept[:2] == (1, 2) for one in genomes]
        found = self._evaluator.evaluate(genomes, split)
        return [failure if failed else outcome for failed, outcome in zip(fails, found, strict=True)]


@pytest.fixture(scope="module")
def evaluator() -> SomeFail:
    data = check_tasks(CONFIG.tasks)
    quiet = TerminalTracker(Console(file=io.StringIO()))
    return SomeFail(evaluators.load_evaluator(CONFIG.model, data, CONFIG.evaluation, quiet))


@pytest.fixture
def resident(evaluator: SomeFail, monkeypatch: pytest.MonkeyPatch) -> SomeFail:
    monkeypatch.setattr(evaluators, "load_evaluator", lambda *_: evaluator)
    return evaluator


def search(folder: Path, config: RunConfig = CONFIG) -> str:
    """Run a search; answers what the terminal showed."""
    shown = io.StringIO()
    with TerminalTracker(Console(file=shown, width=500)) as tracker:
        commands.search(replace(config, folder=str(folder)), tracker)
    return shown.getvalue()


@pytest.fixture(scope="module")
def finished(evaluator: SomeFail, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """An uninterrupted offline run, with a key in the environment."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluators, "load_evaluator", lambda *_: evaluator)
        patch.setenv("WANDB_API_KEY", KEY)
        search(folder)
    return RunFolder(folder)


class Record:
    """A run of W&B as its own reader shows it."""

    def __init__(self, folder: Path) -> None:
        (self.folder,) = folder.glob("wandb/offline-run-*")
        command = [WANDB, "leet", "inspect", "--json", str(self.folder)]
        environment = {**os.environ, "WANDB_ERROR_REPORTING": "false"}
        text = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        self.records = [json.loads(line) for line in text.splitlines()]
        self.run = next(one["run"] for one in self.records if one["type"] == "run")
        self.history = [one["history"]["item"] for one in self.records if one["type"] == "history"]
        self.summary: dict[str, Any] = {}
        for one in self.records:
            if one["type"] == "summary":
                self.summary |= one["summary"].get("update", {})

    @property
    def keys(self) -> set[str]:
        """Logged keys, without W&B's own and without the parts of tables and pictures."""
        logged = {key for item in [*self.history, self.summary] for key in item}
        return {key.split("._")[0].split(".")[0] for key in logged if not key.startswith("_")}

    def points(self, key: str, search: str = MAIN) -> list[tuple[int, float]]:
        return [
            (item["evaluations"], item[key])
            for item in self.history
            if key in item and f"recorded/{search}_search" in item
        ]

    def rows(self) -> list[list[Any]]:
        """Of the table of individuals: its increments, in order."""
        paths = [item["individuals.path"] for item in self.history if "individuals.path" in item]
        return [row for path in paths for row in json.loads((self.folder / "files" / path).read_text())["data"]]


@pytest.fixture(scope="module")
def record(finished: RunFolder) -> Record:
    return Record(finished.path)


def individuals(folder: Path, search: str = MAIN, split: str = "search") -> list[Individual]:
    with Journal(folder / "journal.sqlite", read_only=True) as journal:
        return journal.individuals(search, split)


def documented() -> set[str]:
    """Keys in the tables of the document."""
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    words = {word for row in rows for word in re.findall(r"`([^`]+)`", row)}
    return words - {"selection.random_search"}


def test_a_run_says_what_it_is(record: Record, finished: RunFolder) -> None:
    run, config = record.run, record.run["config"]["update"]
    assert run["display_name"] == "syll-keep4-eep-seed3"
    assert (run["project"], run["run_group"], run["job_type"], run["tags"]) == (
        "moe_evo",
        "ratios",
        "search",
        ["first"],
    )
    result = finished.read_result()
    assert config["model_hash"] == result["model"]["hash"]
    assert config["task_hashes"] == {"syll": result["tasks"][0]["hash"]}
    assert config["software"] == result["software"]
    expected = {"ratio": 0.5, "num_kept": 4, "num_experts": 8, "algorithm": "eep", "seed": 3, "budget": 40}
    assert {key: config[key] for key in expected} == expected
    text = DOCUMENT.read_text()
    assert [key for key in config if key != "_wandb" and f"`{key}`" not in text] == []


def test_every_documented_key_is_logged_and_every_logged_key_is_documented(record: Record) -> None:
    of_gangs = {key for key in documented() if key.startswith(("gangs/", "queue/"))}
    assert len(record.keys) < 200
    assert {key for key in record.keys if not any(fnmatch.fnmatch(key, one) for one in documented())} == set()
    assert {one for one in documented() - of_gangs if not fnmatch.filter(record.keys, one)} == set()


def test_curves_are_drawn_against_evaluations(record: Record) -> None:
    metrics = [one["metric"] for one in record.records if one["type"] == "metric"]
    assert {"glob_name": "*", "step_metric": "evaluations", "options": {"defined": True, "step_sync": True}} in metrics
    assert all("evaluations" in item for item in record.history)


def test_history_is_what_the_journal_holds(record: Record, finished: RunFolder) -> None:
    found = individuals(finished.path)
    expected = [
        (position, one.outcome.fitness)
        for position, one in enumerate(found, start=1)
        if isinstance(one.outcome, Evaluation)
    ]
    assert record.points("fitness") == expected
    assert len(expected) < len(found) == 40
    best = np.maximum.accumulate([fitness for _, fitness in expected])
    assert [value for position, value in record.points("best/fitness") if (position in dict(expected))] == list(best)
    assert record.points("failures")[-1] == (40, 40 - len(expected))
    assert record.points("population/std")[-1][1] == pytest.approx(np.std([fitness for _, fitness in expected]))
    random = [one.evaluation.fitness for one in individuals(finished.path, RANDOM) if one.outcome.duration_s != 0.1]
    assert [value for _, value in record.points("random/fitness", RANDOM)] == random
    validated = {one.number: one.outcome for one in individuals(finished.path, split="validation")}
    numbers = {position: one.number for position, one in enumerate(found, start=1)}
    points = [
        (numbers[item["evaluations"]], item["validation/search"])
        for item in record.history
        if "validation/search" in item
    ]
    assert points == [(number, one.fitness) for number, one in validated.items() if isinstance(one, Evaluation)]


def test_the_table_of_individuals_is_what_the_journal_holds(record: Record, finished: RunFolder) -> None:
    rows = record.rows()
    both = [(name, one) for name in (MAIN, RANDOM) for one in individuals(finished.path, name)]
    assert [(row[0], row[1], row[2], row[3], row[5]) for row in rows] == [
        (name, one.number, one.candidate.operator, " ".join(map(str, one.candidate.parents)), one.genome.digest)
        for name, one in both
    ]
    assert [row[9] for row in rows].count("non_finite") == sum(
        isinstance(one.outcome, EvaluationFailure) for _, one in both
    )


def test_the_summary_is_the_result(record: Record, finished: RunFolder) -> None:
    result = finished.read_result()
    for row in result["rows"]:
        for split, score in row["scores"].items():
            assert record.summary[f"{row['key']}/{split}"] == score["fitness"]
    assert record.summary["gain/test"] == pytest.approx(record.summary["best/test"] - record.summary["full/test"])
    assert (record.summary["num_kept"], record.summary["share_kept"], record.summary["evaluations"]) == (4, 0.5, 40)
    final = json.loads((record.folder / "files" / record.summary["final.path"]).read_text())
    assert [row[0] for row in final["data"]] == [row["key"] for row in result["rows"]]


def test_the_winner_is_drawn_and_kept_as_an_artifact_without_folders(record: Record, finished: RunFolder) -> None:
    pictures = {path.parent.name + "/" + path.name.rsplit("_", 2)[0] for path in record.folder.rglob("*.png")}
    assert pictures == {"best/kept_experts", "best/expert_merging", "best/router_mapping"}
    artifact = next(
        one["artifact"] for one in record.records if one["type"] == "artifact" and one["artifact"]["type"] == "result"
    )
    entries = {one["path"]: Path(one["local_path"]) for one in artifact["manifest"]["contents"]}
    assert set(entries) == {"best.safetensors", "best_pruning.safetensors", "result.json"}
    ours, kept = load_file(entries["best.safetensors"]), load_file(finished.best)
    assert ours.keys() == kept.keys()
    assert all(np.array_equal(ours[name], kept[name]) for name in kept)
    assert json.loads(entries["result.json"].read_text())["rows"] == finished.read_result()["rows"]
    assert all(finished.path in path.parents for path in entries.values())


def test_no_secret_and_no_folder_is_written(finished: RunFolder, record: Record) -> None:
    files = [path for path in finished.path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    said = [one for one in record.records if one["type"] in ("run", "history", "summary")]
    assert str(Path.home()) + "/" not in json.dumps(said)
    assert "requirements.txt" not in {path.name for path in files}


def test_wandb_sync_accepts_the_folder(record: Record) -> None:
    command = [WANDB, "sync", "--dry-run", str(record.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Would sync 1 run" in done.stdout + done.stderr


def test_an_interrupted_search_ends_with_one_whole_offline_run(
    finished: RunFolder, record: Record, evaluator: SomeFail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for after in (20, 60):
        monkeypatch.setattr(evaluators, "load_evaluator", lambda *_, n=after: SomeFail(evaluator._evaluator, n))
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "run")
    monkeypatch.setattr(evaluators, "load_evaluator", lambda *_: evaluator)
    search(tmp_path / "run")
    again = Record(tmp_path / "run")
    for key in ("fitness", "best/fitness", "population/best20_std", "phase"):
        assert again.points(key) == record.points(key)
    assert [row[:10] for row in again.rows()] == [row[:10] for row in record.rows()]
    assert again.summary["best/test"] == record.summary["best/test"]


SLOW = """
import sys, time
from moe_evo import cli, evaluation
from moe_evo.evaluation.evaluator import Evaluator
evaluate = Evaluator.evaluate
def slow(self, *arguments):
    time.sleep(0.05)
    return evaluate(self, *arguments)
Evaluator.evaluate = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def finished_at(folder: Path) -> list[float]:
    """When the outcomes of the search were written, seconds since the epoch."""
    with sqlite3.connect(f"file:{folder}/journal.sqlite?mode=ro", uri=True) as database:
        query = "SELECT finished_at FROM outcomes WHERE search = 'search' AND split = 'search' ORDER BY position"
        return [at for (at,) in database.execute(query)]


def test_a_kill_loses_at_most_the_last_second_and_a_replay_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = ["search", "--folder", str(folder), "--model.self_check", "false", "--search.evaluations", "400"]
    words += ["--tasks", "[{data: syll, num_search: 8, num_validation: 8, num_test: 8}]", "--tracking.wandb", "offline"]
    child = subprocess.Popen([sys.executable, "-c", SLOW, *words], stderr=subprocess.DEVNULL)
    while not (folder / "journal.sqlite").exists() or len(_seen(folder)) < 40:
        assert child.poll() is None
        time.sleep(0.05)
    killed_at = time.time()
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.5)  # W&B's own process writes what it has heard
    kept = len(Record(folder).points("evaluation_s"))
    times = finished_at(folder)
    assert sum(at < killed_at - 1.2 for at in times) <= kept <= len(times)
    old = Record(folder).run["run_id"]
    assert main(["wandb-replay", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    mended = Record(folder)
    assert len(mended.points("evaluation_s")) == len(mended.rows()) == len(times)
    assert mended.run["run_id"] == report["id"] != report["replaced_id"] == old
    assert mended.run["tags"] == ["replay"]


def _seen(folder: Path) -> list[float]:
    try:
        return finished_at(folder)
    except sqlite3.OperationalError:
        return []


def test_a_replay_of_a_finished_run_is_the_run(
    record: Record, finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for path in finished.path.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    assert main(["wandb-replay", str(folder), "--tracking.wandb", "offline", "--tracking.group", "other"]) == 0
    again = Record(folder)
    assert f"wandb sync {again.folder}" in capsys.readouterr().out
    assert again.run["run_group"] == "other"
    assert again.run["config"] == record.run["config"]
    live = ("_", "evaluations_per_s", "best/kept", "best/expert", "best/router", "final", "individuals")
    numbers = [{k: v for k, v in item.items() if not k.startswith(live)} for item in record.history]
    replayed = [{k: v for k, v in item.items() if not k.startswith(live)} for item in again.history]
    key = json.dumps
    assert sorted(map(key, replayed)) == sorted(map(key, numbers))
    assert again.rows() == record.rows()
    assert {k for k in record.keys - again.keys} == {"evaluations_per_s"}


def test_a_replay_without_a_place_to_write_to_is_a_wrong_input(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["wandb-replay", str(finished.path), "--tracking.wandb", "disabled"]) == 2
    assert "set WANDB_API_KEY or add --tracking.wandb offline" in capsys.readouterr().err
    with Journal(finished.journal):
        assert main(["wandb-replay", str(finished.path)]) == 2
    assert "is working on this run" in capsys.readouterr().err


def online(monkeypatch: pytest.MonkeyPatch, server: StandIn) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setattr(wandb_thread, "_FINISH_TIMEOUT_S", 2.0)
    monkeypatch.setattr(wandb_thread, "_GRACE_S", 1.0)


@pytest.mark.parametrize("behaviour", ["hangs", 500, 403, 429])
def test_a_service_that_fails_from_the_start_costs_one_line(
    behaviour: str | int, resident: SomeFail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(behaviour) as server:
        online(monkeypatch, server)
        shown = search(tmp_path / "run", SMALL)
        assert server.num_requests > 0
    assert RunFolder(tmp_path / "run").read_result()["search"]["evaluations"] == 12
    (line,) = [line for line in shown.splitlines() if "W&B" in line]
    assert f"moe-evo wandb-replay {tmp_path / 'run'}" in line


@pytest.mark.parametrize("later", ["hangs", 500, 403])
def test_a_service_that_fails_in_the_middle_costs_one_line(
    later: str | int, evaluator: SomeFail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in("answers") as server:
        online(monkeypatch, server)

        class Failing(SomeFail):
            def evaluate(self, genomes: list[Genome], split: str) -> list[Outcome]:
                if split == "search":
                    time.sleep(0.1)  # so that the run of W&B has begun
                else:
                    server.behaviour = later
                return super().evaluate(genomes, split)

        monkeypatch.setattr(evaluators, "load_evaluator", lambda *_: Failing(evaluator._evaluator))
        began = time.monotonic()
        shown = search(tmp_path / "run", SMALL)
        assert time.monotonic() - began < 12
    assert RunFolder(tmp_path / "run").result.is_file()
    where, trouble = [line for line in shown.splitlines() if "W&B" in line]
    assert where.startswith("W&B: http://127.0.0.1")
    assert "moe-evo wandb-replay" in trouble


def test_a_resumed_online_run_gets_what_it_lacks_and_nothing_twice(
    evaluator: SomeFail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in("answers") as server:
        online(monkeypatch, server)
        monkeypatch.setattr(evaluators, "load_evaluator", lambda *_: SomeFail(evaluator._evaluator, 8))
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "run", SMALL)
        ((run, lines),) = server.history.items()
        first = len([one for one in lines if "evaluation_s" in one])
        assert first > 0
        monkeypatch.setattr(evaluators, "load_evaluator", lambda *_: evaluator)
        search(tmp_path / "run", SMALL)
        assert [one["evaluations"] for one in server.history[run] if "evaluation_s" in one] == list(range(1, 13))
        assert list(server.history) == [run]


def test_a_replay_uploads_all_or_says_why_not(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "journal.sqlite"):
        (folder / name).write_bytes((finished.path / name).read_bytes())
    with stand_in(403) as server:
        online(monkeypatch, server)
        assert main(["wandb-replay", str(folder), "--tracking.wandb", "online"]) == 2
        assert "403" in capsys.readouterr().err
        server.behaviour = "answers"
        assert main(["wandb-replay", str(folder), "--tracking.wandb", "online", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        (lines,) = server.history.values()
        assert report["where"].startswith(server.url)
    assert len([line for line in lines if "evaluation_s" in line]) == 40


def test_without_a_key_online_is_one_line_and_no_question(
    resident: SomeFail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    shown = search(tmp_path / "run", replace(SMALL, tracking=TrackingConfig(wandb="online")))
    (line,) = [line for line in shown.splitlines() if "W&B" in line]
    assert "no key: set WANDB_API_KEY" in line


@pytest.mark.parametrize(
    ("asked", "environment", "mode"),
    [
        ("auto", {}, "disabled"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
    ],
)
def test_the_mode_is_what_is_asked_for_or_else_what_the_environment_says(
    asked: Any, environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(TrackingConfig(wandb=asked)) == mode


def test_a_disabled_search_never_imports_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from moe_evo.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "sys.exit(status or ('wandb' in sys.modules))"
    )
    words = ["search", "--folder", str(tmp_path / "run"), "--model.self_check", "false", "--search.evaluations", "2"]
    words += ["--tasks", "[{data: syll, num_search: 4, num_validation: 4, num_test: 4}]"]
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False).returncode == 0
    assert not (tmp_path / "run" / "wandb").exists()


def test_gangs_are_drawn_and_the_environment_is_given_back(tmp_path: Path) -> None:
    before = dict(os.environ)
    run = WandbRun(TrackingConfig(), "offline", "abcd1234", "gangs", tmp_path, {}, 10)
    terminal = Trackers()
    gangs = (GangStatus(0, "busy", restarts=2), GangStatus(1, "loading"))
    with wandb_tracker(run, terminal) as tracker:
        assert os.environ["WANDB_DATA_DIR"].startswith(str(tmp_path))
        tracker.pool(PoolNews(PoolStatus(gangs, waiting=3, under_way=1, restarts=2)))
        tracker.pool(PoolNews(PoolStatus(gangs)))  # too soon
    assert dict(os.environ) == before
    assert tracker.failure is None
    (item,) = Record(tmp_path).history
    values = {key: value for key, value in item.items() if key.startswith(("gangs/", "queue/"))}
    assert values == {
        "gangs/busy": 1, "gangs/ready": 0, "gangs/loading": 1, "gangs/waiting": 0, "gangs/restarts": 2,
        "queue/waiting": 3, "queue/under_way": 1,
    }  # fmt: skip
    assert set(values) == {key for key in documented() if key.startswith(("gangs/", "queue/"))}


def test_every_tracker_takes_whatever_a_driver_tells(tmp_path: Path) -> None:
    run = WandbRun(TrackingConfig(), "offline", "abcd1234", "all", tmp_path, {}, 10)
    wandb = WandbTracker(run, Trackers())
    individual = Individual(Candidate(0, Genome.from_kept([[0]], 2, 1), "random_pruning"), Evaluation(0.5))
    terminal = TerminalTracker(Console(file=io.StringIO()))
    trackers: list[Tracker] = [terminal, wandb, Trackers(terminal, wandb)]
    for tracker in trackers:
        tracker.message("text")
        tracker.stage("search", 2, done=1)
        tracker.evaluated(individual, individual, "pruning")
        tracker.recorded(MAIN, "search", individual)
        tracker.pool(PoolNews())
        tracker.finished({}, [])


def test_statistics_are_those_of_the_whole_population() -> None:
    rng = np.random.default_rng(0)
    statistics, fitness, children, better = SearchStatistics(), [], 0, 0
    for number in range(60):
        genome = Genome.from_kept([rng.choice(8, 4, replace=False) for _ in range(3)], 8, 2)
        parents = tuple(int(one) for one in rng.choice(number, 2, replace=False)) if number > 5 else ()
        fitness.append(float(rng.normal()))
        operator = "row_crossover" if parents else "random_pruning"
        values = statistics.add(Individual(Candidate(number, genome, operator, parents), Evaluation(fitness[-1])))
        children += bool(parents)
        better += bool(parents) and fitness[-1] > max(fitness[parent] for parent in parents)
    assert values["population/std"] == pytest.approx(np.std(fitness))
    assert values["population/best20_std"] == pytest.approx(np.std(sorted(fitness)[-20:]))
    assert values["operators/row_crossover"] == better / children
    assert values["best/number"] == np.argmax(fitness)


@pytest.mark.parametrize(
    "wrong", [{"project": "a/b"}, {"project": ""}, {"group": ""}, {"tags": ["x" * 65]}, {"entity": ""}]
)
def test_what_wandb_would_refuse_is_refused_before_a_search(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^tracking\."):
        TrackingConfig(**wrong)


def test_the_view_says_what_it_lacks() -> None:
    script = DOCUMENT.with_name("wandb_view.py")
    command = [sys.executable, str(script), "--entity", "someone"]
    for environment, lack in (({}, "set WANDB_API_KEY"), ({"WANDB_API_KEY": KEY}, "pip install wandb-workspaces")):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
        assert done.returncode == 2
        assert lack in done.stderr
        assert len(done.stderr.splitlines()) == 1
