"""Do two gangs evaluate twice as much as one?

    python benchmarks/scaling.py

Real Ray gangs with the embedded model, one CPU and one thread each, score the same random prunings: one
gang and two in turn, several times in the same run. The second core also carries Ray and the driver, so
two on a machine of two cores is an upper bound. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from figures import print_figures
from rich.console import Console
from rich.table import Table

from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.questions import Weights
from moe_evo.evaluation.pool import Pool, Request
from moe_evo.gangs.connection import connected
from moe_evo.gangs.ray_pool import ray_pool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.source import ModelSource
from moe_evo.tasks.data import check_tasks


def evaluations_per_s(pool: Pool, genomes: list[Genome]) -> float:
    """Of all genomes, as many at a time as the pool takes."""
    waiting = [Request("scaling", number, genome, "search") for number, genome in enumerate(genomes)]
    finished = 0
    started = time.perf_counter()
    while finished < len(genomes):
        number = pool.free_slots
        pool.submit(waiting[:number])
        del waiting[:number]
        finished += len(pool.next_outcomes())
    return len(genomes) / (time.perf_counter() - started)


def measured(num_gangs: int, task: str, number: int) -> float:
    """Evaluations per second of so many gangs once all of them are warm."""
    config = ScoringConfig(
        tasks=[TaskConfig(data=task)],
        evaluation=EvaluationConfig(threads=1),
        cluster=ClusterConfig(address="local", num_gangs=num_gangs),
    )
    shape = ModelSource(ModelConfig()).shape
    space = SearchSpace.build(shape, num_kept=4)
    genomes = [random_pruning(space, np.random.default_rng([1, n])) for n in range(number + 8 * num_gangs)]
    with ray_pool(config, check_tasks(config.tasks), shape, ModelSource(ModelConfig()).hash) as pool:
        ready = 0
        while ready < num_gangs:  # the first evaluations wait for gangs and tokenise
            evaluations_per_s(pool, [genomes.pop() for _ in range(num_gangs)])
            ready = _gangs_at_work(pool)
        return evaluations_per_s(pool, genomes[:number])


def _gangs_at_work(pool: Pool) -> int:
    seen: list[int] = []
    pool.listener = lambda news: seen.append(sum(gang.evaluations > 0 for gang in news.status.gangs))
    list(pool.ask([Weights()]))
    return max(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="nli", help="embedded task")
    parser.add_argument("--genomes", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    with connected("local"):
        for _ in range(arguments.rounds):
            for num_gangs, measurements in rates.items():
                measurements.append(measured(num_gangs, arguments.task, arguments.genomes))
    table = Table("gangs", "evaluations/s, by round", title=f"{arguments.genomes} prunings, task {arguments.task}")
    for num_gangs, measurements in rates.items():
        table.add_row(str(num_gangs), "  ".join(f"{rate:.2f}" for rate in measurements))
    ratios = np.array(rates[2]) / np.array(rates[1])
    table.add_row("2 : 1", "  ".join(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)
    print_figures("scaling", {"evaluations_per_s": rates, "ratio_median": float(np.median(ratios))})


if __name__ == "__main__":
    main()
