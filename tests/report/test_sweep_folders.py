"""The folder of a sweep in place of its runs; mean and spread over seeds; tables that fit a terminal."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_run
from rich.console import Console

import moe_evo
from moe_evo.cli.main import main as main_cli
from moe_evo.report.lines import print_lines, sorted_lines
from moe_evo.report.record import read_records
from moe_evo.report.sections import task_table
from moe_evo.report.spread import print_spreads, spreads

NAMES = ("keep2-seed0", "keep4-seed0", "keep4-seed1", "keep4-seed2")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder with finished runs and one that is not."""
    folder = tmp_path_factory.mktemp("sweeps") / "sizes"
    for name in NAMES:
        run = make_run(folder / "runs" / name, num_kept=int(name[4]), seed=int(name[-1]), parameters=True)
        result = json.loads(run.result.read_text())
        for row in result["rows"]:
            row["bytes"] = 4 * row["parameters"]
        run.result.write_text(json.dumps(result))
    make_run(folder / "runs" / "keep2-seed1", num_kept=2, seed=1, done=5)
    (folder / "sweep.yaml").write_text("tasks: [syll]\n")
    return folder


def test_compare_takes_the_folder_of_a_sweep_for_all_of_its_runs(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_cli(["compare", str(sweep), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {line["run"] for line in found["lines"]} == {*NAMES, "keep2-seed1"}
    runs = sorted((sweep / "runs").iterdir())
    assert main_cli(["compare", *map(str, runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert moe_evo.compare(sweep, in_pairs=False).lines == moe_evo.compare(*runs, in_pairs=False).lines


def test_spreads_are_those_of_the_runs_that_differ_in_their_seed_alone(sweep: Path) -> None:
    found = spreads(sorted_lines(read_records(sorted((sweep / "runs").iterdir()))))
    assert {(one.key, one.kept, one.seeds) for one in found} == {("best", "4 of 8", 3), ("best_pruning", "4 of 8", 3)}
    tests = [
        json.loads((sweep / "runs" / name / "result.json").read_text())["rows"][-1]["scores"]["test"]["fitness"]
        for name in NAMES[1:]
    ]
    best = next(one for one in found if one.key == "best")
    assert best.mean == pytest.approx(statistics.mean(tests))
    assert best.deviation == pytest.approx(statistics.stdev(tests))
    assert (best.lowest, best.highest) == (min(tests), max(tests))


def test_a_report_of_a_sweep_lies_in_its_folder_and_has_its_runs_and_their_spread(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_cli(["report", str(sweep)]) == 0
    page = (sweep / "report.html").read_text("utf-8")
    assert all(f'data-run="{number}">{name}</a>' in page for number, name in enumerate(sorted([*NAMES, "keep2-seed1"])))
    assert "<h2>Over seeds</h2>" in page
    one = sweep / "runs" / NAMES[0]
    assert main_cli(["report", str(one)]) == 0
    assert "<h2>Over seeds</h2>" not in (one / "report.html").read_text("utf-8")


def test_show_of_a_sweep_has_a_line_for_each_size_and_names_what_is_not_finished(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_cli(["show", str(sweep)]) == 0
    shown = capsys.readouterr().out
    assert "test score over seeds; nli; higher is better" in shown and "keep2-seed1 is not finished" in shown
    assert main_cli(["show", str(sweep), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["runs"], found["unfinished"]) == (list(NAMES), ["keep2-seed1"])


def test_a_sweep_without_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.yaml").write_text("tasks: [syll]\n")
    for command in ("show", "compare", "report"):
        assert main_cli([command, str(tmp_path)]) == 2
        told = "no run of this sweep has begun; give the same command again"
        assert capsys.readouterr().err == f"moe-evo: error: {tmp_path}: {told}\n"
    make_run(tmp_path / "runs" / "a", done=3)
    assert main_cli(["show", str(tmp_path)]) == 2
    assert "none of its 1 runs is finished" in capsys.readouterr().err


def test_the_tables_of_compare_fit_eighty_columns_and_cut_nothing(sweep: Path, tmp_path: Path) -> None:
    long = make_run(tmp_path / "a-run-with-a-rather-long-name-of-its-own", seed=7, parameters=True)
    lines = sorted_lines(read_records([*sorted((sweep / "runs").iterdir()), long.path]))
    output = io.StringIO()
    console = Console(file=output, width=80)
    print_lines(lines, console)
    print_spreads(spreads(lines), console)
    text = output.getvalue()
    tables = [line for line in text.splitlines() if not line.startswith(("keep", "a-run", "not finished"))]
    assert max(map(len, tables)) <= 80
    assert "…" not in text
    assert text.count("[0.") == 5 * 4
    assert f"seed 7, 60 evaluations, 16.00 M (50 %) parameters; {long.path}" in text


def test_the_table_of_a_sweep_fits_eighty_columns_and_cuts_nothing(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main_cli(["show", str(sweep)]) == 0
    table = capsys.readouterr().out.split("         keep2-seed1 is not")[0].splitlines()
    assert max(map(len, table)) <= 80 and "…" not in "".join(table)
    winners = [line for line in table if line.startswith("EEP prune + merge")]
    assert len(winners) == 2 and all(" M " in line and line.count("[0.") == 1 for line in winners)
    assert sum(" 3 " in line and "±" in line for line in winners) == 1  # the three seeds that keep four


def test_the_table_of_tasks_has_the_full_model_first_and_the_winner_beside_it(sweep: Path) -> None:
    (record,) = read_records([sweep / "runs" / NAMES[0]])
    found = task_table(record)
    assert found is not None and record.result is not None
    assert list(found.keys) == ["full", "best", "best_pruning", "frequency"]
    accuracy = next(one for one in found.metrics if one.split == "test" and one.metric == "accuracy")
    tests = {row.key: row.scores["test"].fitness for row in record.result.rows}
    np.testing.assert_allclose([cell[0] for cell in accuracy.cells if cell], [tests[key] for key in found.keys])
