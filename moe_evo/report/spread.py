"""Runs that differ only in their seed as one line: mean over seeds, and the spread among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_evo.report.lines import Line, kept_label
from moe_evo.report.screen import screen
from moe_evo.report.table import plain_table, print_fitting

_SEEDED = ("best", "best_pruning", "random_search", "soup", "recovered")
"""Keys of contenders that a search found; the others are the same whatever the seed."""


@dataclass(frozen=True)
class Spread:
    """A contender of several runs that differ in their seed alone.

    mean: of the test scores; deviation: their sample standard deviation; lowest, highest: of them.
    """

    tasks: str
    model: str
    algorithm: str
    key: str
    title: str
    kept: str
    seeds: int
    mean: float
    deviation: float
    lowest: float
    highest: float


def spreads(lines: Sequence[Line]) -> list[Spread]:
    """The contenders that two seeds or more have a test score of, in the order of their first lines."""
    groups: dict[tuple[str, ...], dict[int, Line]] = {}
    for line in lines:
        if line.key in _SEEDED and line.test is not None:
            key = (line.tasks, line.model, line.algorithm, line.key, kept_label(line))
            groups.setdefault(key, {}).setdefault(line.seed, line)
    return [_spread(list(found.values())) for found in groups.values() if len(found) > 1]


def _spread(lines: Sequence[Line]) -> Spread:
    first, tests = lines[0], np.array([line.test for line in lines], dtype=np.float64)
    return Spread(
        tasks=first.tasks,
        model=first.model,
        algorithm=first.algorithm,
        key=first.key,
        title=without_count(first.title),
        kept=kept_label(first),
        seeds=len(lines),
        mean=float(tests.mean()),
        deviation=float(tests.std(ddof=1)),
        lowest=float(tests.min()),
        highest=float(tests.max()),
    )


def without_count(title: str) -> str:
    """A contender's title without the number of its evaluations or of a soup's individuals, in which seeds differ."""
    return "soup" if title.startswith("soup of ") else title.split(", best of")[0]


def print_spreads(found: Sequence[Spread], console: Console | None = None) -> None:
    """Print a table for each set of tasks; nothing where no two runs differ in their seed alone."""
    console = console or screen()
    for tasks in dict.fromkeys(one.tasks for one in found):
        console.print()
        print_fitting(console, _table(tasks, [one for one in found if one.tasks == tasks]))


def _table(tasks: str, found: Sequence[Spread]) -> Table:
    table = plain_table(Text(f"test score over seeds; {tasks}"))
    table.add_column("", overflow="fold")
    table.add_column("algorithm", overflow="fold")
    for heading in ("experts", "seeds", "mean", "deviation", "lowest", "highest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        numbers = (f"{value:.3f}" for value in (one.mean, one.deviation, one.lowest, one.highest))
        table.add_row(Text(one.title), one.algorithm, one.kept, str(one.seeds), *numbers)
    return table
