"""The tables of several runs as one, and their winners in pairs: in the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from made_runs import make_run
from rich.console import Console

from moe_evo.cli.main import main as main_cli
from moe_evo.genomes.population import Evaluation, EvaluationFailure, Outcome
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import Journal
from moe_evo.records.statistics import exact_mcnemar, paired_difference
from moe_evo.report.lines import Line, print_lines, sorted_lines
from moe_evo.report.pairing import Pairing, pairings, print_pairings
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
    assert main_cli(["compare", *runs, "--format", "csv"]) == 0
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
    assert main_cli(["compare", *runs, "--format", "json"]) == 0
    lines = {(line["run"], line["key"]): line for line in json.loads(capsys.readouterr().out)["lines"]}
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
    assert "half-done (unfinished)" in printed(sorted_lines(read_records(runs)), width=120)
    assert f"not finished, go on with: moe-evo search --resume {runs[2]}" in text
    assert "…" not in text


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "[red]x[", task="[/bold]t", done=3)
    text = printed(sorted_lines(read_records([run.path])), width=300)
    assert "[red]x[ (unfinished)" in text
    assert "[/bold]t; higher is better" in text


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_cli(["compare", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"moe-evo: error: {tmp_path}: not the folder of a run")


def answers(seed: int, share: float = 0.7, number: int = 200) -> npt.NDArray[np.float64]:
    return (np.random.default_rng(seed).random(number) < share).astype(np.float64)


def record_test(run: RunFolder, outcome: npt.NDArray[np.float64] | Outcome, task: str = "nli") -> RunFolder:
    """Write down what the run's winner reached on the test split: an outcome, or the scores of its examples."""
    if isinstance(outcome, np.ndarray):
        outcome = Evaluation(float(outcome.mean()), num_examples=len(outcome), scores={task: outcome})
    winner = read_records([run.path])[0].best
    assert winner is not None
    with Journal(run.journal) as journal:
        journal.record([("search", winner, "test", outcome)])
    return run


def printed_pairs(found: list[Pairing], width: int = 80) -> str:
    output = io.StringIO()
    print_pairings(found, Console(file=output, width=width))
    return output.getvalue()


