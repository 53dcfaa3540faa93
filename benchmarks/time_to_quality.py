"""How long until a search has found what the published schedule finds in 402 evaluations?

    python benchmarks/time_to_quality.py [--seeds 0 1 2] [--task syll]

The published schedule (`eep_release`) is run once a seed; what its best finalist reaches on the validation
split is the quality to reach. Its time in the published manner is 402 times what `PublishedLoop` takes for
a sample of its genomes. Every other row is a search of this package: evaluations and seconds until a new
best individual reaches that quality on the validation split (validating counts), and what its winner after
all evaluations has on the test split. A search that never gets there counts with all its time, and is told.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from baselines import PublishedLoop
from figures import print_figures
from models import loaded
from rich.console import Console
from rich.table import Table

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.search import EEPConfig, SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool
from moe_evo.evaluation.pool import Request
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, Individual, Population
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.view import MoEModel
from moe_evo.searches.registry import build_search
from moe_evo.tasks.data import TaskData, check_tasks
from moe_evo.tasks.registry import build_task

FINALISTS = 20
SURVIVORS = 6
CONFIDENCE = 0.9
PREFIXES = EEPConfig(prefix_rate=1.0)
KEEPING = "children keep a beginning"


@dataclass(frozen=True)
class Way:
    """A search of this package. search_metric: what it maximises."""

    evaluation: EvaluationConfig
    algorithm: str = "eep"
    eep: EEPConfig = field(default_factory=EEPConfig)
    search_metric: str = "default"


WAYS = {
    "plain": Way(EvaluationConfig(share_layers=False)),
    "layers shared": Way(EvaluationConfig()),
    "and raced": Way(EvaluationConfig(race=CONFIDENCE)),
    f"and {KEEPING}": Way(EvaluationConfig(race=CONFIDENCE), eep=PREFIXES),
    f"not raced, {KEEPING}": Way(EvaluationConfig(), eep=PREFIXES),
    "surrogate": Way(EvaluationConfig(), "surrogate"),
    "surrogate, on probabilities": Way(EvaluationConfig(), "surrogate", search_metric="probability"),
}


@dataclass(frozen=True)
class Found:
    """A finished search. quality, test: of the winner; reached: evaluations and seconds until the goal, or None."""

    genomes: list[Genome]
    quality: float
    test: float
    seconds: float
    reached: tuple[int, float] | None


def found_by(evaluator: Evaluator, config: SearchConfig, space: SearchSpace, goal: float | None) -> Found:
    """Run one search as the driver does, with its new best individuals validated on the way."""
    search, pool, validated = build_search(space, config), LocalPool(evaluator), dict[str, float]()
    genomes: list[Genome] = []
    reached = None
    started = time.perf_counter()
    while len(genomes) < config.evaluations:
        (candidate,) = search.ask(1)
        complete = search.population.complete.ranked
        rival = complete[SURVIVORS - 1].evaluation.scores if len(complete) >= SURVIVORS else None
        pool.submit([Request("search", candidate.number, candidate.genome, "search", rival)])
        ((_, outcome),) = pool.next_outcomes()
        search.tell([Individual(candidate, outcome)])
        genomes.append(candidate.genome)
        best = search.population.best.genome
        if goal is not None and reached is None and best.digest not in validated:
            validated[best.digest] = score(evaluator, best, "validation")
            if validated[best.digest] >= goal:
                reached = (len(genomes), time.perf_counter() - started)
    seconds = time.perf_counter() - started
    winner, quality = best_of(evaluator, search.population)
    return Found(genomes, quality, score(evaluator, winner, "test"), seconds, reached)


def best_of(evaluator: Evaluator, population: Population) -> tuple[Genome, float]:
    """The winner on the validation split among the best by search fitness."""
    finalists = [one.genome for one in population.complete.ranked[:FINALISTS]]
    scores = [score(evaluator, genome, "validation") for genome in finalists]
    return finalists[int(np.argmax(scores))], max(scores)


def score(evaluator: Evaluator, genome: Genome, split: str) -> float:
    outcome = evaluator.evaluate([genome], split)[0]
    assert isinstance(outcome, Evaluation), outcome
    return outcome.fitness


def evaluator_of(model: MoEModel, tasks: Sequence[TaskData], config: EvaluationConfig) -> Evaluator:
    """A new evaluator, with nothing known but its batches."""
    built = [build_task(one, model.tokenizer, config.batch_tokens) for one in tasks]
    evaluator = Evaluator(model, built, config)
    for split in ("search", "validation", "test"):
        score(evaluator, model.shape.identity(), split)
    return evaluator


def published_seconds(loop: PublishedLoop, genomes: Sequence[Genome], sample: int) -> float:
    """What the published manner would take for all of them."""
    chosen = [genomes[number] for number in np.linspace(0, len(genomes) - 1, sample).round().astype(int)]
    started = time.perf_counter()
    for genome in chosen:
        loop.fitness(genome)
    return (time.perf_counter() - started) / sample * len(genomes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="syll", help="embedded task")
    parser.add_argument("--num_kept", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=402)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(argv)
    tasks = check_tasks([TaskConfig(data=options.task)])
    model = loaded("embedded", tasks, EvaluationConfig()).model
    space = SearchSpace.build(model.shape, num_kept=options.num_kept)
    loop = PublishedLoop(model, tasks, options.num_kept, space.top_k[0])
    published: list[tuple[Found, float]] = []
    ours: dict[str, list[Found]] = {name: [] for name in WAYS}
    for seed in options.seeds:
        release = SearchConfig("eep_release", options.num_kept, evaluations=options.evaluations, seed=seed)
        goal = found_by(evaluator_of(model, tasks, EvaluationConfig()), release, space, None)
        if not published:
            loop.tune(goal.genomes[0])
        published.append((goal, published_seconds(loop, goal.genomes, sample=4)))
        for name, way in WAYS.items():
            config = replace(release, algorithm=way.algorithm, eep=way.eep)
            data = check_tasks([TaskConfig(data=options.task, search_metric=way.search_metric)])
            ours[name].append(found_by(evaluator_of(model, data, way.evaluation), config, space, goal.quality))
    table = Table(
        "search", "evaluations to the quality", "seconds", "faster by", "all evaluations, s", "test of the winner",
        title=f"{options.task}, {options.num_kept} experts kept, {len(options.seeds)} seeds, medians",
    )  # fmt: skip
    base = float(np.median([seconds for _, seconds in published]))
    tests = [one.test for one, _ in published]
    table.add_row(
        "published schedule and manner", str(options.evaluations), f"{base:.0f}", "1", f"{base:.0f}", told(tests)
    )
    figures: dict[str, float] = {}
    for name, runs in ours.items():
        reached = [one.reached or (options.evaluations, one.seconds) for one in runs]
        missed = sum(one.reached is None for one in runs)
        evaluations = f"{np.median([number for number, _ in reached]):.0f}" + (f" ({missed} never)" if missed else "")
        seconds, total = np.median([each for _, each in reached]), np.median([one.seconds for one in runs])
        ratios = [full / each for (_, full), (_, each) in zip(published, reached, strict=True)]
        table.add_row(
            name, evaluations, f"{seconds:.1f}", f"{np.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f})",
            f"{total:.1f}", told([one.test for one in runs]),
        )  # fmt: skip
        figures[name] = float(np.median(ratios))
    Console().print(table)
    print_figures("time_to_quality", {"task": options.task, "seeds": options.seeds, **figures})
    return 0


def told(values: Sequence[float]) -> str:
    """Mean and range."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    sys.exit(main())
