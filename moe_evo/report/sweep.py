"""The result of a sweep: a line for each contender of each run, the Pareto front of score and size, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import moocore
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_evo.records.result import Row, RunResult, Score
from moe_evo.records.sweep import SweepLine, SweepResult
from moe_evo.report.figure import save_figure
from moe_evo.report.plan import count_label
from moe_evo.report.screen import screen
from moe_evo.report.spread import without_count
from moe_evo.report.table import experts_label, plain_table, print_fitting

_COLOURS = {"best": "#1f6f8b", "best_pruning": "#58a4b0", "random_search": "#d98e04", "frequency": "#a23e48"}


_Groups = dict[tuple[tuple[str, ...], str, str, int], list[SweepLine]]
"""Lines that differ only in their seed, by tasks, key, algorithm and experts kept in all."""


def sweep_result(results: Mapping[str, RunResult], unfinished: Sequence[str] = ()) -> SweepResult:
    """The results of finished runs, given by name, as one table. unfinished: names of the other runs."""
    lines = [_line(name, result, row) for name, result in results.items() for row in result.rows]
    on_front = {
        id(line)
        for tasks in {line.tasks for line in lines}
        for line in _front([line for line in lines if line.tasks == tasks and line.test is not None])
    }
    marked = (replace(line, front=id(line) in on_front) for line in lines)
    return SweepResult(tuple(sorted(results)), tuple(marked), tuple(unfinished))


def _line(run: str, result: RunResult, row: Row) -> SweepLine:
    assert row.parameters is not None and row.bytes is not None, "every run of a sweep writes them down"
    return SweepLine(
        run=run,
        tasks=tuple(task.name for task in result.tasks),
        algorithm=result.search.algorithm,
        seed=result.search.seed,
        key=row.key,
        title=row.title,
        num_kept=row.num_kept,
        parameters=row.parameters,
        bytes=row.bytes,
        digest=row.digest,
        scores=row.scores,
        test=None if row.test is None else row.test.fitness,
    )


def _front(lines: Sequence[SweepLine]) -> list[SweepLine]:
    """The lines on the Pareto front of size and test score; every given line must have a test score."""
    if not lines:
        return []
    points = np.array([[-_test(line).fitness, line.parameters] for line in lines], dtype=np.float64)
    return [one for one, is_on_front in zip(lines, moocore.is_nondominated(points, keep_weakly=True), strict=True)
            if is_on_front]  # fmt: skip


def _test(line: SweepLine) -> Score:
    return line.scores["test"]


def _groups(result: SweepResult) -> _Groups:
    """The lines that have a test score, from most parameters to fewest."""
    groups: _Groups = {}
    for line in sorted(result.lines, key=lambda line: (line.tasks, -line.parameters)):
        if line.test is None:
            continue
        seeded = line.algorithm if line.key in ("best", "best_pruning", "random_search", "soup") else ""
        # layers may share a budget, in every run in another way
        groups.setdefault((line.tasks, line.key, seeded, sum(line.num_kept)), []).append(line)
    return groups


def print_sweep(result: SweepResult, console: Console | None = None) -> None:
    """Print a table for each set of tasks: a line for each contender and number of experts, by mean over seeds."""
    console = console or screen()
    groups = _groups(result)
    for tasks in dict.fromkeys(tasks for tasks, *_ in groups):
        print_fitting(console, _table(tasks, {key: lines for key, lines in groups.items() if key[0] == tasks}))


def _table(tasks: Sequence[str], groups: _Groups) -> Table:
    """The table of the groups of one set of tasks."""
    table = plain_table(Text(f"test score over seeds; {_tasks_label(tasks)}; higher is better"))
    table.caption = "[ ]: 95 % interval of one seed, mean of its bounds. *: best test score for its size"
    table.caption_justify = "left"
    table.add_column("", overflow="fold")
    for heading in ("experts", "parameters", "seeds", "mean [95 % interval]", "spread", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for lines in groups.values():
        tests = np.array([_test(line).fitness for line in lines])
        low = np.mean([_test(line).low for line in lines])
        high = np.mean([_test(line).high for line in lines])
        table.add_row(
            Text(without_count(lines[0].title)),
            experts_label([number for line in lines for number in line.num_kept]),
            count_label(lines[0].parameters),
            str(len({line.seed for line in lines})),
            f"{tests.mean():.3f} [{low:.3f}, {high:.3f}]",
            f"±{tests.std(ddof=1):.3f}" if len(tests) > 1 and np.ptp(tests) > 1e-9 else "",
            "*" if any(line.front for line in lines) else "",
        )
    return table


def _tasks_label(tasks: Sequence[str]) -> str:
    return ", ".join(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"


def sweep_figure(path: Path, result: SweepResult) -> None:
    """Test score against experts kept, one panel for each set of tasks; the full model is a line."""
    groups = _groups(result)
    panels = list(dict.fromkeys(key[0] for key in groups))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 4.5 * columns, 0.8 + 3.4 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, axis in zip(panels, axes.flat, strict=False):
        _draw_panel(axis, {key[1:]: lines for key, lines in groups.items() if key[0] == panel})
        axis.set_title(_tasks_label(panel), fontsize=10)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save_figure(figure, path)


def _draw_panel(axis: Axes, groups: Mapping[tuple[str, str, int], list[SweepLine]]) -> None:
    series: dict[tuple[str, str], list[list[SweepLine]]] = {}
    for (key, algorithm, _), lines in groups.items():
        series.setdefault((key, algorithm), []).append(lines)
    names = {key for key, _ in series}
    for (key, algorithm), points in series.items():
        label = without_count(points[-1][0].title)
        if key == "full":
            axis.axhline(_test(points[0][0]).fitness, color="0.35", linewidth=1, linestyle="--", label=label)
            continue
        kept = [np.mean(lines[0].num_kept) for lines in points]
        tests = [[_test(line) for line in lines] for lines in points]
        means = [np.mean([one.fitness for one in scores]) for scores in tests]
        below = [np.mean([one.fitness - one.low for one in scores]) for scores in tests]
        above = [np.mean([one.high - one.fitness for one in scores]) for scores in tests]
        several = len({name for other, name in series if other == key}) > 1
        axis.errorbar(
            kept, means, yerr=[below, above], marker="o", markersize=4, capsize=2, linewidth=1,
            color=None if several else _COLOURS.get(key), label=f"{label} ({algorithm})" if several else label,
            zorder=3 if key == "best" or "best" not in names else 2,
        )  # fmt: skip
        for x, scores in zip(kept, tests, strict=True):
            if len(scores) > 1:
                axis.scatter([x] * len(scores), [one.fitness for one in scores], s=6, color="0.6", zorder=1)
    axis.set_xlabel("experts kept")
    axis.set_ylabel("test score")
    axis.grid(alpha=0.25)
