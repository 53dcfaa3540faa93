"""Do searches beat luck, criteria and each other? Every embedded task, two sizes, several seeds, on held-out examples.

    python experiments/embedded/comparison.py --jobs 2 --readme experiments/embedded/README.md
    python experiments/embedded/comparison.py --model embedded-fine --jobs 2 --readme experiments/fine/README.md

A seed also redraws which examples are searched on and which choose the winner; those of the test split stay. Each run
is kept in a folder of its own, so the script can be stopped and started again. Prints tables as Markdown and writes
all figures to comparison.json in the folder of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker, before torch is imported

import numpy as np
import numpy.typing as npt
from rich.console import Console

from moe_evo.commands.search import search
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig
from moe_evo.config.search import EEPConfig, SearchConfig, SurrogateConfig
from moe_evo.config.task import TaskConfig
from moe_evo.files.write import write_whole
from moe_evo.genomes.population import Evaluation
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, REFERENCE
from moe_evo.records.result import Row
from moe_evo.tasks.data import REPORTED
from moe_evo.tasks.sources import embedded_task_names
from moe_evo.tracking.terminal import TerminalTracker

if TYPE_CHECKING:
    from moe_evo.models.view import MoEModel

CRITERIA = ["frequency", "soft_frequency", "ean", "mean_ean", "weighted_ean", "reap"]
SEARCHES = {
    "random": "random, best of N",
    "around": "best of N around the best criterion",
    "eep_release": "EEP, published",
    "eep": "EEP, ours",
    "surrogate": "surrogate",
}
METHODS = {"full": "full model", "one_shot": "best criterion", **SEARCHES}
OURS = "surrogate"
SIZES = {"embedded": (8, [4, 2]), "embedded-fine": (32, [16, 8])}
"""Experts of each layer of a model, and how many are kept."""
Scores = npt.NDArray[np.float64]
Work = TypeVar("Work")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Cell:
    """What all methods are compared on. evaluations: N of each search."""

    model: str
    task: str
    num_kept: int
    seed: int
    evaluations: int
    folder: str

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.model / f"{self.task}-keep{self.num_kept}-seed{self.seed}"

    def config(self, method: str, criterion: str) -> RunConfig:
        """The run of a search. criterion: the one around which prunings are drawn."""
        make = partial(SearchConfig, num_kept=self.num_kept, seed=self.seed)
        eep = EEPConfig(num_initial=self.evaluations, num_pruning=self.evaluations)
        surrogate = SurrogateConfig(priors=["reap", "soft_frequency"])
        searches = {
            "random": make(algorithm="random", evaluations=self.evaluations),
            "around": make(algorithm="eep", evaluations=self.evaluations, eep=eep, init=[criterion]),
            "eep_release": make(algorithm="eep_release", evaluations=self.evaluations),
            "eep": make(algorithm="eep", evaluations=self.evaluations),
            # one evaluation less, as the criteria that it begins with observe the model once
            "surrogate": make(algorithm="surrogate", evaluations=self.evaluations - 1, surrogate=surrogate),
        }
        metric = "accuracy" if method == "eep_release" else "probability"
        return RunConfig(
            model=ModelConfig(path=self.model, self_check=False),
            tasks=[TaskConfig(name=self.task, data=str(redrawn(self)), search_metric=metric)],
            search=searches[method],
            evaluation=EvaluationConfig(threads=1),
            selection=SelectionConfig(baselines=CRITERIA if method == "random" else []),
            folder=str(self.path / method),
        )


def redrawn(cell: Cell) -> Path:
    """A folder with the task's splits, in which a seed decides what is searched on and what chooses the winner."""
    folder, source = cell.path / "task", resources.files("moe_evo") / "data" / "tasks" / cell.task
    if not (folder / "test.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        first, second = (
            (source / f"{split}.jsonl").read_text("utf-8").splitlines() for split in ("search", "validation")
        )
        lines = first + second
        order = np.random.default_rng([cell.seed, 1]).permutation(len(lines))
        for split, chosen in (("search", order[: len(first)]), ("validation", order[len(first) :])):
            write_whole(folder / f"{split}.jsonl", "".join(lines[place] + "\n" for place in chosen))
        write_whole(folder / "test.jsonl", (source / "test.jsonl").read_text("utf-8"))
    return folder


@dataclass(frozen=True)
class Found:
    """What a method found: scores of its choice on the splits, those of every test example, and what it cost.

    forwards: examples that the model read until the choice was made: of candidates and finalists, and where criteria
    are used, of observing the model and of choosing among them.
    """

    search: float
    validation: float
    test: float
    examples: tuple[float, ...]
    forwards: int


