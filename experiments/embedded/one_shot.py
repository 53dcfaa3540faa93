"""One-shot methods on the embedded model, against searches on the same examples.

    python experiments/embedded/comparison.py --jobs 2
    python experiments/embedded/one_shot.py --runs runs/comparison --readme experiments/embedded/README.md

Each method observes a task's search split and makes a model for that task alone. Test accuracy, and its difference,
example by example, from what two searches found (the mean over the seeds that there are), with a 95 % interval (paired
bootstrap within each task). About ten minutes; prints the tables of the README.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import numpy.typing as npt
from comparison import write_between_marks
from rich.console import Console

from moe_evo.commands.align import align
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.merges import MERGES
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.registry import CRITERIA, METHODS
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool
from moe_evo.genomes.file import load_genome
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, ExampleScores
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.source import ModelSource
from moe_evo.records.folder import RunFolder
from moe_evo.records.statistics import paired_difference
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.data import check_tasks
from moe_evo.tasks.sources import embedded_task_names
from moe_evo.tracking.terminal import TerminalTracker

NUM_KEPT = (4, 2)
SEARCHES = {"surrogate": "surrogate", "random, best of 200": "random"}
PROGRESSIVE = ("reap", "easy_ep", "leave_one_out", "naee", "ream")
"""Also scored on what each layer gets from those before it, once they are pruned or merged."""


@dataclass(frozen=True)
class Way:
    """A line of the table."""

    method: str
    make: str = "genome"
    is_aligned: bool = False

    @property
    def label(self) -> str:
        progressive = " (progressive)" if self.make == "progressive_genome" else ""
        return f"{self.method}{progressive}{' (aligned)' if self.is_aligned else ''}"


def ways() -> list[Way]:
    named = [Way(name) for name in METHODS if not (name in CRITERIA and CRITERIA[name].needs_base_model)]
    progressive = [Way(name, "progressive_genome") for name in PROGRESSIVE]
    return [*named, *progressive, *(Way(name, is_aligned=True) for name in MERGES)]


def one_shot_scores(task: str, tracker: TerminalTracker) -> dict[tuple[str, int], ExampleScores]:
    """By label and number of experts kept."""
    evaluator = _evaluator(task, tracker)
    observer = Observer(LocalPool(evaluator).ask, {task: task}, "embedded")
    spaces = {number: SearchSpace.build(evaluator.model.shape, num_kept=number) for number in NUM_KEPT}
    genomes = {
        (way, number): getattr(METHODS[way.method], way.make)(observer, space)
        for way in ways()
        for number, space in spaces.items()
    }
    plain = {(way.label, number): genome for (way, number), genome in genomes.items() if not way.is_aligned}
    found = _scores(evaluator, plain)
    for (way, number), genome in genomes.items():
        if way.is_aligned:  # which permutes the neurons of a model that is loaded for it alone
            other = _evaluator(task, tracker)
            align(other, genome, "embedded", tracker)
            found |= _scores(other, {(way.label, number): genome})
    return found


def searched_scores(task: str, runs: Path, tracker: TerminalTracker) -> dict[tuple[str, int], ExampleScores]:
    """The same of what searches found, each example's mean over the seeds that were run."""
    evaluator = _evaluator(task, tracker)
    found: dict[tuple[str, int], ExampleScores] = {}
    for number in NUM_KEPT:
        for label, method in SEARCHES.items():
            folders = sorted((runs / "embedded").glob(f"{task}-keep{number}-seed*/{method}"))
            winners = {(label, seed): load_genome(RunFolder.existing(one).best) for seed, one in enumerate(folders)}
            of_seeds = _scores(evaluator, winners)
            found[label, number] = {task: np.mean([one[task] for one in of_seeds.values()], axis=0)}
    return found


def _evaluator(task: str, tracker: TerminalTracker) -> Evaluator:
    data = check_tasks([TaskConfig(data=task)])
    return load_evaluator(ModelSource(ModelConfig(self_check=False)), data, EvaluationConfig(), tracker)


def _scores(evaluator: Evaluator, genomes: dict[tuple[str, int], Genome]) -> dict[tuple[str, int], ExampleScores]:
    outcomes = evaluator.evaluate(list(genomes.values()), "test")
    scores = {
        key: one.scores
        for key, one in zip(genomes, outcomes, strict=True)
        if isinstance(one, Evaluation) and one.scores
    }
    assert len(scores) == len(genomes), "the embedded model has a score for every genome"
    return scores


def table(scores: Mapping[tuple[str, int], ExampleScores], number: int, tasks: Sequence[str]) -> str:
    """Markdown, best mean first; a difference whose interval has no 0 is bold."""
    rng = np.random.default_rng(0)
    lines = [
        f"**{number} of 8 experts**\n",
        f"| | mean | against surrogate | against random | {' | '.join(tasks)} |",
        f"| --- | ---: | ---: | ---: |{' ---: |' * len(tasks)}",
    ]
    means = {
        label: {task: float(one[task].mean()) for task in tasks}
        for (label, kept), one in scores.items()
        if kept == number
    }
    for label, of_tasks in sorted(means.items(), key=lambda item: -float(np.mean(list(item[1].values())))):
        cells = [_difference(scores, label, reference, number, rng) for reference in SEARCHES]
        name = f"*{label}*" if label in SEARCHES else label
        accuracies = " | ".join(f"{of_tasks[task]:.3f}" for task in tasks)
        lines.append(f"| {name} | {np.mean(list(of_tasks.values())):.3f} | {' | '.join(cells)} | {accuracies} |")
    return "\n".join(lines)


def _difference(
    scores: Mapping[tuple[str, int], ExampleScores], label: str, reference: str, number: int, rng: np.random.Generator
) -> str:
    if label == reference:
        return ""
    found = paired_difference(scores[label, number], scores[reference, number], rng)
    text = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"), help="folder of comparison.py's runs")
    parser.add_argument("--readme", type=Path, help="also write the tables between the marks in this file")
    options = parser.parse_args()
    tasks = sorted(embedded_task_names())
    scores: dict[tuple[str, int], dict[str, npt.NDArray[np.float64]]] = {}
    tracker = TerminalTracker(Console(file=sys.stderr))
    for task in tasks:
        tracker.message(task)
        for key, one in (one_shot_scores(task, tracker) | searched_scores(task, options.runs, tracker)).items():
            scores.setdefault(key, {}).update(one)
    text = "\n\n".join(table(scores, number, tasks) for number in NUM_KEPT)
    print(text)
    if options.readme:
        write_between_marks(options.readme, "one-shot", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
