"""What does repair gain over more prunings, at equal evaluations?

    python experiments/embedded/repair.py --jobs 2

Two searches a cell that differ in `search.surrogate.repair` alone, on both embedded models. They choose on the
validation split in the same way; their winners are compared on the test split, example by example. Each search is a run
folder of its own, so the script can be stopped and started again. Prints Markdown tables; about two hours of one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker, before torch is imported

import numpy as np
import numpy.typing as npt
from rich.console import Console

from moe_evo.commands.search import search
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig, SurrogateConfig
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.population import Evaluation
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, REFERENCE
from moe_evo.tracking.terminal import TerminalTracker

NUM_KEPT = {"embedded": (2, 4), "embedded-fine": (8, 16)}
SHARES = {"prunings": 0.0, "repaired": 0.3}
ROWS = {"full": "full", "best_pruning": "seven tenths of the prunings", "prunings": "prunings", "repaired": "repaired"}

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One line of the table: two searches."""

    model: str
    task: str
    num_kept: int
    seed: int
    evaluations: int
    folder: str

    def config(self, search: str) -> RunConfig:
        surrogate = SurrogateConfig(repair=SHARES[search])
        name = f"{self.model}-{self.task}-keep{self.num_kept}-seed{self.seed}-{search}"
        return RunConfig(
            model=ModelConfig(path=self.model, self_check=False, merged_cache_gib=0.2),
            tasks=[TaskConfig(data=self.task, search_metric="probability")],
            search=SearchConfig(
                algorithm="surrogate",
                num_kept=self.num_kept,
                evaluations=self.evaluations,
                seed=self.seed,
                surrogate=surrogate,
            ),
            evaluation=EvaluationConfig(threads=1, state_cache_gib=0.2),
            selection=SelectionConfig(baselines=[]),
            folder=str(Path(self.folder) / name),
        )


def test_scores(cell: Cell) -> dict[str, Scores]:
    """(N,) scores of the test examples by row: the full model, and the winners of both searches."""
    found = {}
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        tracker = TerminalTracker(Console(file=nowhere))
        for name in SHARES:
            config = cell.config(name)
            folder = RunFolder(Path(config.folder or ""))
            if not folder.result.is_file():
                folder = search(config, tracker)
            keys = {row.key: row.candidate for row in folder.read_result().rows}
            with folder.open_journal() as journal:
                for key, number in keys.items():
                    outcome = journal.outcomes(REFERENCE if key == "full" else MAIN, "test")[number]
                    assert isinstance(outcome, Evaluation) and outcome.scores is not None
                    found[name if key == "best" else key] = outcome.scores[cell.task]
    return found


def mean_and_error(values: npt.ArrayLike) -> tuple[float, float]:
    """The mean and its standard error."""
    given = np.asarray(values, dtype=np.float64)
    error = given.std(ddof=1) / np.sqrt(given.size) if given.size > 1 else np.nan
    return float(given.mean()), float(error)


def table(found: dict[Cell, dict[str, Scores]]) -> str:
    """A line for each model, number of experts and task, over seeds; then the mean of all cells.

    The standard error of a line is over test examples, whose differences are averaged over seeds before; that of a
    mean is over lines.
    """
    columns = " | ".join(ROWS.values())
    lines = [f"| model | kept | task | {columns} | repaired - prunings |", "| --- | ---: | --- |" + 5 * " ---: |"]
    groups: dict[tuple[str, int, str], list[dict[str, Scores]]] = {}
    for cell, scores in found.items():
        groups.setdefault((cell.model, cell.num_kept, cell.task), []).append(scores)
    means, gains = [], {}
    for key, seeds in groups.items():
        means.append([float(np.mean([one[row] for one in seeds])) for row in ROWS])
        gains[key] = mean_and_error(np.mean([one["repaired"] - one["prunings"] for one in seeds], axis=0))
        figures = " | ".join(f"{value:.3f}" for value in means[-1])
        lines.append(f"| {' | '.join(map(str, key))} | {figures} | {gains[key][0]:+.3f} ± {gains[key][1]:.3f} |")
    for title, numbers in {"all": None, **NUM_KEPT}.items():
        chosen = [number for number, key in enumerate(gains) if numbers is None or key[0] == title]
        if chosen:
            figures = " | ".join(f"{value:.3f}" for value in np.mean([means[number] for number in chosen], axis=0))
            gain, error = mean_and_error([list(gains.values())[number][0] for number in chosen])
            lines.append(f"| **{title}** | | mean | {figures} | **{gain:+.3f} ± {error:.3f}** |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["arith", "nli", "syll", "city"], help="embedded tasks")
    parser.add_argument("--models", nargs="+", default=list(NUM_KEPT), choices=list(NUM_KEPT))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--evaluations", type=int, default=200, help="budget of each search")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--folder", default="runs/repair")
    options = parser.parse_args()
    cells = [
        Cell(model, task, num_kept, seed, options.evaluations, options.folder)
        for seed in options.seeds
        for model in options.models
        for num_kept in NUM_KEPT[model]
        for task in options.tasks
    ]
    found = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as workers, TerminalTracker() as tracker:
        for cell, scores in zip(cells, workers.map(test_scores, cells), strict=True):
            found[cell] = scores
            means = "  ".join(f"{key} {one.mean():.3f}" for key, one in scores.items())
            tracker.message(f"{len(found)}/{len(cells)} {cell.model} {cell.task} {cell.num_kept}: {means}")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
