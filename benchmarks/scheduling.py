"""Does the driver ever keep a gang waiting?

    python benchmarks/scheduling.py

Throughput: evaluators that compute nothing, so that what is left is the driver, the journal on disk and
the pool: in one process, and with real Ray gangs. Occupancy: simulated pools of 8, 64 and 1,024 gangs
whose evaluations take log-normal times (mean 10 s, sigma 0.3) on a virtual clock that the real driver's
and journal's own time is added to; beside it a driver that waits for whole generations, with the same
times. Prints two tables and one JSON line.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from figures import print_figures
from rich.console import Console
from rich.table import Table

from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.questions import Question
from moe_evo.criteria.sums import Observation
from moe_evo.evaluation.pool import Listener, Pool, Request
from moe_evo.gangs.dispatcher import Batch, Dispatcher, Job, Key
from moe_evo.gangs.rank import Rank, Work
from moe_evo.gangs.ray_pool import ray_pool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, Outcome
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.records.journal import MAIN, Journal
from moe_evo.runs.loop import Run
from moe_evo.searches.random_search import RandomSearch
from moe_evo.tasks.answered import Answered
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.terminal import TerminalTracker

SHAPE = ModelShape(family="mixtral", num_experts=(8,) * 4, top_k=(2,) * 4, decoder_layers=(0, 1, 2, 3))
SPACE = SearchSpace.build(SHAPE, num_kept=4)
MEAN_S, SIGMA = 10.0, 0.3


def outcome_of(genome: Genome) -> Evaluation:
    """What an evaluator that computes nothing answers."""
    return Evaluation(fitness=int(genome.digest[:8], 16) / 2**32)


class NoWork(Rank):
    """A rank without a model."""

    def load(self, *_: object) -> None:
        pass

    def begin(self, work: Work, halvings: int) -> Sequence[str]:
        return ()

    def evaluate(self, key: str, genomes: Sequence[Genome], split: str, *rivals: Any) -> list[Outcome]:
        return [outcome_of(genome) for genome in genomes]


class NoWorkPool:
    """One evaluator in this process that computes nothing."""

    shape = SHAPE

    def __init__(self) -> None:
        self._waiting: list[Request] = []
        self.listener: Listener = lambda news: None

    @property
    def free_slots(self) -> int:
        return 16 - len(self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting += requests

    def next_outcomes(self) -> list[tuple[Request, Outcome]]:
        finished, self._waiting = self._waiting, []
        return [(request, outcome_of(request.genome)) for request in finished]

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Observation[Any]]]:
        raise AssertionError("nothing is asked of a pool without a model")

    def answered(self, genome: Genome | None, split: str, first: int | None = None) -> tuple[Answered, ...]:
        raise AssertionError("nothing is answered by a pool without a model")

    def close(self) -> None:
        pass


class SimulatedPool(NoWorkPool):
    """Gangs on a virtual clock behind the real dispatcher; what the driver does in between takes its real time."""

    def __init__(self, num_gangs: int, durations: npt.NDArray[np.float64]) -> None:
        super().__init__()
        self._dispatcher = Dispatcher(max_batch=16, max_attempts=3)
        self._dispatcher.join(MAIN)
        self._requests: dict[int, Request] = {}
        self._numbers: dict[Key, int] = {}
        self._num_gangs = num_gangs
        self._durations = durations
        self._idle = list(range(num_gangs))
        self._busy: list[tuple[float, int, float, Batch]] = []
        self._left_at = time.perf_counter()
        self.now_s = self.busy_s = 0.0

    @property
    def free_slots(self) -> int:
        return self._dispatcher.slots(self._num_gangs) - len(self._requests)

    def submit(self, requests: Sequence[Request]) -> None:
        self._catch_up()
        for request in requests:
            self._requests[request.number] = request
        jobs = [(request.number, Job("work", request.split, request.genome)) for request in requests]
        self._numbers |= {job.key: number for number, job in jobs}
        self._dispatcher.submit(MAIN, jobs)
        self._assign(self.now_s)
        self._left_at = time.perf_counter()

    def next_outcomes(self) -> list[tuple[Request, Outcome]]:
        self._catch_up()
        if not self._dispatcher.has_answers(MAIN):
            self._finish_one()
        finished: list[tuple[Request, Outcome]] = []
        for number, answer in self._dispatcher.answers(MAIN):
            assert isinstance(answer, Evaluation)
            finished.append((self._requests.pop(number), answer))
        self._left_at = time.perf_counter()
        return finished

    def _catch_up(self) -> None:
        """The driver has had the processor since it was last here; gangs went on meanwhile."""
        self.now_s += time.perf_counter() - self._left_at
        while self._busy and self._busy[0][0] <= self.now_s:
            self._finish_one()

    def _finish_one(self) -> None:
        at_s, gang, duration_s, batch = heapq.heappop(self._busy)
        self.now_s = max(self.now_s, at_s)
        self._dispatcher.finish(batch, [outcome_of(job.genome) for job in batch if job.genome is not None], duration_s)
        self._idle.append(gang)
        self._assign(at_s)

    def _assign(self, at_s: float) -> None:
        while self._idle and (batch := self._dispatcher.take(self._num_gangs)):
            duration_s = float(self._durations[self._numbers[batch[0].key]])
            self.busy_s += duration_s
            heapq.heappush(self._busy, (at_s + duration_s, self._idle.pop(), duration_s, batch))


def drive(pool: Pool, evaluations: int, folder: Path) -> float:
    """Seconds of a random search of so many evaluations by the real driver, journal on disk."""
    with Journal(folder / "journal.sqlite") as journal:
        run = Run(journal, pool, TerminalTracker(Console(quiet=True)))
        started = time.perf_counter()
        run.evolve(MAIN, "random search", RandomSearch(SPACE, SearchConfig()), evaluations)
        return time.perf_counter() - started


def throughput(evaluations: int) -> dict[str, float]:
    """Evaluations per second, by pool."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        rates["one process"] = evaluations / drive(NoWorkPool(), evaluations, Path(folder))
    for num_gangs in (1, 2):
        config = ScoringConfig(cluster=ClusterConfig(address="local", num_gangs=num_gangs))
        data = check_tasks([TaskConfig(data="syll", num_search=2)])
        with tempfile.TemporaryDirectory() as folder, ray_pool(config, data, SHAPE, "", NoWork) as pool:
            pool.submit([Request("warm-up", 0, SHAPE.identity(), "search")])
            pool.next_outcomes()
            rates[f"Ray, {num_gangs} gang{'s' * (num_gangs > 1)}"] = evaluations / drive(
                pool, evaluations, Path(folder)
            )
    return rates


