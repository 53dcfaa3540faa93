"""Small pieces of HTML for notebooks: tables, a map of kept experts, a learning curve. They need no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from moe_evo.genomes.genome import Genome
from moe_evo.records.result import RunResult, Score
from moe_evo.records.sweep import SweepResult
from moe_evo.report.lines import Line
from moe_evo.report.pairing import Pairing
from moe_evo.report.spread import Spread
from moe_evo.report.table import expert_weights, experts_label
from moe_evo.report.verdict import remarks
from moe_evo.shown import in_html

_BLUE = (0, 114, 178)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[int] = ()) -> str:
    """An HTML table; the text of cells is escaped. bold: numbers of rows to show in bold."""
    head = "".join(f"<th>{in_html(one)}</th>" for one in headings)
    lines = []
    for number, row in enumerate(rows):
        style = ' style="font-weight: bold"' if number in bold else ""
        lines.append(f"<tr{style}>" + "".join(f"<td>{in_html(cell)}</td>" for cell in row) + "</tr>")
    caption = f'<caption style="text-align: left">{in_html(title)}</caption>'
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def scores_table(title: str, scores: Mapping[str, Score]) -> str:
    """A table of scores with their 95 % intervals; scores: by the name of the model that was scored."""
    rows = [[name, str(score), str(score.num_examples)] for name, score in scores.items()]
    return table(title, ["", "score [95 % interval]", "examples"], rows)


def result_table(result: RunResult) -> str:
    """The final table of a run, and what it means in words."""
    headings = ["", "experts", "evaluations", "search", "validation", "test [95 % interval]"]
    rows = []
    for row in result.lines:
        short = ["failed" if score is None else f"{score.fitness:.3f}" for score in (row.search, row.validation)]
        test = "failed" if row.test is None else str(row.test)
        rows.append([row.title, experts_label(row.num_kept), str(row.evaluations or ""), *short, test])
    bold = [number for number, row in enumerate(result.lines) if row.key == "best"]
    title = "; ".join(
        filter(None, [f"{result.fitness} over {result.tasks_label}", "higher is better", result.search_note])
    )
    told = "".join(f"<p>{in_html(f'{name}: {sentence}')}</p>" for name, sentence in remarks(result))
    return table(title, headings, rows, bold) + told


def lines_table(lines: Sequence[Line]) -> str:
    """The final tables of several runs as one; winners are bold."""
    rows = []
    for line in lines:
        scores = ["" if value is None else f"{value:.3f}" for value in (line.search, line.validation)]
        interval = line.interval("test")
        test = "" if interval is None else "{:.3f} [{:.3f}, {:.3f}]".format(*interval)
        kept = "" if line.num_kept is None else f"{line.num_kept:.4g}"
        rows.append([line.tasks, line.run, line.title, kept, *scores, test, str(line.seed)])
    headings = ["tasks", "run", "", "experts", "search", "validation", "test [95 % interval]", "seed"]
    return table("higher is better", headings, rows, [n for n, line in enumerate(lines) if line.key == "best"])


def pairings_table(paired: Sequence[Pairing]) -> str:
    """Each run's winner against that of the first run on the same test examples, or why they cannot be paired."""
    rows = []
    for one in paired:
        told = one.reason or f"{one.difference:+.3f} [{one.difference_low:+.3f}, {one.difference_high:+.3f}]"
        counts = ["" if count is None else f"{count:.3g}" for count in (one.won, one.lost, one.p_value)]
        rows.append([one.run, told, *counts, one.verdict or ""])
    headings = ["run", "difference [95 % interval]", "won", "lost", "McNemar p", "verdict"]
    return table(f"test score of the winner minus that of {paired[0].against}", headings, rows)


def spread_table(found: Sequence[Spread]) -> str:
    """Mean and spread of the test score over seeds."""
    headings = ["tasks", "", "algorithm", "experts", "seeds", "mean", "deviation", "lowest", "highest"]
    rows = [
        [one.tasks, one.title, one.algorithm, one.kept, str(one.seeds),
         *(f"{value:.3f}" for value in (one.mean, one.deviation, one.lowest, one.highest))]
        for one in found
    ]  # fmt: skip
    return table("test score over seeds", headings, rows)