def test_every_other_winner_is_paired_with_that_of_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"first": answers(1), "better": answers(2, 0.9), "twin": answers(1)}
    runs = [record_test(make_run(tmp_path / name, seed=n), one) for n, (name, one) in enumerate(scores.items())]
    assert main_cli(["compare", *(str(run.path) for run in runs), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["lines"]) == 3 * 4
    assert [(one["run"], one["against"], one["reason"]) for one in found["paired"]] == [
        ("better", "first", None), ("twin", "first", None)
    ]  # fmt: skip
    better, twin = found["paired"]
    own, others = {"nli": scores["better"]}, {"nli": scores["first"]}
    expected, mcnemar = paired_difference(own, others, np.random.default_rng(0)), exact_mcnemar(own, others)
    assert mcnemar is not None
    assert better["folder"] == str(runs[1].path)
    assert better["num_examples"] == 200
    assert better["difference"] == pytest.approx(scores["better"].mean() - scores["first"].mean())
    assert (better["difference_low"], better["difference_high"]) == (expected.low, expected.high)
    assert {key: better[key] for key in ("won", "lost", "p_value")} == asdict(mcnemar)
    assert [twin[key] for key in ("difference", "difference_low", "difference_high", "p_value")] == [0, 0, 0, 1]


def test_the_terminal_shows_the_pairs_under_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = answers(1), answers(1)
    second[np.flatnonzero(first == 0)[:20]] = 1.0
    runs = [record_test(make_run(tmp_path / name), one) for name, one in (("[b]one", first), ("[red]two", second))]
    assert main_cli(["compare", *(str(run.path) for run in runs)]) == 0
    text = capsys.readouterr().out
    main, pairs = text.split("\ntest score of the winner minus that of [b]one, on the same examples\n")
    assert "higher is better" in main
    assert "McNemar p" in pairs.splitlines()[0]
    (line,) = (line.split() for line in pairs.splitlines() if "two" in line)
    assert line[:2] == ["[red]two", "+0.100"]
    assert line[4:] == ["200", "20", "0", "<", "0.001", "better"]


def test_scores_between_0_and_1_have_an_interval_and_no_mcnemar_test(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    runs = [record_test(make_run(tmp_path / name), rng.random(200)) for name in ("one", "two")]
    (found,), again = (pairings(read_records([run.path for run in runs])) for _ in range(2))
    assert again == [found]
    assert found.difference_low is not None and found.difference_high is not None
    assert found.difference_low < found.difference_high
    assert found.won is found.lost is found.p_value is None
    assert "None" not in printed_pairs([found])


def edit_result(run: RunFolder, change: Callable[[dict[str, Any]], None]) -> None:
    result = json.loads(run.result.read_text("utf-8"))
    change(result["tasks"][0])
    run.result.write_text(json.dumps(result), "utf-8")


def edit_config(run: RunFolder, change: Callable[[dict[str, Any]], None]) -> None:
    config = yaml.safe_load(run.config.read_text("utf-8"))
    change(config["tasks"][0])
    run.config.write_text(yaml.safe_dump(config), "utf-8")


@pytest.mark.parametrize(
    ("edit", "change", "reason"),
    [
        (edit_result, {"hash": "2" * 64}, "other data of task nli"),
        (
            edit_result,
            {"examples": {"search": 1, "validation": 1, "test": 100}},
            "other test examples of task nli: 100, not 200",
        ),
        (edit_result, {"metric": "f1"}, "another metric of task nli: f1, not accuracy"),
        (edit_config, {"split_shares": [0.3, 0.3, 0.4]}, "another test share of task nli: 0.4, not 0.5"),
    ],
)
def test_runs_with_other_test_examples_are_not_paired_and_told_why(
    tmp_path: Path,
    edit: Callable[[RunFolder, Callable[[dict[str, Any]], None]], None],
    change: dict[str, Any],
    reason: str,
) -> None:
    runs = [record_test(make_run(tmp_path / name), answers(1)) for name in ("one", "two")]
    edit(runs[1], lambda task: task.update(change))
    (found,) = pairings(read_records([run.path for run in runs]))
    assert found == Pairing("two", str(runs[1].path), "one", reason)
    assert printed_pairs([found]) == f"not paired with one: two ({reason})\n"


def test_a_share_that_only_parts_search_from_validation_leaves_the_test_examples_the_same(tmp_path: Path) -> None:
    runs = [record_test(make_run(tmp_path / name), answers(1)) for name in ("one", "two")]
    edit_config(runs[1], lambda task: task.update({"split_shares": [0.1, 0.4, 0.5]}))
    (found,) = pairings(read_records([run.path for run in runs]))
    assert found.reason is None


def test_runs_that_cannot_be_paired_stand_in_one_line_for_each_reason(tmp_path: Path) -> None:
    first = record_test(make_run(tmp_path / "first"), answers(1))
    failed = record_test(make_run(tmp_path / "failed"), EvaluationFailure("non_finite", "logits are not finite"))
    bare = [make_run(tmp_path / name) for name in ("bare", "bald")]
    other = record_test(make_run(tmp_path / "other", task="syll"), answers(1), "syll")
    half_done = make_run(tmp_path / "half-done", done=3)
    found = pairings(read_records([run.path for run in (first, failed, *bare, other, half_done)]))
    assert printed_pairs(found).splitlines() == [
        "not paired with first: failed (its winner could not be scored on the test split)",
        "not paired with first: bare, bald (no test scores of its winner in its journal)",
        "not paired with first: other (other tasks: syll, not nli)",
        "not paired with first: half-done (not finished)",
    ]
    found = pairings(read_records([run.path for run in (half_done, first, *bare)]))
    assert printed_pairs(found) == "not paired with half-done: first, bare, bald (half-done: not finished)\n"


def test_one_run_has_nobody_to_be_paired_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = record_test(make_run(tmp_path / "one"), answers(1))
    for twice in ([run.path], [run.path, run.path]):
        assert main_cli(["compare", *map(str, twice), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["paired"] == []
    assert main_cli(["compare", str(run.path)]) == 0
    assert "pair" not in capsys.readouterr().out


def test_real_runs_are_paired_on_the_examples_of_their_test_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, task, num_kept in (("four", "syll", 4), ("two", "syll", 2), ("other", "nli", 2)):
        tasks = f'[{{"data": "{task}", "num_search": 12, "num_validation": 8, "num_test": 40}}]'
        argv = ["search", "--tasks", tasks, "--search.evaluations", "6", "--selection.finalists", "2",
                "--search.num_kept", str(num_kept), "--evaluation.threads", "1", "--folder", str(tmp_path / name),
                "--json"]  # fmt: skip
        assert main_cli(argv) == 0
    capsys.readouterr()
    assert main_cli(["compare", *(str(tmp_path / name) for name in ("four", "two", "other")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    two, other = found["paired"]
    test = {line["run"]: line["test"] for line in found["lines"] if line["key"] == "best"}
    assert two["num_examples"] == 40
    assert two["difference"] == pytest.approx(test["two"] - test["four"])
    assert two["difference_low"] <= two["difference"] <= two["difference_high"]
    assert two["won"] - two["lost"] == pytest.approx(40 * two["difference"])
    assert other["reason"] == "other tasks: nli, not syll"
