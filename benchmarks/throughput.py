"""How many genomes does a second evaluate, against other ways to score the same ones?

    python benchmarks/throughput.py [--models embedded mixtral qwen3] [--shots 0 5]

A real EEP search is run and its genomes are written down. They are then evaluated again, in their order
and one by one as a search asks for them, with nothing known at the start; and a sample of them in every
other way. All ways must agree on every genome that they score. Prints a table and one JSON line a model.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from baselines import Checkpoint, Harness, PublishedLoop, fitness_of
from figures import print_figures
from models import KEPT, loaded, model_path
from rich.console import Console
from rich.table import Table
from shots import few_shot_task

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.search import SearchConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.registry import build_search
from moe_evo.tasks.data import check_tasks

EXAMPLES = {"embedded": 200, "mixtral": 40, "qwen3": 40}


def recorded_genomes(evaluator: Evaluator, num_kept: int, evaluations: int) -> tuple[list[Genome], int]:
    """The genomes of an EEP search in their order, and how many of them are prunings of its first phase."""
    space = SearchSpace.build(evaluator.model.shape, num_kept=num_kept)
    search = build_search(space, SearchConfig(algorithm="eep", num_kept=num_kept, evaluations=evaluations))
    genomes = []
    for _ in range(evaluations):
        (candidate,) = search.ask(1)
        genomes.append(candidate.genome)
        search.tell([Individual(candidate, evaluator.evaluate([candidate.genome], "search")[0])])
    return genomes, sum(genome.is_pruning for genome in genomes)


def timed(fitness: Callable[[Genome], float], genome: Genome) -> tuple[float, float]:
    """Seconds and fitness."""
    started = time.perf_counter()
    found = fitness(genome)
    return time.perf_counter() - started, found


def compare(name: str, task_names: Sequence[str], shots: int, evaluations: int, sample: int, folder: Path) -> None:
    """One model: record, evaluate again in every way, print."""
    (folder := folder / f"{name}-{shots}").mkdir()
    tasks = check_tasks([few_shot_task(task, shots, folder, num_search=EXAMPLES[name]) for task in task_names])
    path = model_path(name, folder)
    evaluator, alone, ours = (
        loaded(path, tasks, EvaluationConfig(share_layers=shares)) for shares in (True, False, True)
    )
    genomes, num_prunings = recorded_genomes(evaluator, KEPT[name], evaluations)
    phases = {"pruning": range(num_prunings), "merging": range(num_prunings, evaluations)}
    loop = PublishedLoop(ours.model, tasks, KEPT[name], genomes[0].top_k[0])
    loop.tune(genomes[0])
    ways: dict[str, Callable[[Genome], float]] = {
        "one by one": lambda genome: fitness_of(alone, genome),
        loop.name: loop.fitness,
        Checkpoint.name: Checkpoint(evaluator, tasks).fitness,
    }
    if importlib.util.find_spec("lm_eval") is not None:  # an extra of the package
        (harness_folder := folder / "harness").mkdir()
        ways[Harness.name] = Harness(ours.model, tasks, harness_folder).fitness
    for one in (ours, alone):  # tokens and batches are made once a run
        fitness_of(one, None)
    chosen = {
        number
        for numbers in phases.values()
        for number in np.linspace(numbers[0], numbers[-1], sample).round().astype(int).tolist()
    }
    own: list[float] = []
    others: dict[str, dict[int, float]] = {way: {} for way in ways}
    for number, genome in enumerate(genomes):  # turn by turn, as the machine may be busy for a while
        seconds, fitness = timed(lambda one: fitness_of(ours, one), genome)
        own.append(seconds)
        for way, score in ways.items() if number in chosen else ():
            others[way][number], found = timed(score, genome)
            assert abs(found - fitness) < 1e-9 + 1.01 / EXAMPLES[name] / len(tasks), (way, found, fitness)
    title = f"{name}, {evaluations} genomes, {EXAMPLES[name]} examples of each of {', '.join(task_names)}"
    title += f", {shots} few-shot examples" if shots else ""
    table = Table("phase", "way", "ms an evaluation", "moe_evo is faster by", title=title)
    figures: dict[str, float] = {}
    for phase, numbers in phases.items():
        mean = float(np.mean([own[number] for number in numbers]))
        table.add_row(phase, "moe_evo", f"{mean * 1e3:.1f}", "")
        for way, spent in others.items():
            median = float(np.median([spent[number] for number in numbers if number in spent]))
            figures[f"{phase}_{way.replace(' ', '_')}"] = median / mean
            table.add_row(phase, way, f"{median * 1e3:.1f}", f"{median / mean:.1f}")
    Console().print(table)
    print_figures("throughput", {"model": name, "shots": shots, "evaluations": evaluations, **figures})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(KEPT), choices=list(KEPT))
    parser.add_argument("--tasks", nargs="+", default=["syll", "infl", "sarcasm"], help="embedded tasks of choices")
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 5], help="few-shot examples before every prompt")
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--sample", type=int, default=3, help="genomes of each phase that the other ways score")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for name, shots in product(options.models, options.shots):
            compare(name, options.tasks, shots, options.evaluations, options.sample, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
