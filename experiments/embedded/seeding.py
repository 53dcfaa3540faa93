"""Does a search get there sooner if it begins from one-shot methods?

    python experiments/embedded/seeding.py --jobs 2 --figure experiments/embedded/seeding.png

Searches that differ in `search.init` alone, on embedded tasks at 4 of 8 experts, three seeds each. After every
evaluation: the validation score of what is the best so far on the search split. Run folders are kept, so the
script can be stopped and started again. Prints the README's table; about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
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
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.population import Evaluation, Individual, Population
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.terminal import TerminalTracker

INITS = {
    "random": {"random": 1.0},
    "reap": {"reap": 1.0},
    "half reap": {"random": 1.0, "reap": 1.0},
    "half soft_frequency": {"random": 1.0, "soft_frequency": 1.0},
    "naee, reap, frequency, random": {"naee": 1.0, "reap": 1.0, "frequency": 1.0, "random": 1.0},
}
EVALUATIONS = 100
Curve = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One search."""

    task: str
    init: str
    seed: int
    folder: str

    @property
    def config(self) -> RunConfig:
        name = f"{self.task}-{self.init.replace(' ', '_').replace(',', '')}-seed{self.seed}"
        return RunConfig(
            model=ModelConfig(self_check=False),
            tasks=[TaskConfig(data=self.task, num_search=200)],
            search=SearchConfig(algorithm="eep", evaluations=EVALUATIONS, seed=self.seed, init=INITS[self.init]),
            evaluation=EvaluationConfig(threads=1),
            selection=SelectionConfig(finalists=1, baselines=[]),
            folder=str(Path(self.folder) / name),
        )


def curve(cell: Cell) -> Curve:
    """(EVALUATIONS,) validation score of the best by search score after each evaluation."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        tracker = TerminalTracker(Console(file=nowhere))
        folder = RunFolder(Path(cell.config.folder or ""))
        if not folder.result.is_file():
            folder = search(cell.config, tracker)
        with folder.open_journal() as journal:
            individuals = journal.individuals(MAIN)
        evaluator = load_evaluator(
            ModelSource(cell.config.model), check_tasks(cell.config.tasks), cell.config.evaluation, tracker
        )
    return _validated(evaluator, individuals)


def _validated(evaluator: Evaluator, individuals: Sequence[Individual]) -> Curve:
    leaders, population = [], Population()
    for individual in individuals:
        population = population.with_outcomes([individual])
        leaders.append(population.best)
    different = {one.number: one.genome for one in leaders}
    outcomes = evaluator.evaluate(list(different.values()), "validation")
    scores = {
        number: one.fitness for number, one in zip(different, outcomes, strict=True) if isinstance(one, Evaluation)
    }
    return np.array([scores[one.number] for one in leaders])


def first_reaching(curves: Curve, level: float) -> str:
    """The evaluation after which the mean curve stays at `level` or above, in words."""
    below = np.flatnonzero(curves.mean(axis=0) < level)
    number = 1 if not len(below) else int(below[-1]) + 2
    return str(number) if number <= EVALUATIONS else f"> {EVALUATIONS}"


def figure(curves: dict[tuple[str, str], Curve], tasks: Sequence[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    drawn, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), sharex=True, squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for init in INITS:
            of_seeds = curves[task, init]
            steps = np.arange(1, EVALUATIONS + 1)
            (line,) = axis.plot(steps, of_seeds.mean(axis=0), label=init, linewidth=1.4)
            axis.fill_between(steps, of_seeds.min(axis=0), of_seeds.max(axis=0), color=line.get_color(), alpha=0.08)
        axis.set_title(task)
        axis.set_xlabel("evaluations")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("validation accuracy of the best so far")
    axes[0, 0].legend(fontsize=7, title="search.init", title_fontsize=7)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["arith", "nli", "syll"], help="embedded tasks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--folder", default="runs/seeding")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    options = parser.parse_args()
    keys = [(task, init) for task in options.tasks for init in INITS]
    cells = [Cell(*key, seed, options.folder) for key in keys for seed in options.seeds]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as workers, TerminalTracker() as tracker:
        found = []
        for number, one in enumerate(workers.map(curve, cells), 1):
            tracker.message(f"{number}/{len(cells)} {cells[number - 1].task} {cells[number - 1].init}: {one[-1]:.3f}")
            found.append(one)
    number = len(options.seeds)
    curves = {key: np.stack(found[first * number :][:number]) for first, key in enumerate(keys)}
    levels = {task: curves[task, "random"][:, -1].mean() for task in options.tasks}
    print("| task | search.init | after 10 | after 31 | after 50 | after 100 | reaches random's end after |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for (task, init), of_seeds in curves.items():
        cells_ = [f"{of_seeds[:, end - 1].mean():.3f}" for end in (10, 31, 50, EVALUATIONS)]
        print(f"| {task} | {init} | {' | '.join(cells_)} | {first_reaching(of_seeds, levels[task])} |")
    if options.figure:
        figure(curves, options.tasks, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
