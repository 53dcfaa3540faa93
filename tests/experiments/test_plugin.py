"""The example of a package that brings a search, a metric and a criterion: installed, used, tested by the suites."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "experiments" / "plugin"
METRICS = {"by_name": "starts_with", "by_path": "moe_evo_example.metric:starts_with"}
COMMON = "data: nli, kind: generation, max_new_tokens: 3, num_search: 8, num_validation: 4, num_test: 4"
TASKS = ", ".join(f"{{name: {name}, metric: '{metric}', {COMMON}}}" for name, metric in METRICS.items())
FEW = ["--search.evaluations", "6", "--selection.finalists", "2", "--evaluation.threads", "1"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example is installed into."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")  # building leaves files beside the source
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    run(words, folder, folder / "source")
    return folder / "site"


def run(words: list[Any], site: Path, *more: Any, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Python with these words, and with the folder `site` on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = [sys.executable, *map(str, [*words, *more])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site.parent, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def search(site: Path, folder: Path, *words: str) -> dict[str, Any]:
    own = ["--folder", folder, "--tasks", f"[{TASKS}]", *FEW]
    run(["-m", "moe_evo", "search", EXAMPLE / "climber.yaml", *own, *words], site)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def rows(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    scores = [{split: one["fitness"] for split, one in row["scores"].items()} for row in result["rows"]]
    return [(row["key"], row["title"], row["digest"], one) for row, one in zip(result["rows"], scores, strict=True)]


@pytest.fixture(scope="module")
def folder(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    search(site, path)
    return path


@pytest.fixture
def alone(folder: Path) -> dict[str, Any]:
    """Its result."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_its_search_metric_and_criterion_are_used_by_their_names(alone: dict[str, Any]) -> None:
    titles = ["full model", "frequency pruning", "mean_gate pruning", "climbed"]
    assert [row["title"] for row in alone["rows"]] == titles
    assert alone["search"]["algorithm"] == "climber" and alone["search"]["evaluations"] == 6
    assert {task["name"]: task["metric"] for task in alone["tasks"]} == METRICS
    metrics = alone["rows"][-1]["scores"]["test"]["metrics"]
    assert metrics["by_name/starts_with"] == metrics["by_path/moe_evo_example.metric:starts_with"]


@pytest.mark.timeout(600)  # starts a Ray of its own
def test_gangs_load_the_same_plug_ins(site: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    result = search(site, tmp_path / "run", "--cluster.address", "local", "--cluster.num_gangs", "1")
    assert result["gangs"] is not None and rows(result) == rows(alone)


def test_a_path_names_the_same_search(site: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    result = search(site, tmp_path / "run", "--search.algorithm", "moe_evo_example.climber:Climber")
    assert rows(result) == rows(alone)


def test_its_criterion_is_listed_and_a_wrong_name_is_one_line(site: Path) -> None:
    assert "mean_gate" in run(["-m", "moe_evo", "criteria"], site).stdout
    done = run(["-m", "moe_evo", "search", "--search.algorithm", "climbr"], site, code=2)
    *started, line = done.stderr.strip().splitlines()
    assert started == ["starting, importing torch and transformers ..."]
    assert line.startswith(
        "moe-evo: error: search.algorithm: got 'climbr', did you mean 'climber'? expected one of eep, "
    )


def test_a_report_of_its_run_needs_no_plug_in(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run(["-m", "moe_evo", "report", folder, "--to", tmp_path / "report.html"], tmp_path / "empty")
    assert "climber" in (tmp_path / "report.html").read_text("utf-8")


def test_its_own_tests_pass(site: Path) -> None:
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider"], site, site.parent / "source" / "tests")
    assert "passed" in done.stdout and "failed" not in done.stdout
