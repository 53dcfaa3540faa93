"""Pictures of a run as PNG: fitness against evaluations, and the experts that the winner keeps.

pyplot is not used, because its figures and backend are shared by the whole process, such as a notebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_evo.files.write import whole_file
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, Individual
from moe_evo.report.table import expert_weights

if TYPE_CHECKING:
    from moe_evo.report.answers import Stage

_COLOURS = {
    "pruning": "#0072B2",
    "merging": "#D55E00",
    "random": "#999999",
    "stopped early": "#CCCCCC",
}  # Okabe-Ito, safe for colour blindness


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture as PNG, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def search_figure(
    path: Path,
    individuals: Sequence[Individual],
    random: Sequence[Individual],
    full_fitness: float,
    winner: Genome,
    label: str = "fitness",
) -> None:
    """Left: fitness of each individual and the best so far; right: the winner's experts, layer by layer.

    label: see `fitness_label`.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    curve, experts = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_curve(curve, individuals, random, full_fitness, label)
    draw_experts(figure, experts, winner)
    experts.set_title("experts of the winner")
    save_figure(figure, path)


def draw_curve(
    axes: Axes, individuals: Sequence[Individual], random: Sequence[Individual], full_fitness: float, label: str
) -> None:
    kinds: dict[str, list[tuple[int, float]]] = {}
    for one in individuals:
        if isinstance(one.outcome, Evaluation):
            kind = "pruning" if one.genome.is_pruning else "merging"
            point = (one.number + 1, one.outcome.fitness)
            kinds.setdefault("stopped early" if one.outcome.is_stopped else kind, []).append(point)
    for kind, points in kinds.items():
        numbers, fitness = zip(*points, strict=True)
        axes.scatter(numbers, fitness, s=9, alpha=0.5, color=_COLOURS[kind], label=kind)
    _draw_best_so_far(axes, random, _COLOURS["random"], "random search, best so far")
    _draw_best_so_far(axes, individuals, "black", "best so far")
    axes.axhline(full_fitness, color="#009E73", linestyle="--", label="full model")
    axes.set_xlabel("evaluations")
    axes.set_ylabel(f"{label}, search split")
    axes.set_title("search")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, loc="lower right", framealpha=0.95)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_best_so_far(axes: Axes, individuals: Sequence[Individual], colour: str, label: str) -> None:
    outcomes = [one.outcome for one in individuals if isinstance(one.outcome, Evaluation)]
    points = [-np.inf if one.is_stopped else one.fitness for one in outcomes]
    if points:
        best = np.maximum.accumulate(points)
        axes.step(np.arange(1, len(best) + 1), best, where="post", color=colour, label=label)


def losses_figure(path: Path, stages: Sequence[Stage]) -> None:
    """Write a picture of the losses of a recovery: those of each method in a part of their own."""
    figure = Figure(figsize=(1 + 4 * len(stages), 4), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        checks, best = stage.learned.checks, stage.learned.best
        trained = [(check.step, check.training) for check in checks if check.training is not None]
        if trained:
            axes.plot(*zip(*trained, strict=True), color=_COLOURS["random"], label="what is learned")
        losses = [check.validation for check in checks]
        axes.plot([check.step for check in checks], losses, color="black", marker=".", label="validation split")
        axes.scatter([best.step], [best.validation], color=_COLOURS["merging"], zorder=3, label="kept")
        axes.set_xlabel(f"{stage.unit}s")
        axes.set_ylabel("loss, nats")
        axes.set_yscale("log")
        axes.set_title(stage.method)
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def draw_experts(figure: Figure, axes: Axes, genome: Genome) -> None:
    """Heat map (layers, experts) of each expert's largest weight in a slot of its layer."""
    weights = expert_weights(genome)
    # coloured by the square root of the weight, so that small weights are visible
    image = axes.imshow(weights, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="weight in what is kept", ticks=[0, 0.1, 0.25, 0.5, 1])
    rows, columns = weights.shape
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#DDDDDD", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("expert (dark: kept, pale: merged in part)")
    axes.set_ylabel("MoE layer")
    axes.set_xticks(_few_ticks(weights.shape[1]))
    axes.set_yticks(_few_ticks(weights.shape[0]))


def _few_ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, count // 8)))


def kept_figure(path: Path, genome: Genome) -> None:
    """Write a picture of only the experts that a genome keeps."""
    layers, experts = expert_weights(genome).shape
    size = (min(3 + experts * 0.25, 16), min(2 + layers * 0.25, 12))
    figure = Figure(figsize=size, layout="constrained")
    draw_experts(figure, figure.subplots(), genome)
    save_figure(figure, path)
