"""The tables of several runs as one: in the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from made_runs import make_run
from rich.console import Console

from moe_evo import cli
from moe_evo.report.lines import Line, print_lines, sorted_lines
from moe_evo.report.record import read_records


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    made = [
        make_run(root / "four", num_kept=4, parameters=True),
        make_run(root / "two", num_kept=2, seed=1),
        make_run(root / "half-done", num_kept=4, done=10),
    ]
    return [str(run.path) for run in made]


def printed(lines: list[Line], width: int = 80) -> str:
    output = io.StringIO()
    print_lines(lines, Console(file=output, width=width))
    return output.getvalue()


def test_csv_has_a_line_for_every_contender_of_every_run(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *runs, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 4 + 4 + 2
    for name in ("four", "two"):
        assert {row["key"] for row in rows if row["run"] == name} == {"full", "frequency", "best_pruning", "best"}
        result = json.loads((Path(runs[0]).parent / name / "result.json").read_text())
        for found in result["rows"]:
            row = next(row for row in rows if row["run"] == name and row["key"] == found["key"])
            for split, score in found["scores"].items():
                assert float(row[split]) == score["fitness"]
                assert float(row[f"{split}_low"]) == score["low"]
                assert float(row[f"{split}_high"]) == score["high"]
            assert float(row["num_kept"]) == found["num_kept"][0]
            assert row["seed"] == str(result["search"]["seed"])


def test_parameters_are_empty_where_the_run_has_none(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *runs, "--format", "json"]) == 0
    lines = {(line["run"], line["key"]): line for line in json.loads(capsys.readouterr().out)}
    assert lines["four", "best"]["parameters_share"] == 0.5
    assert lines["four", "full"]["parameters_share"] == 1.0
    assert lines["two", "best"]["parameters"] is lines["two", "best"]["parameters_share"] is None
    assert lines["two", "best"]["kept_share"] == 0.25


def test_few_experts_come_first_then_the_best_test_score_and_what_has_none_last(runs: list[str]) -> None:
    lines = sorted_lines(read_records(runs))
    assert [(line.num_kept, line.state) for line in lines if line.state == "unfinished" or line.key == "best"] == [
        (2, "finished"), (4, "finished"), (4, "unfinished"), (8, "unfinished")
    ]  # fmt: skip
    keys = [(line.num_kept or 0, -(line.test or 0)) for line in lines]
    assert keys == sorted(keys)
    assert sorted_lines(read_records(runs[::-1])) == lines


def test_an_unfinished_run_stands_in_the_table_of_its_tasks(runs: list[str], tmp_path: Path) -> None:
    lines = sorted_lines(read_records(runs))
    assert {line.tasks for line in lines} == {"nli (accuracy)"}
    assert printed(lines).count("higher is better") == 1
    other = make_run(tmp_path / "other", task="syll", done=10)
    lines = sorted_lines(read_records([*runs, other.path]))
    assert {line.tasks for line in lines if line.run == "other"} == {"syll"}


def test_an_unfinished_run_has_search_scores_alone(runs: list[str]) -> None:
    full, best = sorted(sorted_lines(read_records(runs[2:])), key=lambda line: line.key == "best")
    assert (full.key, best.key) == ("full", "best")
    assert best.title == "best of 10 so far"
    assert best.search is not None and best.validation is None and best.test is None


def test_the_terminal_table_cuts_no_number_and_says_how_to_go_on(runs: list[str]) -> None:
    text = printed(sorted_lines(read_records(runs)))
    assert text.count("[0.") == 8
    assert "16.00 M (50 %)" in text
    assert "2 of 8" in text
    assert "half-done (unfinished)" in text
    assert f"not finished, go on with: moe-evo search --resume {runs[2]}" in text
    assert "…" not in text


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "[red]x[", task="[/bold]t", done=3)
    text = printed(sorted_lines(read_records([run.path])), width=300)
    assert "[red]x[ (unfinished)" in text
    assert "[/bold]t; higher is better" in text


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"moe-evo: error: {tmp_path}: not the folder of a run")