def run_cell(cell: Cell) -> dict[str, Found]:
    """All methods on one cell; a finished cell is read back, and of another one the finished runs."""
    kept = cell.path / "found.json"
    if kept.is_file():
        told = json.loads(kept.read_text("utf-8"))
        return {method: Found(**{**one, "examples": tuple(one["examples"])}) for method, one in told.items()}
    found = _searched(cell)
    write_whole(kept, json.dumps({method: asdict(one) for method, one in found.items()}) + "\n")
    return found


def _searched(cell: Cell) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for method in SEARCHES:
        folder = searched_by(cell, method)
        result = folder.read_result()
        (examples,) = (task.examples for task in result.tasks)
        observed = examples["search"]
        screened = observed + len(CRITERIA) * examples["validation"]
        beside = {"surrogate": observed, "around": screened}.get(method, 0)
        found[method] = _found(folder, MAIN, result.best, _forwards(folder) + beside)
        if method == "random":
            found["full"] = _found(folder, REFERENCE, result.full, 0)
            row = result.row(best_criterion(cell))
            assert row is not None
            found["one_shot"] = _found(folder, REFERENCE, row, screened)
    return found


def searched_by(cell: Cell, method: str) -> RunFolder:
    """The finished run of one search; one that is there is taken, or goes on."""
    folder = RunFolder(cell.path / method)
    if not folder.result.is_file():
        config = cell.config(method, best_criterion(cell) if method == "around" else "reap")
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            search(config, TerminalTracker(Console(file=nowhere)), loaded_model(cell.model))
    return folder


def best_criterion(cell: Cell) -> str:
    """By the validation split."""
    result = searched_by(cell, "random").read_result()
    rows = [row for row in result.rows if row.key in CRITERIA]
    return max(rows, key=lambda row: row.scores["validation"].fitness).key


@cache
def loaded_model(path: str) -> MoEModel:
    from moe_evo.models.load import load_model
    from moe_evo.models.source import ModelSource

    return load_model(ModelSource(ModelConfig(path=path, self_check=False)))


def _forwards(folder: RunFolder) -> int:
    """Examples that candidates of the search were scored on, but for the final table."""
    with folder.open_journal() as journal:
        return sum(
            one.num_examples
            for split in journal.splits(MAIN)
            if split not in ("test", REPORTED)
            for one in journal.outcomes(MAIN, split).values()
            if isinstance(one, Evaluation)
        )


def _found(folder: RunFolder, name: str, row: Row, forwards: int) -> Found:
    with folder.open_journal() as journal:
        outcome = journal.outcomes(name, "test")[row.candidate]
    assert isinstance(outcome, Evaluation) and outcome.scores is not None
    (examples,) = outcome.scores.values()
    search, validation, test = (row.scores[split].fitness for split in ("search", "validation", "test"))
    return Found(search, validation, test, tuple(examples.tolist()), forwards)


def run_all(
    run: Callable[[Work], Done], cells: Sequence[Work], jobs: int, told: Callable[[Work, Done], str]
) -> dict[Work, Done]:
    """What `run` makes of each cell, `jobs` at a time in processes of their own, with a line for each that is done."""
    results = {}
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as workers,
        TerminalTracker() as tracker,
    ):
        waiting = {workers.submit(run, cell): cell for cell in cells}
        for number, future in enumerate(as_completed(waiting), 1):
            cell = waiting[future]
            results[cell] = future.result()
            tracker.message(f"{number}/{len(cells)} {told(cell, results[cell])}")
    return results


def _told(cell: Cell, found: dict[str, Found]) -> str:
    scores = "  ".join(f"{method} {found[method].test:.3f}" for method in METHODS)
    return f"{cell.task} keep {cell.num_kept} seed {cell.seed}: {scores}"


def table(results: dict[Cell, dict[str, Found]]) -> str:
    """Markdown: a block a number of kept experts, a line a task, mean test accuracy and its deviation over seeds."""
    lines = []
    for num_kept in sorted({cell.num_kept for cell in results}, reverse=True):
        of_size = {cell: one for cell, one in results.items() if cell.num_kept == num_kept}
        num_experts, _ = SIZES[next(iter(of_size)).model]
        lines += [f"**{num_kept} of {num_experts} experts kept**", ""]
        lines += ["| task | " + " | ".join(METHODS.values()) + " |", "| --- |" + " ---: |" * len(METHODS)]
        for task in sorted({cell.task for cell in of_size}):
            scores = [one for cell, one in of_size.items() if cell.task == task]
            cells = [_with_spread([one[method].test for one in scores]) for method in METHODS]
            lines.append(f"| {task} | " + " | ".join(cells) + " |")
        means = [np.mean([one[method].test for one in of_size.values()]) for method in METHODS]
        lines += ["| **mean** | " + " | ".join(f"**{mean:.3f}**" for mean in means) + " |", ""]
    return "\n".join([*lines, *_gains(results), "", *_luck(results)])


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 and np.std(values) > 5e-4 else ""
    return f"{np.mean(values):.3f}{spread}"


