"""The final tables of several runs as one list of lines, which `moe-evo compare` prints and reports sort."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_evo.genomes.population import Evaluation
from moe_evo.records.result import Row, RunResult
from moe_evo.report.plan import count_label
from moe_evo.report.record import Record
from moe_evo.report.screen import screen
from moe_evo.report.table import plain_table, print_fitting
from moe_evo.report.verdict import word_for
from moe_evo.shown import printable


@dataclass(frozen=True)
class Line:
    """One contender of one run.

    state: 'finished' or 'unfinished'; an unfinished run has only search scores, of the full model and of the best, and
    none where its tasks set `search_metric`, as scores are of `metric`.
    num_kept and num_experts: means over MoE layers. parameters: None where the run did not record them.
    {split}, {split}_low, {split}_high: fitness and its 95 % interval over examples; None where there is none.
    minus_full, minus_full_low, minus_full_high: of the winner, its test score minus that of the full model on the same
    examples. verdict: what that means in a word; see `word_for`.
    """

    run: str
    folder: str
    state: str
    model: str
    tasks: str
    algorithm: str
    seed: int
    key: str
    title: str
    num_kept: float | None
    num_experts: float | None
    kept_share: float | None
    parameters: int | None
    parameters_share: float | None
    evaluations: int
    search: float | None = None
    search_low: float | None = None
    search_high: float | None = None
    validation: float | None = None
    validation_low: float | None = None
    validation_high: float | None = None
    test: float | None = None
    test_low: float | None = None
    test_high: float | None = None
    minus_full: float | None = None
    minus_full_low: float | None = None
    minus_full_high: float | None = None
    verdict: str | None = None

    def interval(self, split: str) -> tuple[float, float, float] | None:
        """Fitness, low and high on one split, where it has all three."""
        values = (getattr(self, split), getattr(self, f"{split}_low"), getattr(self, f"{split}_high"))
        return None if None in values else values


def lines_of(record: Record) -> list[Line]:
    """The lines of one run's final table; of an unfinished run, those that are known so far."""
    common: dict[str, Any] = {
        "run": record.label,
        "folder": str(record.folder),
        "model": record.config.model.path,
        "tasks": _tasks(record),
        "algorithm": record.search.algorithm,
        "seed": record.search.seed,
    }
    if record.result is None:
        return _unfinished(record, common)
    num_experts = record.result.model.num_experts
    full = record.result.row("full")
    whole = None if full is None else full.parameters
    return [
        Line(
            **common,
            state="finished",
            key=row.key,
            title=row.title,
            num_kept=float(np.mean(row.num_kept)),
            num_experts=float(np.mean(num_experts)),
            kept_share=sum(row.num_kept) / sum(num_experts),
            parameters=row.parameters,
            parameters_share=row.parameters / whole if row.parameters and whole else None,
            evaluations=row.evaluations,
            **_intervals(row),
            **(_against_full(record.result) if row.key == "best" else {}),
        )
        for row in record.result.lines
    ]


def _intervals(row: Row) -> dict[str, Any]:
    """Fitness, low and high of every split that has them, by the names of `Line`'s fields."""
    return {
        f"{split}{suffix}": value
        for split, score in row.scores.items()
        for suffix, value in (("", score.fitness), ("_low", score.low), ("_high", score.high))
    }


def _against_full(result: RunResult) -> dict[str, Any]:
    """The winner minus the full model, by the names of `Line`'s fields."""
    if result.against_full is None:
        return {}
    overall = result.against_full.overall
    difference, word = overall.difference, word_for(overall)
    return {"minus_full": difference.value, "minus_full_low": difference.low, "minus_full_high": difference.high,
            "verdict": word}  # fmt: skip


def _unfinished(record: Record, common: dict[str, Any]) -> list[Line]:
    genome = record.genomes.get("best")
    best = None if record.best is None else record.outcomes[record.best]
    total = None if genome is None else sum(layer.num_experts for layer in genome.layers)
    layers = None if genome is None else len(genome.layers)
    common |= {
        "state": "unfinished",
        "num_experts": total / layers if total and layers else None,
        "parameters": None,
        "parameters_share": None,
    }
    found = []
    is_reported = not any(task.sets_search_metric for task in record.config.tasks)
    if record.full is not None:
        mean = common["num_experts"]
        share = None if mean is None else 1.0
        found.append(
            Line(**common, key="full", title="full model", num_kept=mean, kept_share=share, evaluations=0,
                 search=record.full.fitness if is_reported else None)
        )  # fmt: skip
    found.append(
        Line(
            **common,
            key="best",
            title=f"best of {len(record.outcomes)} so far",
            num_kept=float(record.search.mean_kept if genome is None else np.mean(genome.num_kept)),
            kept_share=None if genome is None or not total else sum(genome.num_kept) / total,
            evaluations=len(record.outcomes),
            search=best.fitness if isinstance(best, Evaluation) and is_reported else None,
        )
    )
    return found


