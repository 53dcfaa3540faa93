"""The front of a run with several objectives: a table for terminals and pages, and a picture of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from moe_evo.records.result import FrontPoint, RunResult
from moe_evo.report.plan import count_label
from moe_evo.report.table import experts_label, loader_label, plain_table
from moe_evo.shown import in_html

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 560, 260, 64, 40, 12
_BLUE, _GREY, _GREEN = "#0072B2", "#999999", "#009E73"


@dataclass(frozen=True)
class FrontTable:
    """Headings and cells of the front's table, and what an export of its points needs to be loaded."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def front_cells(result: RunResult) -> FrontTable:
    """One line a point: experts, top_k, scores, each task's test score where tasks are objectives, size and loader."""
    tasks = [name for name in names_of(result) if name.startswith("quality ")]
    headings = ["", "experts", "top_k", "expected", "search", "validation", "test [95 % interval]"]
    headings += [f"test {name.removeprefix('quality ')}" for name in tasks] + ["parameters", "loads with"]
    rows = []
    for point in result.front:
        row, on_test = point.row, point.values.get("test", {})
        scores = [f"{_expected(point):.3f}"]
        scores += ["failed" if one is None else f"{one.fitness:.3f}" for one in (row.search, row.validation)]
        scores.append("failed" if row.test is None else str(row.test))
        scores += [f"{on_test[name]:.3f}" if name in on_test else "failed" for name in tasks]
        size = "" if row.parameters is None else count_label(row.parameters)
        rows.append([row.key, experts_label(row.num_kept), experts_label(row.top_k), *scores, size, row.loader])
    loaders = {point.row.loader for point in result.front}
    return FrontTable(headings, rows, loader_label("moe_evo") if "moe_evo" in loaders else "")


def front_table(result: RunResult) -> Table:
    """The front for a terminal."""
    cells = front_cells(result)
    names = names_of(result)
    table = plain_table(f"front of {_list_of(names)} as expected on the search split, best {names[0]} first")
    for number, heading in enumerate(cells.headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in cells.rows:
        table.add_row(*row)
    table.caption, table.caption_justify = cells.note and f"moe_evo: {cells.note}", "left"
    return table


def export_line(folder: Path, result: RunResult) -> str:
    """The command that exports a point of the front."""
    key = result.front[0].row.key
    quoted = shlex.quote(str(folder))
    return f"moe-evo export {quoted} --which {key} --to {shlex.quote(str(folder / key))}"


def _expected(point: FrontPoint) -> float:
    """The mean over tasks of what the search expected."""
    found = [value for name, value in point.values["expected"].items() if name.startswith("quality")]
    return sum(found) / len(found)


def names_of(result: RunResult) -> list[str]:
    """The names of the objectives."""
    return list(dict.fromkeys(name for point in result.front for one in point.values.values() for name in one))


def front_picture(result: RunResult) -> str:
    """An SVG of the first two objectives: quality against size or active experts, or one task against another.

    Full dots are test scores, empty ones what the search expected. A dashed line is the full model's test score.
    """
    names = names_of(result)
    if len(names) < 2:
        return ""
    (across, upward) = (names[0], names[1]) if names[1].startswith("quality") else (names[1], names[0])
    dots = [
        (point.row.key, split, values[across], values[upward])
        for split in ("expected", "test")
        for point in result.front
        if across in (values := point.values.get(split, {}))
    ]
    full = result.row("full")
    level = full.test.fitness if full is not None and full.test is not None and upward == "quality" else None
    return _drawn(dots, across, upward, level)


def _drawn(dots: Sequence[tuple[str, str, float, float]], across: str, upward: str, level: float | None) -> str:
    """The SVG of dots (key, split, x, y). level: of the dashed line."""
    xs = [x for _, _, x, _ in dots]
    ys = [y for *_, y in dots] + ([] if level is None else [level])
    (left, right), (low, high) = _range(xs), _range(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_WIDTH - _LEFT - 24) * (x - left) / (right - left),
            _TOP + (_HEIGHT - _BOTTOM - _TOP) * (high - y) / (high - low),
        )

    parts = [f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - 8}" fill="none" stroke="{_GREY}"/>']
    if level is not None:
        y = place(left, level)[1]
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - 8}" stroke="{_GREEN}" stroke-dasharray="4">'
            f"<title>full model, test {level:.3f}</title></path>"
        )
    for key, split, x, y in dots:
        cx, cy = place(x, y)
        fill = _BLUE if split == "test" else "none"
        told = in_html(f"{key}, {split}: {across} {x:.3g}, {upward} {y:.3f}")
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{fill}" stroke="{_BLUE}"><title>{told}</title></circle>'
        )
        if split == "test":
            number = in_html(key.removeprefix("front-"))
            parts.append(f'<text x="{cx + 6:.1f}" y="{cy - 6:.1f}">{number}</text>')
    for value in sorted({min(ys), max(ys)}):
        parts.append(f'<text x="{_LEFT - 6}" y="{place(left, value)[1] + 4:.1f}" text-anchor="end">{value:.3f}</text>')
    for value in sorted({min(xs), max(xs)}):
        x = place(value, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:.3g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{in_html(_axis(across))}</text>')
    turned = f"translate(14 {_HEIGHT / 2}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{in_html(_axis(upward))}</text>')
    title = in_html(f"{upward} against {across}, each point of the front")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" font-family="sans-serif" font-size="11" fill="currentColor"><title>{title}</title>'
        f"{''.join(parts)}</svg>"
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From below the lowest to above the highest value."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _axis(name: str) -> str:
    return {"experts": "experts kept a layer", "top_k": "experts active a token (top_k)"}.get(name, name)


def _list_of(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)
