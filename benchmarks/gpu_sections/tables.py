"""The figures of the GPU benchmark as tables that a README can hold, and the few that go into one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

MAIN = {
    "ceilings": ("tflops", "gb_per_s", "operator_us", "up_tflops"),
    "correctness": ("relative",),
    "scoring": ("tokens_per_s", "launches_a_layer"),
    "attention": ("first_ms",),
    "decode": ("tokens_per_s",),
    "merging": ("ms",),
    "out_of_memory": ("batch_tokens",),
    "baselines": ("evaluations_per_s",),
    "recovery": ("tokens_per_s", "s_a_layer", "s"),
}
"""The figure of a point that goes into the line: the first one that the point has."""

_DIGITS = 3


def print_tables(results: Mapping[str, Any]) -> None:
    """The machine, then a table a section; whatever failed or was left out stands below its table."""
    console = Console(width=180, highlight=False, soft_wrap=False)
    console.print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    for name, section in results["sections"].items():
        console.print()
        seconds = section["seconds"]
        shown = "not finished" if seconds is None else f"{seconds:.0f} s of {section['budget_s']:.0f} s"
        console.print(f"{name} ({shown})", style="bold")
        if section.get("figures"):
            console.print(_table(section["figures"]))
        for point, error in section.get("failed", {}).items():
            console.print(f"failed: {point}: {error['type']}: {error['message'][:160]}", markup=False)
        for reason, points in _by_reason(section.get("skipped", {})).items():
            console.print(f"left out, as {reason}: {'; '.join(points)}"[:400], markup=False)


def _table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a point, a column for every number or word that any point has."""
    columns = dict.fromkeys(name for point in figures.values() for name, value in point.items() if _is_plain(value))
    table = Table(box=MARKDOWN)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for point, found in figures.items():
        table.add_row(point, *(shown(found.get(column)) for column in columns))
    return table


def headline(results: Mapping[str, Any]) -> dict[str, Any]:
    """The main figure of every point, and what failed."""
    line: dict[str, Any] = {}
    for name, section in results["sections"].items():
        main = {
            point: next((found[key] for key in MAIN[name] if key in found), None)
            for point, found in section.get("figures", {}).items()
        }
        line[name] = {point: value for point, value in main.items() if value is not None}
        if section.get("failed"):
            line[name]["failed"] = list(section["failed"])
    return line


def rounded(value: Any) -> Any:
    """Plain data with four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value


def shown(value: Any) -> str:
    """A cell."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.{_DIGITS}g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for point, reason in skipped.items():
        reasons.setdefault(reason, []).append(point)
    return reasons
