"""The script that makes the table of recovered models: which cells it has, and what it shows of an unfinished one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "embedded"
METHODS = ("router", "labels", "logits", "layerwise", "closed_form", "closed_form + logits")


@pytest.fixture
def recovered(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("recovered")


def job(recovered: ModuleType, folder: Path, way: object, *, task: str = "nli", seed: int = 0) -> object:
    cell = recovered.Cell("embedded", task, 2, seed, 200, str(folder / "runs"))
    return recovered.Job(cell, way, str(folder / "data"), str(folder / "kept"))


def finish(one: object, *, after: float, seconds: float = 7.0) -> None:
    """Keep the figures of a recovery of a task with ten test examples."""
    scores = {"full": [1.0] * 10, "pruned": [0.5] * 10, "recovered": [after] * 10}
    examples = {name: {one.cell.task: values} for name, values in scores.items()}  # type: ignore[attr-defined]
    stages = [{"method": "logits", "learned": {"duration_s": seconds}}]
    one.figures.parent.mkdir(parents=True, exist_ok=True)  # type: ignore[attr-defined]
    one.figures.write_text(json.dumps({"examples": examples, "stages": stages}))  # type: ignore[attr-defined]


def test_each_method_alone_and_the_default_learn_from_few_and_from_many_prompts(recovered: ModuleType) -> None:
    titles = [way.title for way in recovered.WAYS if way.pruned == "surrogate"]
    assert sorted(titles) == sorted(f"{method}, {number}" for method in METHODS for number in ("300", "4,300"))
    assert len(set(recovered.WAYS)) == len(recovered.WAYS) == 14


def test_a_table_of_finished_recoveries_has_dashes_for_others(
    recovered: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_title = {way.title: way for way in recovered.WAYS if way.pruned == "surrogate"}
    closed, logits = by_title["closed_form, 300"], by_title["logits, 300"]
    finish(job(recovered, tmp_path, closed, seed=0), after=0.8)
    finish(job(recovered, tmp_path, closed, seed=1), after=0.6, seconds=9.0)
    finish(job(recovered, tmp_path, closed, task="syll"), after=0.9)
    finish(job(recovered, tmp_path, logits, task="syll"), after=1.0)
    monkeypatch.setattr(recovered, "run_all", lambda run, cells, jobs, told: {cell: run(cell) for cell in cells})
    monkeypatch.setattr(recovered, "recover", lambda *_, **__: pytest.fail("--most 0 recovers nothing"))
    words = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--folder", str(tmp_path / "kept")]
    words += ["--tasks", "nli", "syll", "--num_kept", "2", "--seeds", "0", "1", "--most", "0"]
    assert recovered.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| task | full | surrogate, as it is | logits, 300 | closed_form, 300 | best criterion, as it is |" in lines
    assert "| nli | 1.000 | 0.500 | – | 0.700 | – |" in lines  # the mean of two seeds
    assert "| syll | 1.000 | 0.500 | 1.000 | 0.900 | – |" in lines
    assert "| **mean** | **1.000** | **0.500** | **–** | **0.800** | **–** |" in lines
    told = "| surrogate: closed_form, 300 | +0.300 [+0.200, +0.400] | -0.200 [-0.300, -0.100] | 8 | 3 |"
    assert told in lines


def test_as_many_recoveries_are_made_as_are_asked_for(
    recovered: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def made(one: object) -> object:
        asked.append(one)
        return recovered.Recovered((1.0,), (0.5,), (0.8,), 1.0)

    finish(job(recovered, tmp_path, recovered.WAYS[0]), after=0.8)
    monkeypatch.setattr(recovered, "run_all", lambda run, cells, jobs, told: {cell: run(cell) for cell in cells})
    monkeypatch.setattr(recovered, "run_job", made)
    words = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--folder", str(tmp_path / "kept")]
    words += ["--tasks", "nli", "syll", "--num_kept", "2", "--seeds", "0", "--most", "15"]
    assert recovered.main(words) == 0
    assert [one.cell.task for one in asked] == ["nli"] * 14 + ["syll"] * 2
