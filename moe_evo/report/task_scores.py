"""The scores of single tasks: with intervals where these are known, and as a table of the full model and the winner."""

from __future__ import annotations

import math

from rich.table import Table
from rich.text import Text

from moe_evo.genomes.population import ACTIVE_EXPERTS
from moe_evo.records.result import Row, RunResult, TaskFacts
from moe_evo.records.statistics import Difference, wilson_interval
from moe_evo.report.table import plain_table
from moe_evo.tasks.kinds import KINDS, SHARE

Cell = tuple[float, float | None, float | None]
"""A value with its interval, where it has one."""


def task_score(row: Row, split: str, task: TaskFacts, metric: str, *, num_tasks: int) -> Cell | None:
    """Value, low and high of a metric of a task; None where the row has none.

    The interval is known where the metric is a share, and where the row's fitness is this metric of this one task.
    """
    score = row.scores.get(split)
    value = None if score is None else score.metrics.get(f"{task.name}/{metric}")
    if score is None or value is None or not math.isfinite(value):
        return None
    if num_tasks == 1 and metric == task.metric:
        return (value, score.low, score.high)
    number = task.examples[split]
    if not is_share(task, metric) or not 0 <= value <= 1 or number < 2:
        return (value, None, None)
    return (value, *wilson_interval(value, number))  # for right and wrong answers; scores between them vary less


def is_share(task: TaskFacts, metric: str) -> bool:
    """Whether a metric is a share from 0 to 1; nothing is known of a kind that is not installed here."""
    return metric != ACTIVE_EXPERTS and task.kind in KINDS and KINDS[task.kind].unit(metric) == SHARE


def unit_of(task: TaskFacts, metric: str) -> str:
    """The unit of a metric in words; '' for a share."""
    if metric == ACTIVE_EXPERTS:
        return "a token, mean over layers"
    return "" if task.kind not in KINDS or is_share(task, metric) else KINDS[task.kind].unit(metric)


def interval_label(difference: Difference) -> str:
    """A difference with its sign and its 95 % interval."""
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def tasks_table(result: RunResult) -> Table:
    """One line a task: the full model and the winner on its test examples, and their difference in pairs."""
    table = plain_table("test score of each task")
    table.add_column("", overflow="fold")
    has_chance = any(task.chance is not None for task in result.tasks)
    headings = ["examples", *["chance"] * has_chance, "full model", "winner", "winner - full model [95 %]"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    found = {} if result.against_full is None else result.against_full.tasks
    rows = (result.full, result.best)
    for task in result.tasks:
        cells = [task_score(row, "test", task, task.metric, num_tasks=len(result.tasks)) for row in rows]
        table.add_row(
            Text(task.name),
            str(task.examples["test"]),
            *([_number(task.chance)] * has_chance),
            *("failed" if cell is None else _number(cell[0]) for cell in cells),
            interval_label(found[task.name].difference) if task.name in found else "",
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
