"""What does it cost to propose the next prunings?

    python benchmarks/proposing.py

`surrogate` gets random prunings with made-up scores, then proposes a batch: it fits its posterior, makes a pool and
draws. Times are CPU times of the process (one thread), the median of some batches. How the posterior's weights are
found is in none of them: that happens anew when a quarter more scores are known, from at most 400 of them, and has a
column of its own. For the embedded model the time of an evaluation is measured beside it, of random prunings on one
task's search split. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from figures import print_figures
from models import EMBEDDED, loaded
from rich.console import Console
from rich.table import Table

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.population import Candidate, Evaluation, Individual
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.searches.surrogate import SurrogateSearch
from moe_evo.tasks.data import check_tasks

_BATCHES = 3


@dataclass(frozen=True)
class Point:
    """A search after some evaluations."""

    layers: int
    experts: int
    kept: int
    evaluations: int

    @property
    def bits(self) -> int:
        return self.layers * self.experts


POINTS = [
    *(Point(4, 8, 4, number) for number in (50, 200, 400)),
    *(Point(6, 32, 8, number) for number in (200, 400)),
    *(Point(24, 64, 32, number) for number in (200, 800)),
    *(Point(48, 128, 64, number) for number in (200, 500, 1000, 2000)),
]


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a batch, and of finding the posterior's weights."""

    batch_s: float
    weights_s: float


def cost_of(point: Point) -> Cost:
    """What the next batches of a search cost after `point.evaluations` random prunings."""
    number = point.layers
    shape = ModelShape("mixtral", (point.experts,) * number, (2,) * number, tuple(range(number)))
    space = SearchSpace.build(shape, num_kept=point.kept)
    config = SearchConfig(algorithm="surrogate", num_kept=point.kept, evaluations=10 * point.evaluations)
    rng = np.random.default_rng(0)
    worths = rng.normal(size=(point.layers, point.experts))

    def told(candidate: Candidate) -> Individual:
        worth = sum(worths[layer, list(one)].sum() for layer, one in enumerate(candidate.genome.kept))
        return Individual(candidate, Evaluation(float(worth), num_examples=300))

    search = SurrogateSearch(space, config)
    drawn = [Candidate(place, random_pruning(space, rng), "random_pruning") for place in range(point.evaluations)]
    search.restore(drawn)
    search.tell(map(told, drawn))
    first, *others = (_batch_s(search, told) for _ in range(_BATCHES + 1))
    batch_s = float(np.median(others))
    return Cost(batch_s, max(first - batch_s, 0.0))


def _batch_s(search: SurrogateSearch, told: object) -> float:
    assert callable(told)
    spent = 0.0
    for _ in range(search.options.batch):  # one by one, as one model in this process scores them
        begun = time.process_time()
        asked = search.ask(1)
        spent += time.process_time() - begun
        search.tell(map(told, asked))
    return spent


def evaluation_s() -> float:
    """Of a random pruning of the embedded model, on the search split of one task."""
    evaluator = loaded(str(EMBEDDED), check_tasks([TaskConfig(data="syll")]), EvaluationConfig(threads=1))
    space, rng = SearchSpace.build(evaluator.model.shape, num_kept=4), np.random.default_rng(0)
    spent = []
    for _ in range(20):
        begun = time.process_time()
        evaluator.evaluate([random_pruning(space, rng)], "search")
        spent.append(time.process_time() - begun)
    return float(np.median(spent))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    cost_of(POINTS[0])  # imports SciPy
    costs = {point: cost_of(point) for point in POINTS}
    evaluation = evaluation_s()
    table = Table("layers x experts, kept", "bits", "scores known", "a batch, ms", "a candidate, ms", "weights, ms")
    size = SearchConfig().surrogate.batch
    for point, cost in costs.items():
        table.add_row(
            f"{point.layers} x {point.experts}, {point.kept}", str(point.bits), str(point.evaluations),
            f"{1e3 * cost.batch_s:.1f}", f"{1e3 * cost.batch_s / size:.2f}", f"{1e3 * cost.weights_s:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    embedded = costs[Point(4, 8, 4, 200)]
    print(
        f"an evaluation on the embedded model: {1e3 * evaluation:.1f} ms; of it, a batch of {size} after 200 scores is "
        f"{embedded.batch_s / evaluation:.2f}, a candidate {embedded.batch_s / size / evaluation:.3f}"
    )
    figures = {f"{one.bits} bits, {one.evaluations} scores": round(cost.batch_s, 4) for one, cost in costs.items()}
    print_figures("proposing", {"batch_s": figures, "evaluation_s": round(evaluation, 4)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
