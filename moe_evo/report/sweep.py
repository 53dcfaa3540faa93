"""What came of a sweep: one line a run and contender, the Pareto front over quality and size, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import moocore
import numpy as np
from rich.console import Console

from moe_evo.report.table import experts_label, plain_table
from moe_evo.report.terminal import print_whole

_COLOURS = {"best": "#1f6f8b", "best_pruning": "#58a4b0", "random_search": "#d98e04", "frequency": "#a23e48"}


def sweep_result(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Results of finished runs by name as one table, plain data.

    `front` of a line: no other line has both fewer parameters and a better test score, or one of them as
    good and the other better. Lines of different tasks are not compared.
    """
    lines = []
    for name, result in results.items():
        for row in result["rows"]:
            test = row["scores"].get("test")
            lines.append(
                {
                    "run": name,
                    "tasks": [task["name"] for task in result["tasks"]],
                    "algorithm": result["search"]["algorithm"],
                    "seed": result["search"]["seed"],
                    "key": row["key"],
                    "title": row["title"],
                    "num_kept": row["num_kept"],
                    "parameters": row["parameters"],
                    "bytes": row["bytes"],
                    "digest": row["digest"],
                    "scores": row["scores"],
                    "test": None if test is None else test["fitness"],
                    "front": False,
                }
            )
    for tasks in {tuple(line["tasks"]) for line in lines}:
        _mark_front([line for line in lines if tuple(line["tasks"]) == tasks and line["test"] is not None])
    return {"runs": sorted(results), "lines": lines}


def _mark_front(lines: Sequence[dict[str, Any]]) -> None:
    if lines:
        points = np.array([[-line["test"], line["parameters"]] for line in lines], dtype=np.float64)
        for line, is_on_front in zip(lines, moocore.is_nondominated(points, keep_weakly=True), strict=True):
            line["front"] = bool(is_on_front)


def _groups(result: Mapping[str, Any]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Lines that differ in their seed alone, from most parameters to fewest."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in sorted(result["lines"], key=lambda line: (line["tasks"], -line["parameters"])):
        if line["test"] is None:
            continue
        seeded = line["algorithm"] if line["key"] in ("best", "best_pruning", "random_search", "soup") else ""
        key = (tuple(line["tasks"]), line["key"], seeded, tuple(line["num_kept"]))
        groups.setdefault(key, []).append(line)
    return groups


def print_sweep(result: Mapping[str, Any], console: Console | None = None) -> None:
    """One line for each contender and number of experts: mean over seeds with its spread, and the interval."""
    console = console or Console()
    table = plain_table()
    table.add_column("", no_wrap=True)
    table.add_column("tasks", no_wrap=True)
    for heading in ("experts", "parameters", "MiB", "seeds", "test, mean [95 % of one seed]", "seeds' spread", "front"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (tasks, *_), lines in _groups(result).items():
        tests = np.array([line["test"] for line in lines])
        low = np.mean([line["scores"]["test"]["low"] for line in lines])
        high = np.mean([line["scores"]["test"]["high"] for line in lines])
        table.add_row(
            _title(lines[0]),
            _tasks_label(tasks),
            experts_label(lines[0]["num_kept"]),
            f"{lines[0]['parameters']:,}",
            f"{lines[0]['bytes'] / 2**20:.1f}",
            str(len({line["seed"] for line in lines})),
            f"{tests.mean():.3f} [{low:.3f}, {high:.3f}]",
            f"±{tests.std(ddof=1):.3f}" if len(tests) > 1 and np.ptp(tests) > 1e-9 else "",
            "*" if any(line["front"] for line in lines) else "",
        )
    print_whole(console, table)


def _title(line: Mapping[str, Any]) -> str:
    """The contender without the number of its evaluations or of a soup's individuals, as seeds may differ in it."""
    return "soup" if line["key"] == "soup" else str(line["title"]).split(", best of")[0]


def _tasks_label(tasks: Sequence[str]) -> str:
    return ", ".join(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"


def sweep_figure(path: Path, result: Mapping[str, Any]) -> None:
    """Test score against experts kept, one panel for each set of tasks; the full model is a line."""
    groups = _groups(result)
    panels = list(dict.fromkeys(key[0] for key in groups))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.5 + 4.5 * columns, 0.8 + 3.4 * rows), squeeze=False)
    for panel, axis in zip(panels, axes.flat, strict=False):
        _draw_panel(axis, {key[1:]: lines for key, lines in groups.items() if key[0] == panel})
        axis.set_title(_tasks_label(panel), fontsize=10)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_panel(axis: Any, groups: Mapping[tuple[Any, ...], list[dict[str, Any]]]) -> None:
    series: dict[tuple[str, str], list[list[dict[str, Any]]]] = {}
    for (key, algorithm, _), lines in groups.items():
        series.setdefault((key, algorithm), []).append(lines)
    names = {key for key, _ in series}
    for (key, algorithm), points in series.items():
        label = _title(points[-1][0])
        if key == "full":
            axis.axhline(points[0][0]["test"], color="0.35", linewidth=1, linestyle="--", label=label)
            continue
        kept = [np.mean(lines[0]["num_kept"]) for lines in points]
        means = [np.mean([line["test"] for line in lines]) for lines in points]
        below = [np.mean([line["test"] - line["scores"]["test"]["low"] for line in lines]) for lines in points]
        above = [np.mean([line["scores"]["test"]["high"] - line["test"] for line in lines]) for lines in points]
        several = len({name for other, name in series if other == key}) > 1
        axis.errorbar(
            kept, means, yerr=[below, above], marker="o", markersize=4, capsize=2, linewidth=1,
            color=None if several else _COLOURS.get(key), label=f"{label} ({algorithm})" if several else label,
            zorder=3 if key == "best" or "best" not in names else 2,
        )  # fmt: skip
        for x, lines in zip(kept, points, strict=True):
            if len(lines) > 1:
                axis.scatter([x] * len(lines), [line["test"] for line in lines], s=6, color="0.6", zorder=1)
    axis.set_xlabel("experts kept")
    axis.set_ylabel("test score")
    axis.grid(alpha=0.25)