def _gains(results: dict[Cell, dict[str, Found]]) -> list[str]:
    """What the surrogate gains over every other method, and over the best of them."""
    others = [method for method in ("one_shot", *SEARCHES) if method != OURS]
    best = max(others, key=lambda method: np.mean([one[method].test for one in results.values()]))
    lines = [f"| {METHODS[OURS]} less | mean over tasks [95 %] | worst task |", "| --- | ---: | ---: |"]
    for method in others:
        value, low, high, worst, task = _gain(results, method)
        name = f"**{METHODS[method]}** (the best other)" if method == best else METHODS[method]
        lines.append(f"| {name} | {value:+.3f} [{low:+.3f}, {high:+.3f}] | {worst:+.3f} ({task}) |")
    return lines


def _gain(results: dict[Cell, dict[str, Found]], other: str) -> tuple[float, float, float, float, str]:
    """Mean difference with its interval by a hierarchical bootstrap over tasks, seeds and test examples.

    Also the least mean difference of a task, and its name.
    """
    tasks = sorted({cell.task for cell in results})
    differences = []  # of each task (seeds, N): mean over the numbers of kept experts
    for task in tasks:
        of_task = {cell: one for cell, one in results.items() if cell.task == task}
        seeds = sorted({cell.seed for cell in of_task})
        rows = [
            [np.subtract(one[OURS].examples, one[other].examples) for cell, one in of_task.items() if cell.seed == seed]
            for seed in seeds
        ]
        differences.append(np.array([np.mean(row, axis=0) for row in rows]))
    means = [float(one.mean()) for one in differences]
    rng = np.random.default_rng(0)
    drawn = [
        np.mean([_resampled(differences[task], rng) for task in rng.integers(len(tasks), size=len(tasks))])
        for _ in range(2000)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    worst = int(np.argmin(means))
    return float(np.mean(means)), float(low), float(high), means[worst], tasks[worst]


def _resampled(differences: Scores, rng: np.random.Generator) -> float:
    """Mean of (seeds, N) differences, with seeds drawn anew and, the same for all seeds, examples."""
    seeds, number = differences.shape
    return float(differences[rng.integers(seeds, size=seeds)][:, rng.integers(number, size=number)].mean())


def _luck(results: dict[Cell, dict[str, Found]]) -> list[str]:
    """By how much the chosen genomes' accuracy falls from the splits that chose them to the test split."""
    lines = ["| falls to the test split from | search split | validation split | examples read a run |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for method in SEARCHES:
        found = [one[method] for one in results.values()]
        full = [one["full"] for one in results.values()]
        falls = [
            np.mean(
                [
                    (getattr(one, split) - one.test) - (getattr(other, split) - other.test)
                    for one, other in zip(found, full, strict=True)
                ]
            )
            for split in ("search", "validation")
        ]
        forwards = np.mean([one.forwards for one in found])
        lines.append(f"| {METHODS[method]} | {falls[0]:.3f} | {falls[1]:.3f} | {forwards:,.0f} |")
    return lines


def write_between_marks(path: Path, name: str, text: str) -> None:
    """Replace what stands between the two marks of that name in a Markdown file."""
    begin, end = (f"<!-- {name}: {place} -->" for place in ("begin", "end"))
    before, rest = path.read_text("utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", choices=list(SIZES))
    parser.add_argument("--tasks", nargs="+", default=embedded_task_names(), help="default: all embedded tasks")
    parser.add_argument("--num_kept", nargs="+", type=int, help="default: half and a quarter of the experts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--evaluations", type=int, default=200, help="budget N of each search")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--folder", default="runs/comparison")
    parser.add_argument("--readme", type=Path, help="also write the tables between the marks in this file")
    options = parser.parse_args(argv)
    cells = [
        Cell(options.model, task, num_kept, seed, options.evaluations, options.folder)
        for seed in options.seeds
        for num_kept in options.num_kept or SIZES[options.model][1]
        for task in options.tasks
    ]
    results = run_all(run_cell, cells, options.jobs, _told)
    text = table(results)
    print(text)
    figures: list[dict[str, Any]] = [
        {"task": cell.task, "num_kept": cell.num_kept, "seed": cell.seed, "method": method, "test": one.test,
         "validation": one.validation, "search": one.search, "forwards": one.forwards}
        for cell, found in results.items() for method, one in found.items()
    ]  # fmt: skip
    target = Path(options.folder) / f"comparison-{options.model}.json"
    target.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    if options.readme:
        write_between_marks(options.readme, "comparison", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
