"""Verdicts: signs and words agree, numbers are those of the table, and they stand wherever a result is shown."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import make_run
from rich.console import Console

import moe_evo
from moe_evo.cli.main import main as main_cli
from moe_evo.genomes.population import Evaluation
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import Journal
from moe_evo.records.paired import Paired, PairedByTask, paired, paired_by_task
from moe_evo.records.result import RunResult
from moe_evo.records.statistics import Difference, McNemar
from moe_evo.report.html import result_table
from moe_evo.report.task_scores import tasks_table
from moe_evo.report.verdict import compared, remarks, word_for


def difference(value: float, low: float, high: float, number: int = 56, mcnemar: McNemar | None = None) -> Paired:
    return Paired(Difference(value, low, high, number), mcnemar)


@pytest.mark.parametrize(
    ("found", "word", "told"),
    [
        (
            difference(0.089, 0.01, 0.16),
            "better",
            "A is better than B: +0.089 [+0.010, +0.160] on the same 56 test examples (95 % interval)",
        ),
        (
            difference(-0.167, -0.3, -0.1),
            "worse",
            "A is worse than B: -0.167 [-0.300, -0.100] on the same 56 test examples (95 % interval)",
        ),
        (
            difference(0.02, -0.08, 0.12),
            "unclear",
            "no difference between A and B can be told with 56 test examples: +0.020 [-0.080, +0.120]; about 460 would "
            "tell one of 0.05",
        ),
        (
            difference(0.001, -0.01, 0.012, 5000),
            "unclear",
            "no difference between A and B can be told with 5000 test examples: +0.001 [-0.010, +0.012]; one of 0.05 "
            "would probably have shown",
        ),
        (
            difference(0.05, 0.01, 0.12, 56, McNemar(3, 0, 0.25)),
            "unclear",
            "no difference between A and B can be told with 56 test examples: +0.050 [+0.010, +0.120]; only 3 of them "
            "are answered differently",
        ),
        (difference(0.0, 0.0, 0.0), "equal", "A and B have the same score on each of 56 test examples"),
    ],
)
def test_signs_and_words_agree(found: Paired, word: str, told: str) -> None:
    assert compared(found, "A", "B") == told
    assert word_for(found) == word


def with_scores(run: RunFolder, full: np.ndarray, winner: np.ndarray, task: str = "nli") -> RunFolder:
    """The run with test scores of every example of the full model and of the winner in its journal."""
    number = run.read_result().best.candidate
    with Journal(run.journal) as journal:
        for search, candidate, scores in (("reference", 0, full), ("search", number, winner)):
            journal.record(
                [(search, candidate, "test", Evaluation(scores.mean(), num_examples=200, scores={task: scores}))]
            )
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    rng = np.random.default_rng(0)
    full = (rng.random(200) < 0.9).astype(np.float64)
    winner = np.where(rng.random(200) < 0.2, 0.0, full)
    return with_scores(make_run(tmp_path / "run"), full, winner)


def test_show_compares_the_winner_of_an_older_result_with_the_full_model_from_its_journal(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.read_result().against_full is None
    with run.open_journal() as journal:
        full = journal.outcomes("reference", "test")[0]
        winner = journal.outcomes("search", "test")[run.read_result().best.candidate]
    assert isinstance(full, Evaluation) and isinstance(winner, Evaluation)
    assert full.scores is not None and winner.scores is not None
    expected = paired(winner.scores, full.scores)
    assert expected.sign == -1
    assert main_cli(["show", str(run.path)]) == 0
    (told,) = re.findall(r"^verdict  (.*)$", capsys.readouterr().out, re.M)
    assert told == compared(expected, "the winner", "the full model")
    assert main_cli(["show", str(run.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["against_full"]["overall"]["difference"]
    assert (found["value"], found["low"]) == (expected.difference.value, expected.difference.low)


def judged(run: RunFolder, *, chance: float | None = None, fitness: str = "mean") -> RunResult:
    result = run.read_result()
    tasks = tuple(replace(task, chance=chance) for task in result.tasks)
    return replace(
        result, tasks=tasks, fitness=fitness, against_full=PairedByTask(difference(-0.1, -0.2, -0.05, 200), {})
    )


def test_the_chance_level_stands_under_the_table_and_who_does_not_beat_it(run: RunFolder) -> None:
    told = [sentence for name, sentence in remarks(judged(run, chance=0.5)) if name == "chance"]
    assert told == ["guessing scores 0.500 on nli"]
    result = judged(run, chance=0.5)
    best = result.best
    score = replace(best.scores["test"], fitness=0.55, low=0.48, high=0.62, metrics={"nli/accuracy": 0.55})
    rows = (*result.rows[:-1], replace(best, scores={**best.scores, "test": score}))
    told = [sentence for name, sentence in remarks(replace(result, rows=rows)) if name == "chance"]
    assert told == ["guessing scores 0.500 on nli", "the winner is not told from guessing on nli"]
    assert not [one for one in remarks(judged(run)) if one[0] == "chance"]


def test_a_notebook_and_a_page_say_what_the_terminal_says(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = judged(run, chance=0.5)
    run.write_result(result)
    assert main_cli(["show", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert main_cli(["report", str(run.path), "--to", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    found = remarks(result)
    assert [name for name, _ in found] == ["verdict", "chance"]
    for name, sentence in found:
        assert f"{name:<9}{sentence}" in shown
        assert f"{name}: {sentence}" in page.replace("&#39;", "'")
        assert f"<p>{name}: {sentence}</p>" in result_table(result)
    assert "worse, 95\u00a0% interval -0.200 to -0.050" in page
    assert moe_evo.load_run(run.path).result.against_full == result.against_full


def test_a_lead_that_shrank_but_is_still_a_lead_is_not_called_a_loss(tmp_path: Path) -> None:
    page = make_run(tmp_path / "run")
    text = " ".join(sentence for _, sentence in remarks(judged(page)))
    assert "lose" not in text and "lost" not in text


def test_every_task_has_a_line_with_both_models_and_their_difference(run: RunFolder) -> None:
    result = judged(run, chance=0.5)
    (task,) = result.tasks
    other = replace(task, name="a rather long name of a task that has to fold", chance=None)
    rows = tuple(
        replace(row, scores={split: replace(score, metrics={**score.metrics, f"{other.name}/accuracy": 0.25})
                             for split, score in row.scores.items()})
        for row in result.rows
    )  # fmt: skip
    rng = np.random.default_rng(0)
    scores = [{name: (rng.random(60) < share).astype(float) for name in ("nli", other.name)} for share in (0.9, 0.3)]
    lead = paired_by_task(*scores)
    result = replace(result, tasks=(task, other), rows=rows, against_full=lead)
    output = io.StringIO()
    Console(file=output, width=80).print(tasks_table(result))
    text = output.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    nli = next(line for line in text.splitlines() if line.startswith("nli"))
    full, best = (row.scores["test"].metrics["nli/accuracy"] for row in (result.full, result.best))
    found = lead.tasks["nli"].difference
    assert nli.split() == [
        "nli", "200", "0.500", f"{full:.3f}", f"{best:.3f}", f"{found.value:+.3f}", f"[{found.low:+.3f},",
        f"{found.high:+.3f}]",
    ]  # fmt: skip


def test_of_the_worst_task_the_verdict_says_that_it_is_of_the_mean(run: RunFolder) -> None:
    result = judged(run, fitness="worst")
    ((_, alone),) = remarks(result)
    assert "mean over tasks" not in alone
    (task,) = result.tasks
    ((_, told),) = remarks(replace(result, tasks=(task, replace(task, name="other"))))
    assert told.endswith("(mean over tasks)")
