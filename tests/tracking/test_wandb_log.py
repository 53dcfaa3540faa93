"""Real offline runs of W&B, read back with wandb's own reader: they hold what the journal holds."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from tracked_runs import SMALL, WANDB, Record, SomeFail, search
from wandb_stand_in import KEY

from moe_evo.config.run import TrackingConfig
from moe_evo.errors import ConfigError
from moe_evo.evaluation.pool import GangStatus, PoolNews, PoolStatus
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, RANDOM, Journal
from moe_evo.runs import open_pool
from moe_evo.tracking.base import Tracker, Trackers
from moe_evo.tracking.curves import SearchStatistics
from moe_evo.tracking.terminal import TerminalTracker
from moe_evo.tracking.wandb_run import WandbRun
from moe_evo.tracking.wandb_tracker import WandbTracker, wandb_tracker

DOCUMENT = Path(__file__).parents[2] / "experiments" / "wandb.md"


def individuals(folder: Path, search: str = MAIN, split: str = "search") -> list[Individual]:
    with Journal(folder / "journal.sqlite", read_only=True) as journal:
        return journal.individuals(search, split)


def documented() -> set[str]:
    """Keys in the tables of the document."""
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    words = {word for row in rows for word in re.findall(r"`([^`]+)`", row)}
    return {word for word in words if not word.startswith(("selection.", "search."))}  # options


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
    assert config["model_hash"] == result.model.hash
    assert config["task_hashes"] == {"syll": result.tasks[0].hash}
    assert config["software"] == result.software
    expected = {"ratio": 0.5, "num_kept": 4, "num_experts": 8, "algorithm": "eep", "seed": 3, "budget": 40}
    expected |= {"examples": "fixed", "sample_size": None}
    assert {key: config[key] for key in expected} == expected
    text = DOCUMENT.read_text()
    assert [key for key in config if key != "_wandb" and f"`{key}`" not in text] == []


def test_every_documented_key_is_logged_and_every_logged_key_is_documented(record: Record) -> None:
    of_others = {key for key in documented() if key.startswith(("gangs/", "queue/", "recovery/", "recovered/"))}
    assert len(record.keys) < 200
    assert {key for key in record.keys if not any(fnmatch.fnmatch(key, one) for one in documented())} == set()
    assert {one for one in documented() - of_others if not fnmatch.filter(record.keys, one)} == set()


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
    active = [one.outcome.metrics["syll/active_experts"] for one in found if isinstance(one.outcome, Evaluation)]
    assert [value for _, value in record.points("active_experts")] == active
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
    for row in result.rows:
        for split, score in row.scores.items():
            assert record.summary[f"{row.key}/{split}"] == score.fitness
    assert record.summary["gain/test"] == pytest.approx(record.summary["best/test"] - record.summary["full/test"])
    assert (record.summary["num_kept"], record.summary["share_kept"], record.summary["evaluations"]) == (4, 0.5, 40)
    final = json.loads((record.folder / "files" / record.summary["final.path"]).read_text())
    assert [row[0] for row in final["data"]] == [row.key for row in result.rows]


def test_a_search_metric_is_named_and_no_key_has_scores_of_two_metrics(tmp_path: Path) -> None:
    (task,) = SMALL.tasks
    offline = TrackingConfig(wandb="offline")
    folder = tmp_path / "run"
    search(folder, replace(SMALL, tasks=[replace(task, search_metric="probability")], tracking=offline))
    record, result = Record(folder), RunFolder(folder).read_result()
    assert record.run["config"]["update"]["search_metrics"] == "probability"
    expected = {(n, one.evaluation.metrics["syll/probability"]) for n, one in enumerate(individuals(folder), start=1)}
    assert set(record.points("fitness")) == expected
    for row in result.rows:
        score = row.scores["search"]
        assert record.summary[f"{row.key}/search_reported"] == score.fitness == score.metrics["syll/accuracy"]
    logged = {key: item[key] for item in record.history for key in item if key.startswith("full/")}
    full = result.full.scores["search"]
    assert logged["full/search"] == record.summary["full/search"] == full.metrics["syll/probability"]
    assert logged["full/search_reported"] == full.fitness
    winners = {one.number: one.evaluation.fitness for one in individuals(folder, split="search_reported")}
    assert [item["search_reported/search"] for item in record.history if "search_reported/search" in item] == list(
        winners.values()
    )
    assert "best/search" not in record.summary
    captions = [item["best/kept_experts.caption"] for item in record.history if "best/kept_experts.caption" in item]
    assert captions and all(", fitness (probability) 0." in one for one in captions)
    winner, fitness = result.best, {one.number: one.evaluation.fitness for one in individuals(folder)}
    assert captions[-1] == (
        f"the winner: candidate {winner.candidate}, fitness (probability) {fitness[winner.candidate]:.4f}, "
        f"test {winner.test}"
    )
    assert "`fitness (probability)`" in DOCUMENT.read_text() and "`full/search_reported`" in DOCUMENT.read_text()


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
    assert json.loads(entries["result.json"].read_text())["rows"] == json.loads(finished.result.read_text())["rows"]
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
        monkeypatch.setattr(open_pool, "load_evaluator", lambda *_, n=after: SomeFail(evaluator._evaluator, n))
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "run")
    monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
    search(tmp_path / "run")
    again = Record(tmp_path / "run")
    for key in ("fitness", "best/fitness", "population/best20_std", "phase"):
        assert again.points(key) == record.points(key)
    assert [row[:10] for row in again.rows()] == [row[:10] for row in record.rows()]
    assert again.summary["best/test"] == record.summary["best/test"]


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
        tracker.measured({"recovery/step": 0})
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