def sweep_table(result: SweepResult) -> str:
    """One line for each contender of each run; those on the Pareto front of size and score are bold."""
    headings = ["run", "", "tasks", "experts", "parameters", "test [95 % interval]", "front"]
    rows = []
    for line in result.lines:
        test = str(line.scores["test"]) if "test" in line.scores else "failed"
        kept, front = experts_label(line.num_kept), "*" if line.front else ""
        rows.append([line.run, line.title, ", ".join(line.tasks), kept, f"{line.parameters:,}", test, front])
    title = f"not finished: {', '.join(result.unfinished)}" if result.unfinished else f"{len(result.runs)} runs"
    return table(title, headings, rows, [number for number, line in enumerate(result.lines) if line.front])


def kept_map(genome: Genome, *, cell: int = 14) -> str:
    """An SVG with a row for each MoE layer and a square for each expert: dark is kept, pale is merged in part."""
    weights = expert_weights(genome)
    layers, experts = weights.shape
    left = 56
    squares = [
        f'<rect x="{left + cell * expert}" y="{cell * layer}" width="{cell - 1}" height="{cell - 1}" '
        f'fill="{_shade(float(weights[layer, expert]))}"><title>layer {layer}, expert {expert}: '
        f"weight {weights[layer, expert]:.2f}</title></rect>"
        for layer in range(layers)
        for expert in range(experts)
        if np.isfinite(weights[layer, expert])
    ]
    names = [
        f'<text x="{left - 6}" y="{cell * layer + cell - 4}" text-anchor="end">layer {layer}</text>'
        for layer in range(layers)
    ]
    return _svg(left + cell * experts, cell * layers, "kept experts of each MoE layer", [*names, *squares])


def learning_curve(
    fitness: Sequence[float | None], full: float | None, label: str = "fitness", *, width: int = 420, height: int = 160
) -> str:
    """An SVG with a dot for each evaluation in the order in which they finished, and a line for the best so far.

    fitness: None for an evaluation that failed. full: fitness of the full model, drawn as a dashed line. label: see
    `fitness_label`.
    """
    known = [one for one in [*fitness, full] if one is not None]
    if not known or all(one is None for one in fitness):
        return ""
    low, high = min(known), max(known)
    spread = (high - low) or 1.0
    left, bottom = 48, 20

    def x(place: int) -> float:
        return left + (width - left - 8) * place / max(len(fitness) - 1, 1)

    def y(value: float) -> float:
        return 8 + (height - bottom - 16) * (high - value) / spread

    dots = [
        f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="2" fill="rgb{_BLUE}" fill-opacity="0.5"/>'
        for place, value in enumerate(fitness)
        if value is not None
    ]
    best = list(accumulate((-np.inf if one is None else one for one in fitness), max))
    line = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in enumerate(best) if np.isfinite(value))
    parts = [*dots, f'<polyline points="{line}" fill="none" stroke="black"/>']
    if full is not None:
        dashes = f'y1="{y(full):.1f}" y2="{y(full):.1f}" stroke="#009E73" stroke-dasharray="4"'
        parts.append(f'<line x1="{left}" x2="{width - 8}" {dashes}><title>full model {full:.3f}</title></line>')
    for value in sorted({low, high}):
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3f}</text>')
    parts.append(f'<text x="{left}" y="{height - 4}">{in_html(label)}</text>')
    parts.append(f'<text x="{width - 8}" y="{height - 4}" text-anchor="end">{len(fitness)} evaluations</text>')
    return _svg(width, height, f"{label} on the search split, and the best so far", parts)


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img" '
        f'font-family="sans-serif" font-size="10"><title>{in_html(title)}</title>{"".join(parts)}</svg>'
    )


def _shade(weight: float) -> str:
    """A colour from white to blue, by the square root of a weight from 0 to 1, so that small weights are visible."""
    share = weight**0.5
    return "rgb({},{},{})".format(*(round(255 + share * (one - 255)) for one in _BLUE)) if weight > 0 else "#eeeeee"