def _tasks(record: Record) -> str:
    """Names of tasks with their metrics; without them for an unfinished run, where a default metric is not known."""
    if record.result is None:
        return ", ".join(record.task_names)
    return record.result.tasks_label


def lines_of_all(records: Sequence[Record]) -> list[Line]:
    """The lines of several runs; the metrics of an unfinished run are taken from a finished one of the same tasks."""
    known = {_tasks_key(record): _tasks(record) for record in records if record.is_finished}
    return [
        line if record.is_finished else replace(line, tasks=known.get(_tasks_key(record), line.tasks))
        for record in records
        for line in lines_of(record)
    ]


def _tasks_key(record: Record) -> tuple[tuple[str, ...], ...]:
    return tuple((task.name, task.data, task.kind, task.metric) for task in record.config.tasks)


def sorted_lines(records: Sequence[Record]) -> list[Line]:
    """The lines of several runs, sorted by tasks, model, number of kept experts, and test score with the best first.

    Lines without a test score come last among those that keep as many experts.
    """
    return sorted(lines_of_all(records), key=_order)


def _order(line: Line) -> tuple[str | float, ...]:
    test = -np.inf if line.test is None else line.test
    return (line.tasks, line.model, line.num_kept or 0.0, -test, line.run, line.seed)


def as_csv(lines: Sequence[Line]) -> str:
    """The lines as CSV (RFC 4180) with a header; the field of a missing number is empty."""
    output = io.StringIO()
    writer = csv.DictWriter(output, list(Line.__dataclass_fields__))
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in asdict(line).items()} for line in lines)
    return output.getvalue()


def _cell(value: object) -> object:
    """A value as a spreadsheet shows it: a text that it would take for a formula has an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text


def print_lines(lines: Sequence[Line], console: Console | None = None) -> None:
    """Print the lines as tables; winners are bold. Below each table stand its runs with what they were made by."""
    console = console or screen()
    for tasks in dict.fromkeys(line.tasks for line in lines):
        group = [line for line in lines if line.tasks == tasks]
        print_fitting(console, _table(tasks, group))
        for line in group:
            if line.key == "best":
                console.print(f"{line.run}: {_made_by(line)}", highlight=False, markup=False, soft_wrap=True)
    unfinished = list(dict.fromkeys(line.folder for line in lines if line.state == "unfinished"))
    for folder in unfinished:
        console.print(f"not finished, go on with: moe-evo search --resume {folder}",
                      highlight=False, markup=False, soft_wrap=True)  # fmt: skip


def _made_by(line: Line) -> str:
    """Algorithm, seed, evaluations, size, verdict and folder of a run, by the line of its winner."""
    parameters = f", {parameters_label(line)} parameters" if line.parameters else ""
    told = ""
    if line.minus_full is not None:
        told = f"; winner minus full model {line.minus_full:+.3f} [{line.minus_full_low:+.3f}, "
        told += f"{line.minus_full_high:+.3f}], {line.verdict}"
    spent = f"{line.evaluations} evaluations"
    return f"{line.algorithm}, seed {line.seed}, {spent}{parameters}{told}; {line.folder}"


def _table(tasks: str, lines: Sequence[Line]) -> Table:
    table = plain_table(Text(f"{tasks}; higher is better"))
    table.add_column("run", overflow="fold")
    table.add_column("", overflow="fold")
    for heading in ("experts", "search", "validation", "test [95 % interval]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        mark = " (unfinished)" if line.state == "unfinished" else ""
        table.add_row(
            Text(line.run + mark),
            Text(line.title),
            kept_label(line),
            *(f"{value:.3f}" if value is not None else "" for value in (line.search, line.validation)),
            _interval_label(line),
            style="bold" if line.key == "best" else "",
        )
    return table


def kept_label(line: Line) -> str:
    """Number of experts kept, such as '4 of 8'."""
    if line.num_kept is None:
        return ""
    return f"{line.num_kept:.4g}" + (f" of {line.num_experts:.4g}" if line.num_experts else "")


def parameters_label(line: Line) -> str:
    """Number of parameters, and its share of the full model's, such as '1.74 M (58 %)'."""
    if not line.parameters:
        return ""
    share = f" ({line.parameters_share:.0%})".replace("%", " %") if line.parameters_share and line.key != "full" else ""
    return count_label(line.parameters) + share


def _interval_label(line: Line) -> str:
    interval = line.interval("test")
    return "" if interval is None else "{:.3f} [{:.3f}, {:.3f}]".format(*interval)
