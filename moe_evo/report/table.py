"""The final table of a run and its kept experts, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from moe_evo.genomes.genome import Genome
from moe_evo.records.result import RunResult

_SHADES = " ░▒▓█"
_NARROWEST = 8  # of a column that folds


def plain_table(title: str | Text | None = None) -> Table:
    """An empty table without a frame, the style of all tables here."""
    return Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )


def print_whole(console: Console, table: Table) -> None:
    """Print a table at its full width, so that a narrower terminal wraps lines and does not cut numbers."""
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    width, console.width = console.width, max(console.width, needed)
    console.print(table)
    console.width = width


def print_fitting(console: Console, table: Table) -> None:
    """Print a table within the width of the console: columns that may fold do, and those that may not are never cut."""
    folding = [column for column in table.columns if not column.no_wrap]
    for column in folding:
        column.max_width = _NARROWEST
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    for column in folding:
        column.max_width = None
    width, console.width = console.width, max(console.width, needed)
    console.print(table)
    console.width = width


def final_table(result: RunResult) -> Table:
    """One line a contender: experts kept, evaluations spent (evals), and its scores, test with a 95 % interval.

    With dynamic routing also the mean number of experts that a token ran on the test split (active). Its caption says
    what the search maximised, where the columns show something else.
    """
    table = plain_table(f"{result.fitness} over {result.tasks_label}; higher is better")
    table.caption, table.caption_justify = result.search_note, "left"
    table.add_column("", no_wrap=True)
    active = [None if row.test is None else row.test.active_experts for row in result.lines]
    shows_active = any(one is not None for one in active)
    for heading in ("experts", *["active"] * shows_active, "evals", "search", "validation", "test [95 % interval]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, one in zip(result.lines, active, strict=True):
        table.add_row(
            row.title,
            experts_label(row.num_kept),
            *(["" if one is None else f"{one:.2f}"] * shows_active),
            str(row.evaluations or ""),
            *("failed" if score is None else f"{score.fitness:.3f}" for score in (row.search, row.validation)),
            "failed" if row.test is None else str(row.test),
            style="bold" if row.key == "best" else "",
        )
    return table


def experts_label(num_kept: Sequence[int]) -> str:
    """Number of experts kept: `4` where all layers keep as many, else the mean and the range."""
    if len(set(num_kept)) == 1:
        return str(num_kept[0])
    return f"{np.mean(num_kept):.1f} ({min(num_kept)}-{max(num_kept)})"


def loader_label(loader: str) -> str:
    """What loads a checkpoint. loader: 'transformers', or 'moe_evo' where layers differ in experts or in top_k."""
    if loader == "transformers":
        return "loads with transformers"
    return (
        "loads with moe_evo.load_pruned; transformers and vLLM hold one number of experts and one top_k for all layers"
    )


def expert_weights(genome: Genome) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(layers, E) weight of each expert in its layer: maximum over slots of |W_EM|, at most 1.

    Layers with fewer experts than the largest end in NaN.
    """
    weights = np.full((len(genome.layers), max(layer.num_experts for layer in genome.layers)), np.nan)
    for index, layer in enumerate(genome.layers):
        weights[index, : layer.num_experts] = np.abs(layer.expert_merging).max(axis=0).clip(max=1)
    return weights


def kept_picture(genome: Genome, decoder_layers: Sequence[int]) -> RenderableType:
    """One line a MoE layer, one cell an expert: full block = weight 1, lighter = less, - = no such expert."""
    picture = Text()
    weights = expert_weights(genome)
    picture.append("layer   experts 0 to " + f"{weights.shape[1] - 1}\n", style="dim")
    for layer, decoder_layer, row in zip(genome.layers, decoder_layers, weights, strict=True):
        cells = "".join(2 * _shade(float(weight)) for weight in row)
        picture.append(f"{decoder_layer:>5}   │{cells}│ keeps {layer.num_kept} of {layer.num_experts}")
        picture.append(f", top-{layer.top_k}\n")
    picture.append("█ ▓ ▒ ░ weight in what is kept, 1 to nearly 0   blank: dropped", style="dim")
    return picture


def _shade(weight: float) -> str:
    """One of four block characters, one for each quarter of weight; a small weight above 0 is visible, too."""
    if not np.isfinite(weight):
        return "-"
    return _SHADES[max(round(weight * 4), int(weight > 0))]
