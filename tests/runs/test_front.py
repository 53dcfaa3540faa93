"""Runs with several objectives: the front in the result, in what is shown, and as checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_evo
from moe_evo.cli.main import main
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import RunError
from moe_evo.genomes.population import Population
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder
from moe_evo.records.result import RunResult
from moe_evo.report.front import front_picture, names_of
from moe_evo.report.payload import run_payload
from moe_evo.report.record import read_records
from moe_evo.searches.objectives import Objectives
from moe_evo.searches.registry import build_space
from moe_evo.searches.scored import expected_points

MakeRun = Callable[..., Path]


def config_of(objectives: list[str], folder: Path, **more: Any) -> RunConfig:
    names = ("syll", "city") if "tasks" in objectives else ("syll",)
    return RunConfig(
        model=ModelConfig(self_check=False),
        tasks=[TaskConfig(data=name, num_search=12, num_validation=8, num_test=8) for name in names],
        search=SearchConfig(
            algorithm="surrogate",
            objectives=objectives,
            num_kept={"min": 2, "max": 8} if "parameters" in objectives else 4,
            evaluations=20,
            **more,
        ),
        selection=SelectionConfig(finalists=2, baselines=[]),
        folder=str(folder),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, moe_evo.Run]:
    folder = tmp_path_factory.mktemp("fronts")
    configs = {
        "parameters": config_of(["quality", "parameters"], folder / "parameters"),
        "active": config_of(["quality", "active"], folder / "active"),
        "tasks": config_of(["tasks"], folder / "tasks"),
    }
    return {name: moe_evo.search(config=config) for name, config in configs.items()}


@pytest.fixture(params=["parameters", "active", "tasks"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def points_of(result: RunResult, split: str = "expected") -> list[list[float]]:
    signs = [1 if name.startswith("quality") else -1 for name in names_of(result)]
    return [
        [sign * one for sign, one in zip(signs, point.values[split].values(), strict=True)] for point in result.front
    ]


def test_no_point_is_expected_to_beat_another_and_all_are_scored_on_every_split(
    runs: dict[str, moe_evo.Run], kind: str
) -> None:
    result = runs[kind].result
    points = points_of(result)
    assert 1 <= len(points) <= 10
    for one in points:
        for other in points:
            assert one == other or any(a > b for a, b in zip(one, other, strict=True))
    assert points == sorted(points, reverse=True)
    for number, point in enumerate(result.front, start=1):
        assert point.row.key == f"front-{number}" and set(point.row.scores) == {"search", "validation", "test"}
        assert set(point.values) == {"expected", *point.row.scores}
        assert runs[kind].genome(point.row.key).digest == point.row.digest


def test_the_values_are_what_the_objectives_say(runs: dict[str, moe_evo.Run]) -> None:
    point = runs["parameters"].result.front[-1]
    assert point.values["test"]["quality"] == point.row.test.fitness
    assert point.values["test"]["experts"] == sum(point.row.num_kept) / 4
    point = runs["active"].result.front[-1]
    assert point.values["search"]["top_k"] == sum(point.row.top_k) / 4 and set(point.row.num_kept) == {4}
    assert names_of(runs["tasks"].result) == ["quality city", "quality syll"]
    point = runs["tasks"].result.front[0]
    assert point.values["test"]["quality city"] == point.row.test.metrics["city/accuracy"]
    assert point.row.test.fitness == pytest.approx(sum(point.values["test"].values()) / 2)


def test_no_individual_of_the_search_is_expected_to_beat_a_point(runs: dict[str, moe_evo.Run], kind: str) -> None:
    run = runs[kind]
    objectives = Objectives(run.config.search.objectives)
    space = build_space(ModelSource(run.config.model).shape, run.config.search)
    with RunFolder(run.folder).open_journal() as journal:
        population = Population().with_outcomes(journal.individuals("search"))
    found = expected_points(space, population, objectives)
    assert not np.allclose(found, objectives.points(population.individuals))
    for point in np.array(points_of(run.result)):
        assert (np.abs(found - point).max(axis=1) < 1e-9).any()
        assert not ((found >= point - 1e-9).all(axis=1) & (found > point + 1e-9).any(axis=1)).any()


def test_the_front_is_shown_in_the_terminal_in_json_and_on_the_page(
    runs: dict[str, moe_evo.Run], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = runs[kind].folder, runs[kind].result
    assert main(["show", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"as expected on the search split, best {names_of(result)[0]} first" in told and "front-1 " in told
    assert f"a point  moe-evo export {folder} --which front-1 --to {folder}/front-1" in told
    needs_loader = any(point.row.loader == "moe_evo" for point in result.front)
    assert ("moe_evo: loads with moe_evo.load_pruned; transformers and vLLM" in " ".join(told.split())) == needs_loader
    assert main(["show", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "result.json").read_text())
    assert main(["report", str(folder), "--overwrite"]) == 0
    maps = run_payload(read_records([folder])[0])["maps"]
    assert [one["top_k"] for one in maps if one["key"].startswith("front")] == [
        list(one.row.top_k) for one in result.front
    ]
    page = (folder / "report.html").read_text()
    assert "<h3>Front</h3>" in page and front_picture(result) in page and "--which front-1" in page
    capsys.readouterr()
    assert front_picture(result) in runs[kind]._repr_html_()


def test_every_point_can_be_exported_and_says_what_loads_it(
    runs: dict[str, moe_evo.Run], kind: str, tmp_path: Path
) -> None:
    run = runs[kind]
    for point in run.result.front[:3]:
        exported = run.export(tmp_path / point.row.key, which=point.row.key)
        assert exported.report.loader == point.row.loader and exported.report.max_logit_difference < 1e-4
        assert exported.report.parameters_after == point.row.parameters


def test_a_point_that_is_not_there_is_one_line(
    runs: dict[str, moe_evo.Run], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = runs["parameters"].folder
    assert main(["export", str(folder), "--which", "front-77", "--to", str(tmp_path / "out")]) == 2
    assert "--which: got 'front-77', expected one of best, front-1" in capsys.readouterr().err
    with pytest.raises(RunError, match="has no genome 'front-77', expected one of: best, front-1"):
        runs["parameters"].genome("front-77")


def test_a_run_that_goes_on_has_the_same_front(runs: dict[str, moe_evo.Run], tmp_path: Path) -> None:
    """The search is interrupted after its last evaluation, so that all that is left is the choice."""
    from shutil import copytree

    run = runs["active"]
    again = copytree(run.folder, tmp_path / "again")
    (again / "result.json").unlink()
    assert main(["search", "--resume", str(again)]) == 0
    assert moe_evo.load_run(again).result.front == run.result.front


def test_random_search_has_a_front_too(tmp_path: Path) -> None:
    config = config_of(["quality", "parameters"], tmp_path / "random")
    run = moe_evo.search(config=replace(config, search=replace(config.search, algorithm="random")))
    assert len(run.result.front) >= 2


def test_one_objective_has_no_front_and_result_json_says_nothing_of_it(tmp_path: Path) -> None:
    run = moe_evo.search(config=config_of(["quality"], tmp_path / "one"))
    assert run.result.front == () and "front" not in json.loads((run.folder / "result.json").read_text())
    assert "<h3>Front</h3>" not in Path(run.report().report).read_text() and front_picture(run.result) == ""
