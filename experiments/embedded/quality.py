"""How good are the searches? Every embedded task, several numbers of kept experts, several seeds.

    python experiments/embedded/quality.py --jobs 2 --readme experiments/embedded/README.md

Each cell is one `moe-evo search` in a run folder of its own, so the script can be stopped and started
again. Prints the table as Markdown and writes all figures to quality.json in the folder of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker, before torch is imported

import numpy as np
from rich.console import Console

from moe_evo.commands.search import search
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.population import Evaluation
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder, write_whole
from moe_evo.records.journal import RANDOM
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.data import check_tasks, embedded_task_names
from moe_evo.tracking.terminal import TerminalTracker

METHODS = {
    "full": "full",
    "frequency": "frequency",
    "random_mean": "random, mean of 10 a seed",
    "random_search": "random, best of N",
    "best_pruning": "EEP prune",
    "best": "EEP prune + merge",
}


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    task: str
    num_kept: int
    seed: int
    evaluations: int
    folder: str

    @property
    def config(self) -> RunConfig:
        name = f"{self.task}-keep{self.num_kept}-seed{self.seed}"
        return RunConfig(
            tasks=[TaskConfig(data=self.task, num_search=200)],
            search=SearchConfig(num_kept=self.num_kept, evaluations=self.evaluations, seed=self.seed),
            evaluation=EvaluationConfig(threads=1),
            selection=SelectionConfig(random_search=True, finalists=10),
            folder=str(Path(self.folder) / name),
        )


def run_cell(cell: Cell) -> dict[str, float]:
    """Test accuracy by method; finished cells are read back."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        tracker = TerminalTracker(Console(file=nowhere))
        folder = RunFolder(Path(cell.config.folder or ""))
        if not folder.result.is_file():
            folder = search(cell.config, tracker)
        scores = {row.key: row.scores["test"].fitness for row in folder.read_result().rows}
        scores["random_mean"] = float(np.mean(_random_scores(cell.config, folder, tracker)))
    return scores


def _random_scores(config: RunConfig, folder: RunFolder, tracker: TerminalTracker) -> list[float]:
    """Test accuracy of the first 10 random prunings, unselected; kept beside the run."""
    path = folder.path / "random_mean.json"
    if not path.exists():
        with folder.open_journal() as journal:
            genomes = [one.genome for one in journal.candidates(RANDOM)[:10]]
        data = check_tasks(config.tasks)
        evaluator = load_evaluator(ModelSource(config.model), data, config.evaluation, tracker)
        outcomes = evaluator.evaluate(genomes, "test")
        scores = [one.fitness for one in outcomes if isinstance(one, Evaluation)]
        write_whole(path, json.dumps(scores))
    loaded: list[float] = json.loads(path.read_text("utf-8"))
    return loaded


def run_cells(cells: Sequence[Cell], jobs: int) -> dict[Cell, dict[str, float]]:
    """All cells, `jobs` at a time, with progress."""
    results = {}
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as workers,
        TerminalTracker() as tracker,
    ):
        waiting = {workers.submit(run_cell, cell): cell for cell in cells}
        for number, future in enumerate(as_completed(waiting), 1):
            cell = waiting[future]
            results[cell] = future.result()
            tracker.message(
                f"{number}/{len(cells)} {cell.task} keep {cell.num_kept} seed {cell.seed}: "
                + "  ".join(f"{key} {value:.3f}" for key, value in results[cell].items())
            )
    return results


def table(results: dict[Cell, dict[str, float]]) -> str:
    """Markdown: a block a number of kept experts, a line a task, mean and standard deviation over seeds."""
    lines = []
    for num_kept in sorted({cell.num_kept for cell in results}, reverse=True):
        lines += [f"**{num_kept} of 8 experts kept**", "", "| task | " + " | ".join(METHODS.values()) + " |"]
        lines.append("| --- |" + " ---: |" * len(METHODS))
        means: dict[str, list[float]] = {method: [] for method in METHODS}
        for task in sorted({cell.task for cell in results}):
            scores = [result for cell, result in results.items() if (cell.task, cell.num_kept) == (task, num_kept)]
            cells = []
            for method in METHODS:
                values = [score[method] for score in scores]
                means[method].append(float(np.mean(values)))
                spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 and np.std(values) > 5e-4 else ""
                cells.append(f"{np.mean(values):.3f}{spread}")
            lines.append(f"| {task} | " + " | ".join(cells) + " |")
        lines += ["| **mean** | " + " | ".join(f"**{np.mean(means[method]):.3f}**" for method in METHODS) + " |", ""]
        gains = np.subtract(means["best"], means["random_search"])
        if len(gains) > 1:
            error = np.std(gains, ddof=1) / np.sqrt(len(gains))
            lines += [
                "EEP prune + merge less random, best of N: "
                f"{np.mean(gains):+.3f} ± {error:.3f} (standard error over tasks).",
                "",
            ]
    return "\n".join(lines)


def write_between_marks(path: Path, name: str, text: str) -> None:
    """Replace what stands between the two marks of that name in a Markdown file."""
    begin, end = (f"<!-- {name}: {place} -->" for place in ("begin", "end"))
    before, rest = path.read_text("utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=embedded_task_names(), help="default: all embedded tasks")
    parser.add_argument("--num_kept", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=200, help="budget N of each search")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--folder", default="runs/quality")
    parser.add_argument("--readme", type=Path, help="also write the table between the marks in this file")
    options = parser.parse_args(argv)
    cells = [
        Cell(task, num_kept, seed, options.evaluations, options.folder)
        for seed in options.seeds
        for num_kept in options.num_kept
        for task in options.tasks
    ]
    results = run_cells(cells, options.jobs)
    text = table(results)
    print(text)
    figures: list[dict[str, Any]] = [
        {"task": cell.task, "num_kept": cell.num_kept, "seed": cell.seed, **scores} for cell, scores in results.items()
    ]
    (Path(options.folder) / "quality.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    if options.readme:
        write_between_marks(options.readme, "quality", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