def occupancy(num_gangs: int, rounds: int) -> dict[str, float]:
    """Busy share of the gangs' time with our driver and with one that waits for generations."""
    evaluations = num_gangs * rounds
    rng = np.random.default_rng(num_gangs)
    durations = rng.lognormal(np.log(MEAN_S) - SIGMA**2 / 2, SIGMA, evaluations)
    pool = SimulatedPool(num_gangs, durations)
    with tempfile.TemporaryDirectory() as folder:
        wall_s = drive(pool, evaluations, Path(folder))
    slowest_s = durations.reshape(rounds, num_gangs).max(axis=1).sum()
    return {
        "gangs": num_gangs,
        "evaluations": evaluations,
        "busy": pool.busy_s / (num_gangs * pool.now_s),
        "busy_with_generations": float(durations.sum() / (num_gangs * slowest_s)),
        "driver_ms_an_evaluation": 1000 * wall_s / evaluations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=5000, help="of each throughput measurement")
    parser.add_argument("--rounds", type=int, default=60, help="evaluations a simulated gang")
    arguments = parser.parse_args()
    rates = throughput(arguments.evaluations)
    table = Table("pool", "evaluations/s", title="nothing to compute, journal on disk")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}")
    Console().print(table)
    simulated = [occupancy(num_gangs, arguments.rounds) for num_gangs in (8, 64, 1024)]
    table = Table("gangs", "busy", "busy with generations", "driver, ms/evaluation", title="log-normal evaluations")
    for one in simulated:
        table.add_row(
            f"{one['gangs']:,}", f"{one['busy']:.1%}", f"{one['busy_with_generations']:.1%}",
            f"{one['driver_ms_an_evaluation']:.2f}",
        )  # fmt: skip
    Console().print(table)
    print_figures("scheduling", {"evaluations_per_s": rates, "simulated": simulated})


if __name__ == "__main__":
    main()
