"""Do searches in bfloat16 rank genomes as searches in float32 do, and what do they cost?

    python benchmarks/number_formats.py [--model mixtral --examples 40 --genomes 10]

Scores the same random prunings in both formats, turn by turn: rank correlation of the fitness, how many of the
ten best are the same, and CPU time as a ratio. Of a random model the time alone means anything. Prints a table
and one JSON line.
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
from baselines import fitness_of
from figures import print_figures
from models import KEPT, loaded, model_path
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.tasks.data import check_tasks

BEST = 10


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", choices=list(KEPT))
    parser.add_argument("--tasks", nargs="+", default=["syll", "infl", "sarcasm"])
    parser.add_argument("--examples", type=int, default=0, help="of each task; 0 means all")
    parser.add_argument("--genomes", type=int, default=40)
    options = parser.parse_args(argv)
    table = Table("task", "rank correlation", f"of the {BEST} best the same", "CPU time, bfloat16 / float32")
    figures: dict[str, list[float | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = model_path(options.model, Path(folder))
        for task in options.tasks:
            tasks = check_tasks([TaskConfig(data=task, num_search=options.examples)])
            evaluators = [loaded(path, tasks, EvaluationConfig(), dtype=dtype) for dtype in ("float32", "bfloat16")]
            space = SearchSpace.build(evaluators[0].model.shape, num_kept=KEPT[options.model])
            seconds, fitness = np.zeros((2, options.genomes)), np.zeros((2, options.genomes))
            for number in range(-1, options.genomes):  # the first makes tokens and batches
                genome = random_pruning(space, np.random.default_rng([0, number + 1]))
                for format_, evaluator in enumerate(evaluators):
                    started = time.process_time()
                    fitness[format_, number] = fitness_of(evaluator, genome)
                    seconds[format_, number] = time.process_time() - started
            order = np.argsort(-fitness, axis=1, kind="stable")[:, :BEST]
            same = len(set(order[0].tolist()) & set(order[1].tolist()))
            ratio = float(np.median(seconds[1]) / np.median(seconds[0]))
            ranks_any = min(map(np.ptp, fitness)) > 0  # a random model may score all genomes alike
            correlation = float(spearmanr(*fitness).statistic) if ranks_any else None
            table.add_row(task, f"{correlation:.3f}" if ranks_any else "-", f"{same}", f"{ratio:.2f}")
            figures[task] = [correlation, same, ratio]
    Console().print(table)
    print_figures("number_formats", {"model": options.model, **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
