"""What do fresh examples win? The same number of examples read, fixed or changing, from a large search split.

    python experiments/embedded/build_tasks.py --cache build/packages --out build/tasks
    python experiments/embedded/fresh_examples.py --data build/tasks --jobs 2 --readme experiments/fine/README.md

Candidates are searched for on 3,000 training examples of a task, on which the model is no better than on others. Each
run is kept in a folder of its own, so the script can be stopped and started again. Prints a table as Markdown.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker, before torch is imported

import numpy as np
from comparison import SIZES, loaded_model, run_all, write_between_marks
from rich.console import Console

from moe_evo.commands.search import search
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.files.write import write_whole
from moe_evo.records.folder import RunFolder
from moe_evo.tracking.terminal import TerminalTracker

NUM_SEARCH = 3000
FORWARDS = 60_000  # examples that a search reads
FIXED = 300  # examples of a fixed search split


@dataclass(frozen=True)
class Way:
    """A way to search. size: examples a score rests on."""

    title: str
    algorithm: str
    size: int
    is_fresh: bool


WAYS = (
    Way("random", "random", FIXED, False),
    Way("EEP", "eep", FIXED, False),
    Way("surrogate", "surrogate", FIXED, False),
    Way("surrogate, fresh", "surrogate", FIXED, True),
    Way("surrogate, fresh", "surrogate", 150, True),
    Way("surrogate, fresh", "surrogate", 75, True),
)


@dataclass(frozen=True)
class Cell:
    """One run: a task, a seed and a way."""

    model: str
    num_kept: int
    task: str
    seed: int
    way: Way
    data: str
    folder: str

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.model / f"{self.task}-keep{self.num_kept}-seed{self.seed}"

    @property
    def config(self) -> RunConfig:
        way = self.way
        name = f"{way.algorithm}-{'fresh' if way.is_fresh else 'fixed'}-{way.size}"
        evaluation = EvaluationConfig(threads=1)
        if way.is_fresh:
            evaluation = replace(evaluation, examples="fresh", sample_size=way.size)
        return RunConfig(
            model=ModelConfig(path=self.model, self_check=False),
            tasks=[
                TaskConfig(
                    name=self.task,
                    data=str(self.task_folder()),
                    search_metric="probability",
                    num_search=0 if way.is_fresh else FIXED,
                )
            ],
            search=SearchConfig(
                algorithm=way.algorithm, num_kept=self.num_kept, seed=self.seed, evaluations=FORWARDS // way.size
            ),
            evaluation=evaluation,
            selection=SelectionConfig(baselines=[]),
            folder=str(self.path / name),
        )

    def task_folder(self) -> Path:
        """A folder whose search split are training examples, drawn by the seed."""
        folder, source = self.path / "task", Path(self.data) / self.task
        if not (folder / "search.jsonl").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            lines = (source / "train.jsonl").read_text("utf-8").splitlines()
            chosen = np.random.default_rng([self.seed, 2]).choice(len(lines), NUM_SEARCH, replace=False)
            for split in ("validation", "test"):
                write_whole(folder / f"{split}.jsonl", (source / f"{split}.jsonl").read_text("utf-8"))
            write_whole(folder / "search.jsonl", "".join(lines[place] + "\n" for place in chosen))
        return folder


@dataclass(frozen=True)
class Found:
    """Accuracy of the winner. searched: on the examples that the search saw."""

    searched: float
    test: float


def run_cell(cell: Cell) -> Found:
    """The winner of one run; a finished one is read back."""
    config = cell.config
    folder = RunFolder(Path(config.folder or ""))
    if not folder.result.is_file():
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            search(config, TerminalTracker(Console(file=nowhere)), loaded_model(cell.model))
    best = folder.read_result().best
    return Found(best.scores["search"].fitness, best.scores["test"].fitness)


def _told(cell: Cell, found: Found) -> str:
    return f"{cell.task} seed {cell.seed}, {cell.way.title} {cell.way.size}: {found.test:.3f}"


def table(results: Mapping[Cell, Found]) -> str:
    """Markdown: a line a way, test accuracy of each task over seeds, and what is lost from search to test examples."""
    tasks = sorted({cell.task for cell in results})
    lines = ["| search | examples a score | candidates | " + " | ".join(tasks) + " | mean | search less test |"]
    lines.append("| --- | ---: | ---: |" + " ---: |" * (len(tasks) + 2))
    for way in WAYS:
        found = {cell: one for cell, one in results.items() if cell.way == way}
        of_task = {task: [one.test for cell, one in found.items() if cell.task == task] for task in tasks}
        cells = [f"{np.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})" for scores in of_task.values()]
        mean = np.mean([np.mean(scores) for scores in of_task.values()])
        lost = np.mean([one.searched - one.test for one in found.values()])
        numbers = f"{way.size} | {FORWARDS // way.size}"
        lines.append(f"| {way.title} | {numbers} | {' | '.join(cells)} | {mean:.3f} | {lost:+.3f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of build_tasks.py")
    parser.add_argument("--model", default="embedded-fine", choices=list(SIZES))
    parser.add_argument("--num_kept", type=int, default=8)
    parser.add_argument("--tasks", nargs="+", default=["arith", "nli", "syll"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--folder", default="runs/fresh_examples")
    parser.add_argument("--readme", type=Path, help="also write the table between the marks in this file")
    options = parser.parse_args(argv)
    cells = [
        Cell(options.model, options.num_kept, task, seed, way, options.data, options.folder)
        for seed in options.seeds
        for task in options.tasks
        for way in WAYS
    ]
    for cell in cells:
        cell.task_folder()  # before several processes would write the same files
    results = run_all(run_cell, cells, options.jobs, _told)
    text = table(results)
    print(text)
    if options.readme:
        write_between_marks(options.readme, "fresh", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
