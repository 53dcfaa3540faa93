"""How well do cheap proxies put prunings in the order of their test scores?

    python experiments/embedded/proxies.py

For every embedded task the same 60 random prunings to 4 of 8 experts: Spearman's rank correlation of each proxy
with the accuracy on the test split, which no proxy sees. Takes about a quarter of an hour; prints the README's table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import numpy as np
import numpy.typing as npt
from rich.console import Console

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.questions import Trials
from moe_evo.criteria.registry import CRITERIA
from moe_evo.criteria.subsets import subsets
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.source import ModelSource
from moe_evo.records.statistics import RankCorrelation, rank_correlation
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.searches.random_search import RandomSearch
from moe_evo.tasks.data import check_tasks
from moe_evo.tasks.sources import embedded_task_names
from moe_evo.tracking.terminal import TerminalTracker

NUM_KEPT, NUM_PRUNINGS, NUM_SEARCH, NUM_FEW = 4, 60, 200, 40
SALIENCIES = ("frequency", "soft_frequency", "reap", "easy_ep")

Scores = npt.NDArray[np.float64]


def proxies(task: str, tracker: TerminalTracker) -> tuple[dict[str, Scores], Scores]:
    """Each proxy's scores of the prunings, higher is better, and their test accuracies."""
    evaluator = _evaluator(TaskConfig(data=task, num_search=NUM_SEARCH), tracker)
    space = SearchSpace.build(evaluator.model.shape, num_kept=NUM_KEPT)
    genomes = [one.genome for one in RandomSearch(space, SearchConfig()).ask(NUM_PRUNINGS)]
    observer = Observer(LocalPool(evaluator).ask, {task: task}, "embedded")
    found = {
        f"accuracy, {NUM_SEARCH} examples": _fitness(evaluator, genomes, "search"),
        f"log-likelihood, {NUM_SEARCH} examples": _tie_breaks(evaluator, genomes, range(NUM_SEARCH)),
        f"accuracy, {NUM_FEW} examples": _fitness(evaluator, genomes, "search", range(NUM_FEW)),
        f"log-likelihood, {NUM_FEW} examples": _tie_breaks(evaluator, genomes, range(NUM_FEW)),
    }
    distilling = _evaluator(TaskConfig(data=task, kind="distillation", num_search=NUM_SEARCH), tracker)
    found[f"minus KL to the full model, {NUM_SEARCH} prompts"] = _fitness(distilling, genomes, "search")
    found["minus error of the layers' outputs"] = -_layer_errors(observer, space, genomes)
    for name in SALIENCIES:
        found[f"{name} kept"] = _saliency_kept(CRITERIA[name].scores(observer), genomes)
    return found, _fitness(evaluator, genomes, "test")


def _evaluator(task: TaskConfig, tracker: TerminalTracker) -> Evaluator:
    return load_evaluator(ModelSource(ModelConfig(self_check=False)), check_tasks([task]), EvaluationConfig(), tracker)


def _evaluations(
    evaluator: Evaluator, genomes: Sequence[Genome], split: str, examples: Sequence[int] | None = None
) -> list[Evaluation]:
    indices = None if examples is None else {evaluator.tasks[0].name: examples}
    outcomes = evaluator.evaluate(genomes, split, indices)
    return [one for one in outcomes if isinstance(one, Evaluation)]


def _fitness(
    evaluator: Evaluator, genomes: Sequence[Genome], split: str, examples: Sequence[int] | None = None
) -> Scores:
    return np.array([one.fitness for one in _evaluations(evaluator, genomes, split, examples)])


def _tie_breaks(evaluator: Evaluator, genomes: Sequence[Genome], examples: Sequence[int]) -> Scores:
    """The answers' mean log-likelihoods."""
    return np.array([one.tie_break for one in _evaluations(evaluator, genomes, "search", examples)])


def _layer_errors(observer: Observer, space: SearchSpace, genomes: Sequence[Genome]) -> Scores:
    """Sum over layers of log ||y - y^S||^2, each layer by itself on the full model's inputs."""
    layers = observer.about(Trials(num_kept=space.num_kept, top_k=space.top_k)).layers
    place = {tuple(np.flatnonzero(one).tolist()): number for number, one in enumerate(subsets(8, NUM_KEPT))}
    return np.array(
        [
            sum(np.log(layer.errors[place[kept]]) for layer, kept in zip(layers, genome.kept, strict=True))
            for genome in genomes
        ]
    )


def _saliency_kept(scores: Sequence[Scores], genomes: Sequence[Genome]) -> Scores:
    """The kept experts' share of their layer's score, summed over layers."""
    return np.array(
        [
            sum(layer[list(kept)].sum() / layer.sum() for layer, kept in zip(scores, genome.kept, strict=True))
            for genome in genomes
        ]
    )


def main() -> int:
    tasks = sorted(embedded_task_names())
    rng = np.random.default_rng(0)
    found: dict[str, list[RankCorrelation]] = {}
    tracker = TerminalTracker(Console(stderr=True))
    for task in tasks:
        scores, accuracy = proxies(task, tracker)
        for name, values in scores.items():
            found.setdefault(name, []).append(rank_correlation(values, accuracy, rng))
    print(f"| proxy | mean | {' | '.join(tasks)} |")
    print(f"| --- | ---: |{' ---: |' * len(tasks)}")
    for name, of_tasks in sorted(found.items(), key=lambda one: -float(np.mean([rho.value for rho in one[1]]))):
        cells = [f"{rho.value:.2f}" for rho in of_tasks]
        print(f"| {name} | {np.mean([rho.value for rho in of_tasks]):.2f} | {' | '.join(cells)} |")
    widths = [rho.high - rho.low for of_tasks in found.values() for rho in of_tasks]
    print(f"\n95 % intervals over the {NUM_PRUNINGS} prunings are {np.median(widths):.2f} wide (median).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
