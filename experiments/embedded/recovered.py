"""What does recovery bring back, with few and with many prompts, and does the search still matter after it?

    python experiments/embedded/build_tasks.py --cache build/packages --out build/tasks
    python experiments/embedded/recovered.py --data build/tasks --jobs 2
    python experiments/embedded/recovered.py --data build/tasks --model embedded-fine --jobs 2

Takes what comparison.py found on its redrawn splits, or makes the two runs that it lacks: the surrogate's winner, and
the pruning by the criterion that is best on the validation split. Each is recovered with the 300 prompts of the search
split, and with 4,000 unlabelled ones of the training data beside them. The figures of every recovery are kept, so the
script can be stopped and started again; --most 5 makes five more and stops, --most 0 only prints what is there. Prints
tables as Markdown; --readme writes them into a README.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker, before torch is imported

import numpy as np
from comparison import SIZES, Cell, Scores, best_criterion, run_all, searched_by, write_between_marks
from rich.console import Console

from moe_evo.commands.prune import PruneOptions, prune
from moe_evo.commands.recover import IN_CHECKPOINT, recover
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import RecoverConfig, RecoveryConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.files.write import write_whole
from moe_evo.tasks.sources import embedded_task_names
from moe_evo.tracking.terminal import TerminalTracker

MANY = 4000
SEARCH, CRITERION = "surrogate", "best criterion"


@dataclass(frozen=True)
class Way:
    """What is pruned how, and how it is recovered."""

    pruned: str
    methods: tuple[str, ...]
    is_many: bool = False

    @property
    def title(self) -> str:
        return f"{' + '.join(self.methods)}, {'4,300' if self.is_many else '300'}"


BOTH = ("closed_form", "logits")
METHODS = (("router",), ("labels",), ("logits",), ("layerwise",), ("closed_form",), BOTH)
WAYS = (
    *(Way(SEARCH, methods, is_many) for is_many in (False, True) for methods in METHODS),
    Way(CRITERION, BOTH),
    Way(CRITERION, BOTH, is_many=True),
)


@dataclass(frozen=True)
class Job:
    """One recovery. data: folder of build_tasks.py. folder: where it is kept."""

    cell: Cell
    way: Way
    data: str
    folder: str

    @property
    def path(self) -> Path:
        cell = self.cell
        name = f"{self.way.pruned.split()[0]}-{'-'.join(self.way.methods)}-{MANY if self.way.is_many else 0}"
        return Path(self.folder) / cell.model / f"{cell.task}-keep{cell.num_kept}-seed{cell.seed}" / name

    @property
    def figures(self) -> Path:
        """Where its scores are kept."""
        return self.path.with_suffix(".json")


@dataclass(frozen=True)
class Recovered:
    """Scores of every test example before, after, and of the full model; seconds of training."""

    full: tuple[float, ...]
    pruned: tuple[float, ...]
    recovered: tuple[float, ...]
    seconds: float


def run_job(job: Job) -> Recovered:
    """One recovery, of which the scores are kept and no checkpoint; a finished one is read back."""
    kept = job.figures
    if not kept.is_file():
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            tracker = TerminalTracker(Console(file=nowhere))
            recovered = recover(
                _config(job), str(_pruned(job, tracker)), job.path, "best", overwrite=True, tracker=tracker
            )
        told = json.loads((recovered.folder / IN_CHECKPOINT).read_text("utf-8"))
        write_whole(kept, json.dumps(told) + "\n")
        shutil.rmtree(job.path)
    told = json.loads(kept.read_text("utf-8"))
    full, pruned, after = (tuple(told["examples"][name][job.cell.task]) for name in ("full", "pruned", "recovered"))
    return Recovered(full, pruned, after, sum(stage["learned"]["duration_s"] for stage in told["stages"]))


def _scoring(cell: Cell) -> ScoringConfig:
    return ScoringConfig(
        model=ModelConfig(path=cell.model, self_check=False),
        tasks=[TaskConfig(name=cell.task, data=str(cell.path / "task"))],
        evaluation=EvaluationConfig(threads=1),
    )


def _config(job: Job) -> RecoveryConfig:
    scoring = _scoring(job.cell)
    prompts = None
    if job.way.is_many:
        file = Path(job.folder) / f"{job.cell.task}-{MANY}.jsonl"
        if not file.is_file():
            lines = (Path(job.data) / job.cell.task / "train.jsonl").read_text("utf-8").splitlines()[:MANY]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, "".join(json.dumps({"prompt": json.loads(line)["prompt"]}) + "\n" for line in lines))
        prompts = str(file)
    return RecoveryConfig(
        scoring.model, scoring.tasks, scoring.evaluation, recover=RecoverConfig(list(job.way.methods), prompts=prompts)
    )


def _pruned(job: Job, tracker: TerminalTracker) -> Path:
    """The run of the search, or a checkpoint that the best criterion made."""
    cell = job.cell
    if job.way.pruned == SEARCH:
        return searched_by(cell, SEARCH).path
    target = job.path.with_name("criterion-pruned")
    if not target.is_dir():
        options = PruneOptions(best_criterion(cell), cell.num_kept)
        prune(_scoring(cell), options, target, overwrite=False, tracker=tracker)
    return target


def table(results: Mapping[Job, Recovered]) -> str:
    """Markdown: a block a number of kept experts, a line a task, mean test accuracy over seeds that are finished."""
    lines = []
    for num_kept in sorted({job.cell.num_kept for job in results}, reverse=True):
        of_size = {job: one for job, one in results.items() if job.cell.num_kept == num_kept}
        num_experts, _ = SIZES[next(iter(of_size)).cell.model]
        ways = [way for way in WAYS if any(job.way == way for job in of_size)]
        columns = [f"{SEARCH}, as it is", *(way.title for way in ways if way.pruned == SEARCH)]
        columns += [f"{CRITERION}, as it is", *(way.title for way in ways if way.pruned == CRITERION)]
        lines += [f"**{num_kept} of {num_experts} experts kept**", "", "| task | full | " + " | ".join(columns) + " |"]
        lines.append("| --- |" + " ---: |" * (1 + len(columns)))
        rows = []
        for task in sorted({job.cell.task for job in of_size}):
            rows.append(_row(of_size, ways, task))
            lines.append(f"| {task} | " + " | ".join(map(_shown, rows[-1])) + " |")
        lines += ["| **mean** | " + " | ".join(f"**{_shown(value)}**" for value in np.mean(rows, axis=0)) + " |", ""]
    return "\n".join([*lines, *_gains(results)])


def _shown(value: float) -> str:
    """A mean, or a dash where nothing is finished that it would be of."""
    return "–" if np.isnan(value) else f"{value:.3f}"


def _row(results: Mapping[Job, Recovered], ways: Sequence[Way], task: str) -> list[float]:
    own = {job: one for job, one in results.items() if job.cell.task == task}

    def mean(which: str, chosen: Sequence[Way]) -> float:
        """Over the seeds, of each of which the models that are not recovered are the same in all ways."""
        found = {job.cell.seed: getattr(one, which) for job, one in own.items() if job.way in chosen}
        return float(np.mean(list(found.values()))) if found else float("nan")

    row = [mean("full", ways)]
    for pruned in (SEARCH, CRITERION):
        of_model = [way for way in ways if way.pruned == pruned]
        row += [mean("pruned", of_model), *(mean("recovered", [way]) for way in of_model)]
    return row


def _gains(results: Mapping[Job, Recovered]) -> list[str]:
    """Differences on the same test examples, with a bootstrap over tasks and examples."""
    lines = [
        "| recovered | less as it was [95 %] | less the full model [95 %] | seconds | recoveries |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way in (way for way in WAYS if any(job.way == way for job in results)):
        own = {job: one for job, one in results.items() if job.way == way}
        seconds = np.mean([one.seconds for one in own.values()])
        told = [_difference(own, other) for other in ("pruned", "full")]
        lines.append(f"| {way.pruned}: {way.title} | {told[0]} | {told[1]} | {seconds:.0f} | {len(own)} |")
    return lines


def _difference(results: Mapping[Job, Recovered], other: str) -> str:
    tasks = sorted({job.cell.task for job in results})
    differences = [
        np.mean(
            [np.subtract(one.recovered, getattr(one, other)) for job, one in results.items() if job.cell.task == task],
            axis=0,
        )
        for task in tasks
    ]
    rng = np.random.default_rng(0)

    def resampled(examples: Scores) -> float:
        return float(rng.choice(examples, len(examples)).mean())

    drawn = [
        np.mean([resampled(differences[task]) for task in rng.integers(len(tasks), size=len(tasks))])
        for _ in range(2000)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{np.mean([one.mean() for one in differences]):+.3f} [{low:+.3f}, {high:+.3f}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of build_tasks.py")
    parser.add_argument("--model", default="embedded", choices=list(SIZES))
    parser.add_argument("--tasks", nargs="+", default=embedded_task_names(), help="default: all embedded tasks")
    parser.add_argument("--num_kept", nargs="+", type=int, help="default: half and a quarter of the experts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=200, help="budget of the searches of comparison.py")
    parser.add_argument("--jobs", type=int, default=1, help="recoveries at a time, one thread each")
    parser.add_argument("--most", type=int, help="make so many recoveries that are not there yet; default: all")
    parser.add_argument("--default_only", action="store_true", help="leave out methods that are not used by default")
    parser.add_argument(
        "--runs", default="runs/comparison", help="folder of comparison.py's runs; what it lacks is made"
    )
    parser.add_argument("--folder", default="runs/recovery")
    parser.add_argument("--readme", type=Path, help="also write the tables between the marks in this file")
    options = parser.parse_args(argv)
    cells = [
        Cell(options.model, task, num_kept, seed, options.evaluations, options.runs)
        for seed in options.seeds
        for num_kept in options.num_kept or SIZES[options.model][1]
        for task in options.tasks
    ]
    # those of a cell one after the other, as they share a pruned checkpoint
    ways = [way for way in WAYS if way.methods[0] == BOTH[0]] if options.default_only else WAYS
    jobs = [Job(cell, way, options.data, options.folder) for cell in cells for way in ways]
    if options.most is not None:
        missing = [job for job in jobs if not job.figures.is_file()][options.most :]
        jobs = [job for job in jobs if job not in missing]
    found_cells = (tuple(job for job in jobs if job.cell == cell) for cell in cells)
    of_cells = [one for one in found_cells if one]
    results = run_all(run_jobs, of_cells, options.jobs, _told)
    text = table({job: one for found in results.values() for job, one in found.items()})
    print(text)
    if options.readme is not None:
        write_between_marks(options.readme, "recovery", text)
    return 0


def run_jobs(jobs: Sequence[Job]) -> dict[Job, Recovered]:
    """All recoveries of one cell."""
    return {job: run_job(job) for job in jobs}


def _told(jobs: Sequence[Job], found: Mapping[Job, Recovered]) -> str:
    cell = jobs[0].cell
    means = (f"{job.way.pruned} {job.way.title} {np.mean(one.recovered):.3f}" for job, one in found.items())
    first = found[jobs[0]]
    told = f"{cell.task} keep {cell.num_kept} seed {cell.seed}: full {np.mean(first.full):.3f}, "
    return f"{told}pruned {np.mean(first.pruned):.3f}; " + "; ".join(means)


if __name__ == "__main__":
    sys.exit(main())
