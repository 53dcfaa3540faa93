"""Pictures of a genome for W&B; drawn without pyplot, which is not safe to use in several threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_evo.genomes.genome import Genome, Matrix

_MOST_INCHES = 14.0


def genome_pictures(genome: Genome) -> dict[str, npt.NDArray[np.uint8]]:
    """RGB pictures (height, width, 3) by name: the kept experts, and both matrices with layers below each other."""
    ends = np.cumsum([layer.num_kept for layer in genome.layers])
    shares = [np.abs(layer.expert_merging).max(axis=0, keepdims=True).clip(max=1) for layer in genome.layers]
    return {
        "kept_experts": _heatmap(_stacked(shares), "MoE layer", cmap="Blues", vmin=0, vmax=1),
        "expert_merging": _signed([layer.expert_merging for layer in genome.layers], ends),
        "router_mapping": _signed([layer.router_mapping for layer in genome.layers], ends),
    }


def _stacked(matrices: list[Matrix]) -> Matrix:
    """Matrices (K, E) of all layers, one below the other; layers with fewer experts end in NaN."""
    widest = max(matrix.shape[1] for matrix in matrices)
    return np.concatenate(
        [np.pad(matrix, ((0, 0), (0, widest - matrix.shape[1])), constant_values=np.nan) for matrix in matrices]
    )


def _signed(matrices: list[Matrix], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    values = _stacked(matrices)
    limit = max(float(np.nanmax(np.abs(values))), 1e-6)
    return _heatmap(values, "kept slot, layer below layer", ends=ends, cmap="RdBu", vmin=-limit, vmax=limit)


def _heatmap(
    values: npt.NDArray[Any], label: str, *, ends: npt.NDArray[np.int64] | None = None, **options: Any
) -> npt.NDArray[np.uint8]:
    rows, columns = values.shape
    size = (min(3 + columns * 0.2, _MOST_INCHES), min(1.5 + rows * 0.2, _MOST_INCHES))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    figure.colorbar(image, ax=axes)
    for end in [] if ends is None else ends[:-1]:
        axes.axhline(end - 0.5, color="black", linewidth=0.8)
    axes.set_xlabel("expert")
    axes.set_ylabel(label)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
