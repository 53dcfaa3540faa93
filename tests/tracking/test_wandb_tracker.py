"""Whether and where W&B is told: modes, a stand-in for a service that fails, kills, and replays."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tracked_runs import SMALL, Record, SomeFail, search
from wandb_stand_in import KEY, StandIn, stand_in

from moe_evo.cli.main import main
from moe_evo.config.run import TrackingConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Outcome
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import Journal
from moe_evo.runs import open_pool
from moe_evo.tracking import wandb_log, wandb_run, wandb_tracker
from moe_evo.tracking.wandb_run import wandb_mode

SLOW = """
import sys, time
from moe_evo.cli.main import main
from moe_evo.evaluation.evaluator import Evaluator
evaluate = Evaluator.evaluate
def slow(self, *arguments, **more):
    time.sleep(0.05)
    return evaluate(self, *arguments, **more)
Evaluator.evaluate = slow
sys.exit(main(sys.argv[1:]))
"""


def finished_at(folder: Path) -> list[float]:
    """When the outcomes of the search were written, seconds since the epoch."""
    with sqlite3.connect(f"file:{folder}/journal.sqlite?mode=ro", uri=True) as database:
        query = "SELECT finished_at FROM outcomes WHERE search = 'search' AND split = 'search' ORDER BY position"
        return [at for (at,) in database.execute(query)]


def _seen(folder: Path) -> list[float]:
    try:
        return finished_at(folder)
    except sqlite3.OperationalError:
        return []


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
    monkeypatch.setattr(wandb_run, "_FINISH_TIMEOUT_S", 2.0)
    monkeypatch.setattr(wandb_tracker, "_GRACE_S", 1.0)


@pytest.mark.parametrize("behaviour", ["hangs", 500, 403, 429])
def test_a_service_that_fails_from_the_start_costs_one_line(
    behaviour: str | int, resident: SomeFail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(behaviour) as server:
        online(monkeypatch, server)
        shown = search(tmp_path / "run", SMALL)
        assert server.num_requests > 0
    assert RunFolder(tmp_path / "run").read_result().search.evaluations == 12
    (line,) = [line for line in shown.splitlines() if "W&B" in line]
    assert f"moe-evo wandb-replay {tmp_path / 'run'}" in line


@pytest.mark.parametrize("later", ["hangs", 500, 403])
def test_a_service_that_fails_in_the_middle_costs_one_line(
    later: str | int, evaluator: SomeFail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in("answers") as server:
        online(monkeypatch, server)

        class Failing(SomeFail):
            def evaluate(self, genomes: list[Genome], split: str, **_: Any) -> list[Outcome]:
                if split == "search":
                    time.sleep(0.1)  # so that the run of W&B has begun
                else:
                    server.behaviour = later
                return super().evaluate(genomes, split)

        monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: Failing(evaluator._evaluator))
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
        monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: SomeFail(evaluator._evaluator, 8, pause_s=0.3))
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "run", SMALL)
        ((run, lines),) = server.history.items()
        first = len([one for one in lines if "evaluation_s" in one])
        assert first > 0
        monkeypatch.setattr(open_pool, "load_evaluator", lambda *_: evaluator)
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
        "import sys; from moe_evo.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "sys.exit(status or ('wandb' in sys.modules))"
    )
    words = ["search", "--folder", str(tmp_path / "run"), "--model.self_check", "false", "--search.evaluations", "2"]
    words += ["--tasks", "[{data: syll, num_search: 4, num_validation: 4, num_test: 4}]"]
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False).returncode == 0
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_wandb_that_keeps_its_process_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_log.wandb_setup, "singleton", lambda: object())
    with pytest.raises(LookupError, match=r"wandb \d+\.\d+.* has its own process elsewhere than expected \('object'"):
        wandb_log.teardown()
