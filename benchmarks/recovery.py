"""How long does a gang need to serve again after a fault?

    python benchmarks/recovery.py

Runs evaluations of the embedded model on gangs of a local Ray, breaks something while they are busy, and
measures the time from the fault until the run hears that the gang is broken, until the one built anew is
ready, and until that one has finished an evaluation. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from moe_evo.config import ClusterConfig, EvaluationConfig, ModelConfig, ScoringConfig, TaskConfig
from moe_evo.evaluation.pool import PoolNews, PoolStatus, Request
from moe_evo.gangs.connection import NAMESPACE
from moe_evo.gangs.library import ActorHandle
from moe_evo.gangs.ray_pool import RayPool, ray_pool
from moe_evo.models.loading import model_hash, read_shape
from moe_evo.operators import random_pruning
from moe_evo.space import SearchSpace
from moe_evo.tasks.data import check_tasks

_LIMIT_S = 120.0
_WARM_EVALUATIONS = 20


@dataclass(frozen=True)
class Fault:
    """Something that breaks the first gang, or all. sharded: two ranks hold the model together."""

    name: str
    strike: Callable[[RayPool, PoolStatus], None]
    sharded: bool = False


def _signal_rank(number: int, rank: int = 0) -> Callable[[RayPool, PoolStatus], None]:
    return lambda pool, status: os.kill(status.gangs[0].pids[rank], number)


def _kill_service(pool: RayPool, status: PoolStatus) -> None:
    os.kill(_pid(pool.service), signal.SIGKILL)


def _pid(actor: ActorHandle) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))


FAULTS = (
    Fault("SIGKILL of a rank", _signal_rank(signal.SIGKILL)),
    Fault("SIGKILL of one of two ranks", _signal_rank(signal.SIGKILL, rank=1), sharded=True),
    Fault("SIGSTOP of a rank", _signal_rank(signal.SIGSTOP)),
    Fault("SIGKILL of the service", _kill_service),
)


@dataclass
class Recovery:
    """Seconds from a fault until this was heard; None before."""

    struck_at: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def note(self, what: str) -> None:
        if self.struck_at is not None:
            self.seconds.setdefault(what, time.perf_counter() - self.struck_at)


def measure(fault: Fault, deadline_s: float) -> Recovery:
    """Break one gang while it evaluates, and follow it until it serves again."""
    config = ScoringConfig(
        model=ModelConfig(self_check=False, sharding="tensor_parallel" if fault.sharded else "single"),
        tasks=[TaskConfig(data="syll", num_search=16, num_validation=8, num_test=16)],
        evaluation=EvaluationConfig(threads=1),
        cluster=ClusterConfig(
            address="local", num_gangs=1, gang_size=2 if fault.sharded else 1, max_batch=1, deadline_s=deadline_s
        ),
    )
    shape = read_shape(config.model)
    recovery, pid, began = Recovery(), 0, time.perf_counter()
    with ray_pool(config, check_tasks(config.tasks), shape, model_hash(config.model)) as pool:
        status = PoolStatus()

        def hear(news: PoolNews) -> None:
            nonlocal status
            status = news.status
            assert time.perf_counter() - began < _LIMIT_S, f"{fault.name}: no recovery, {status}"
            for event in news.events:
                recovery.note(event.kind)

        pool.listener = hear
        requests, num_done, num_sent = _requests(SearchSpace.build(shape, num_kept=4)), 0, 0
        while "evaluated" not in recovery.seconds:
            more = list(itertools.islice(requests, 2 - (num_sent - num_done)))  # one in the gang, one behind it
            pool.submit(more)
            num_sent += len(more)
            num_done += len(pool.next_outcomes())
            if recovery.struck_at is None and num_done >= _WARM_EVALUATIONS:
                pid = status.gangs[0].pids[0]
                recovery.struck_at = time.perf_counter()
                fault.strike(pool, status)
            elif recovery.struck_at is not None and status.gangs[0].pids[:1] not in ((), (pid,)):
                recovery.note("evaluated")
    return recovery


def _requests(space: SearchSpace) -> Iterator[Request]:
    """Random prunings, without end."""
    for number in itertools.count():
        yield Request("recovery", number, random_pruning(space, np.random.default_rng([0, number])), "search")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deadline_s", type=float, default=2.0, help="after which a silent rank counts as hung")
    options = parser.parse_args(argv)
    # as many CPUs as ranks need, whatever this machine has
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        found = {fault.name: [measure(fault, options.deadline_s) for _ in range(options.repeats)] for fault in FAULTS}
    finally:
        ray.shutdown()
    columns = ("broken", "ready", "evaluated")
    medians = {
        name: {
            column: float(np.median([one.seconds[column] for one in each if column in one.seconds] or [np.nan]))
            for column in columns
        }
        for name, each in found.items()
    }
    table = Table("fault", *(f"{column}, s" for column in columns), title=f"median of {options.repeats}")
    for name, seconds in medians.items():
        table.add_row(name, *("" if np.isnan(seconds[column]) else f"{seconds[column]:.2f}" for column in columns))
    Console().print(table)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        json.dumps(
            {
                "benchmark": "recovery",
                "commit": commit.stdout.strip() or None,
                "device": platform.processor() or platform.machine(),
                "deadline_s": options.deadline_s,
                "seconds": {
                    name: {key: value for key, value in one.items() if not np.isnan(value)}
                    for name, one in medians.items()
                },
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
