"""What does it save to keep the model loaded and apply genomes to it?

    python benchmarks/evaluation.py

Scores the same random prunings of the embedded model on the same examples in two ways, turn by turn:
through the resident view, and by writing each genome's checkpoint, loading it anew and scoring that.
Both must give the same fitness. Prints a table and one JSON line.
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

import numpy as np
from figures import print_figures
from rich.console import Console
from rich.table import Table

from moe_evo import evaluators
from moe_evo.config import EvaluationConfig, ModelConfig, TaskConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genome import Genome
from moe_evo.models.export import export_checkpoint
from moe_evo.operators import random_pruning
from moe_evo.population import Evaluation
from moe_evo.space import SearchSpace
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.terminal import TerminalTracker


def through_view(evaluator: Evaluator, genome: Genome) -> float:
    """Fitness with the resident model."""
    return _fitness(evaluator, genome)


def through_checkpoint(evaluator: Evaluator, genome: Genome, task: TaskConfig, tracker: TerminalTracker) -> float:
    """Fitness of the written and reloaded checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(evaluator.model, genome, Path(folder) / "model", provenance={})
        model = ModelConfig(path=str(Path(folder) / "model"), self_check=False)
        small = evaluators.load_evaluator(model, check_tasks([task]), EvaluationConfig(), tracker)
        return _fitness(small, small.model.shape.identity())


def _fitness(evaluator: Evaluator, genome: Genome) -> float:
    outcome = evaluator.evaluate([genome], "search")[0]
    assert isinstance(outcome, Evaluation), outcome
    return outcome.fitness


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="syll", help="embedded task")
    parser.add_argument("--genomes", type=int, default=8)
    options = parser.parse_args(argv)
    task = TaskConfig(data=options.task)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        tracker = TerminalTracker(Console(file=nowhere))
        evaluator = evaluators.load_evaluator(ModelConfig(), check_tasks([task]), EvaluationConfig(), tracker)
        space = SearchSpace.build(evaluator.model.shape, num_kept=4)
        genomes = [random_pruning(space, np.random.default_rng([0, n])) for n in range(options.genomes + 1)]
        through_view(evaluator, genomes[-1])  # the first evaluation tokenises
        seconds: dict[str, list[float]] = {"view": [], "checkpoint": []}
        for genome in genomes[:-1]:
            started = time.perf_counter()
            first = through_view(evaluator, genome)
            middle = time.perf_counter()
            second = through_checkpoint(evaluator, genome, task, tracker)
            seconds["view"].append(middle - started)
            seconds["checkpoint"].append(time.perf_counter() - middle)
            assert abs(first - second) < 1e-9, (first, second)
    ratios = np.array(seconds["checkpoint"]) / np.array(seconds["view"])
    table = Table("way", "median s an evaluation", title=f"{options.genomes} prunings, task {options.task}")
    for way, values in seconds.items():
        table.add_row(way, f"{np.median(values):.3f}")
    Console().print(table)
    print_figures(
        "evaluation",
        {
            "ratio_median": float(np.median(ratios)),
            "ratio_min": float(ratios.min()),
            "ratio_max": float(ratios.max()),
            "view_s": float(np.median(seconds["view"])),
            "checkpoint_s": float(np.median(seconds["checkpoint"])),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
