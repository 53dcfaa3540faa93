"""What does it cost to merge a layer again in which few rows of W_EM have changed?

    python benchmarks/merged_rows.py [--models embedded mixtral qwen3]

A layer is merged by a random W_EM and kept. Children that differ from it in so many rows are then merged turn
by turn with what is kept and without. Prints a table of the time with it as a ratio to the time without (medians
of pairs) and one JSON line a model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from figures import print_figures
from models import KEPT, loaded, model_path
from rich.console import Console
from rich.table import Table

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.genome import Matrix
from moe_evo.models.layer import MoELayer
from moe_evo.models.merged_cache import MergedCache, MergedTensors, merged_key
from moe_evo.tasks.data import check_tasks


def random_rows(num_rows: int, num_experts: int, rng: np.random.Generator) -> Matrix:
    return rng.normal(size=(num_rows, num_experts)).astype(np.float32)


def timed(layer: MoELayer, matrix: Matrix, kept: MergedCache) -> tuple[float, MergedTensors]:
    """Seconds and the merged tensors; looking up what is kept included."""
    started = time.perf_counter()
    merged = layer.merged_tensors(matrix, kept.known_rows(merged_key(layer.number, matrix)))
    return time.perf_counter() - started, merged


def ratio(layer: MoELayer, num_kept: int, num_changed: int, repeats: int) -> tuple[float, float]:
    """Median seconds with what is kept, and the median of their ratios to those without."""
    rng = np.random.default_rng([0, num_changed])
    parent = random_rows(num_kept, layer.num_experts, rng)
    nothing, kept = MergedCache(0), MergedCache(1)
    kept.get(merged_key(layer.number, parent), layer.merged_bytes(parent), lambda _: layer.merged_tensors(parent))
    spent = []
    for turn in range(repeats):
        child = parent.copy()
        changed = rng.permutation(num_kept)[:num_changed]
        child[changed] = random_rows(num_changed, layer.num_experts, rng)
        ways = (kept, nothing) if turn % 2 else (nothing, kept)
        found = {way: timed(layer, child, way) for way in ways}
        assert all(torch.equal(found[kept][1][name], whole) for name, whole in found[nothing][1].items())
        spent.append((found[kept][0], found[nothing][0]))
    return float(np.median([one for one, _ in spent])), float(np.median([one / other for one, other in spent]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(KEPT), choices=list(KEPT))
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args(argv)
    tasks = check_tasks([TaskConfig(data="syll", num_search=8)])
    table = Table("model", "rows", "changed", "ms a layer", "ratio", title="merging a layer whose other rows are kept")
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            layer = loaded(model_path(name, Path(folder)), tasks, EvaluationConfig()).model.layers[0]
            num_kept, figures[name] = KEPT[name], {}
            for changed in (0, 1, num_kept // 4, num_kept // 2, num_kept - 1, num_kept):
                if str(changed) in figures[name]:
                    continue
                seconds, of_whole = ratio(layer, num_kept, changed, options.repeats)
                table.add_row(name, str(num_kept), str(changed), f"{seconds * 1e3:.2f}", f"{of_whole:.2f}")
                figures[name][str(changed)] = of_whole
    Console().print(table)
    for name, of_whole_by_changed in figures.items():
        print_figures("merged_rows", {"model": name, "ratio": of_whole_by_changed})
    return 0


if __name__ == "__main__":
    sys.exit(main())
