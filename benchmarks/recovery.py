"""How long does a search stand still after a fault?

    python benchmarks/recovery.py

Evaluates prunings of the embedded model on one gang of a local Ray, breaks something, and measures the time
from the fault until the run hears that the gang is broken (the last one, where a fault breaks several), until
the one built anew is ready, and until that one has finished an evaluation: the search is then at full
strength again. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray listens on loopback only, and asks for a token that only this process and its children know
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
from figures import print_figures
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from rich.console import Console
from rich.table import Table

from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import JournalError, OutOfMemory
from moe_evo.evaluation.pool import PoolNews, PoolStatus, Request
from moe_evo.gangs.connection import NAMESPACE
from moe_evo.gangs.rank import Rank, Work
from moe_evo.gangs.ray_border import ActorHandle, ray
from moe_evo.gangs.ray_pool import RayPool, ray_pool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.population import Evaluation, Outcome
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.source import ModelSource
from moe_evo.records.journal import MAIN, Journal
from moe_evo.tasks.data import check_tasks

COLUMNS = ("broken", "ready", "evaluated")
_LIMIT_S = 120.0
_WARM_EVALUATIONS = 20
_NUM_CPUS = 4  # as many as ranks need, whatever this machine has
_SLOT = {"gang_slot": 1.0}  # a resource that only nodes have which are there to be lost

Seconds = dict[str, float]
"""From a fault until what the column says; without what nobody heard of."""


@dataclass
class Stage:
    """A search that is under way. file: ranks read in it which genome they cannot bear."""

    cluster: Cluster
    pool: RayPool
    file: Path
    upcoming: Request
    status: PoolStatus = field(default_factory=PoolStatus)


@dataclass(frozen=True)
class Fault:
    """Something that breaks the gang.

    strike: does it, once `is_time`. breaks: how many gangs the run hears of as broken. spare_node: the
    gang is on a node of its own and there is room for it on another.
    """

    name: str
    strike: Callable[[Stage], None]
    is_time: Callable[[PoolStatus], bool] = lambda status: status.evaluations >= _WARM_EVALUATIONS
    breaks: int = 1
    gang_size: int = 1
    spare_node: bool = False
    rank: Callable[[Path], type[Rank]] = lambda file: Rank


def _signal_rank(number: int, rank: int = 0) -> Callable[[Stage], None]:
    return lambda stage: os.kill(stage.status.gangs[0].pids[rank], number)


def _is_loading(status: PoolStatus) -> bool:
    return status.gangs[0].state == "loading"


def _lose_node(stage: Stage) -> None:
    """Kill all processes of the node that the gang is on."""
    (gang,) = (group for group in placement_group_table().values() if group["state"] == "CREATED")
    node = next(one for one in stage.cluster.worker_nodes if one.node_id == gang["bundles_to_node_id"][0])
    stage.cluster.remove_node(node, allow_graceful=False)


def _kill_service(stage: Stage) -> None:
    os.kill(_pid(stage.pool.service), signal.SIGKILL)


def _pid(actor: ActorHandle) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))


def _spoil_a_genome(stage: Stage) -> None:
    stage.file.write_text(stage.upcoming.genome.digest)


def _unable(file: Path, misbehave: Callable[[int], None]) -> type[Rank]:
    """Ranks that misbehave at one genome; `misbehave` is told how often batches were halved."""

    class Unable(Rank):
        def begin(self, work: Work, halvings: int) -> Sequence[str]:
            self._halvings = halvings
            return super().begin(work, halvings)

        def evaluate(self, key: str, genomes: Sequence[Genome], split: str, *rivals: Any) -> list[Outcome]:
            if file.exists() and file.read_text() in {genome.digest for genome in genomes}:
                misbehave(self._halvings)
            return super().evaluate(key, genomes, split, *rivals)

    return Unable


def _run_out_of_memory(halvings: int) -> None:
    if halvings == 0:
        raise OutOfMemory("out of memory on cpu: lower evaluation.batch_tokens")


def _die(halvings: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS = (
    Fault("SIGKILL of a rank", _signal_rank(signal.SIGKILL)),
    Fault("SIGKILL of one of two ranks", _signal_rank(signal.SIGKILL, rank=1), gang_size=2),
    Fault("SIGKILL of a rank that loads", _signal_rank(signal.SIGKILL), is_time=_is_loading),
    Fault("SIGSTOP of a rank", _signal_rank(signal.SIGSTOP)),
    Fault("out of memory", _spoil_a_genome, rank=partial(_unable, misbehave=_run_out_of_memory)),
    Fault("genome that kills three gangs", _spoil_a_genome, breaks=3, rank=partial(_unable, misbehave=_die)),
    Fault("loss of a node", _lose_node, spare_node=True),
    Fault("SIGKILL of the service", _kill_service, breaks=0),
)


def measure(fault: Fault, cluster: Cluster, deadline_s: float) -> Seconds:
    """Break the gang, and follow the search until it goes on."""
    config = ScoringConfig(
        model=ModelConfig(self_check=False, sharding="single" if fault.gang_size == 1 else "tensor_parallel"),
        tasks=[TaskConfig(data="syll", num_search=16, num_validation=8, num_test=16)],
        evaluation=EvaluationConfig(threads=1),
        cluster=ClusterConfig(
            address="local",
            num_gangs=1,
            gang_size=fault.gang_size,
            max_batch=1,
            deadline_s=deadline_s,
            resources=_SLOT if fault.spare_node else None,
        ),
    )
    shape, data, began = ModelSource(config.model).shape, check_tasks(config.tasks), time.perf_counter()
    space = SearchSpace.build(shape, num_kept=4)
    seconds: Seconds = {}
    struck_at, num_broken = 0.0, 0
    with tempfile.TemporaryDirectory() as folder, _nodes(cluster, 2 if fault.spare_node else 0):
        file = Path(folder) / "genome"
        with ray_pool(config, data, shape, ModelSource(config.model).hash, fault.rank(file)) as pool:
            requests = _requests(space)
            stage = Stage(cluster, pool, file, next(requests))

            def hear(news: PoolNews) -> None:
                nonlocal struck_at, num_broken
                stage.status = news.status
                assert time.perf_counter() - began < _LIMIT_S, f"{fault.name}: no recovery, {news.status}"
                if struck_at:
                    now_s = time.perf_counter() - struck_at
                    for event in news.events:
                        num_broken += event.kind == "broken"
                        if event.kind == "broken":
                            seconds["broken"] = now_s
                        if event.kind == "ready" and num_broken >= fault.breaks:
                            seconds.setdefault("ready", now_s)
                elif news.status.gangs and fault.is_time(news.status):
                    struck_at = time.perf_counter()
                    fault.strike(stage)

            pool.listener = hear
            under_way = 0
            while "evaluated" not in seconds:
                for _ in range(2 - under_way):  # one in the gang, one behind it
                    pool.submit([stage.upcoming])
                    stage.upcoming = next(requests)
                outcomes = pool.next_outcomes()
                under_way = 2 - len(outcomes)
                if "ready" in seconds and any(isinstance(outcome, Evaluation) for _, outcome in outcomes):
                    seconds["evaluated"] = time.perf_counter() - struck_at
    assert num_broken == fault.breaks, f"{fault.name}: {num_broken} gangs broke, {fault.breaks} were to"
    return seconds


def measure_driver(cluster: Cluster) -> Seconds:
    """Kill the command itself, and give it again at once."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        options = {
            "folder": folder,
            "model.self_check": False,
            "tasks": "[{data: syll, num_search: 16, num_validation: 8, num_test: 16}]",
            "search.algorithm": "random",
            "search.evaluations": 100_000,
            "evaluation.threads": 1,
            "cluster.address": cluster.address,
            "cluster.num_gangs": 1,
            "cluster.max_batch": 1,
            "tracking.wandb": "disabled",
        }
        command = [sys.executable, "-m", "moe_evo", "search", *(f"--{key}={value}" for key, value in options.items())]
        with _running(command):
            _wait(lambda: _progress(folder)[0] >= _WARM_EVALUATIONS, "the run makes progress")
            struck_at = time.time()
        done = _progress(folder)[0]
        with _running(command):
            _wait(lambda: _progress(folder)[0] > done, "the run goes on")
            evaluated_s = time.time() - struck_at
        return {"ready": _progress(folder)[1] - struck_at, "evaluated": evaluated_s}


@contextmanager
def _running(command: Sequence[str]) -> Iterator[None]:
    """A process that is killed when the block is left."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def _progress(folder: Path) -> tuple[int, float]:
    """Evaluations of a run that are done, and when a gang of it was last ready; zeros before there is a journal."""
    with suppress(JournalError), Journal(folder / "journal.sqlite", read_only=True) as journal:
        ready = [at for at, _, kind, _ in journal.gang_events() if kind == "ready"]
        return len(journal.outcomes(MAIN, "search")), max(ready, default=0.0)
    return 0, 0.0


@contextmanager
def _nodes(cluster: Cluster, number: int) -> Iterator[None]:
    """So many nodes beside the head until the block is left, with room for a gang each."""
    for _ in range(number):
        cluster.add_node(num_cpus=1, resources=_SLOT)
    try:
        yield
    finally:
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)


def _wait(until: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not until():
        assert time.monotonic() < deadline, f"after {_LIMIT_S:.0f} s it is still not true that {what}"
        time.sleep(0.05)


def _requests(space: SearchSpace) -> Iterator[Request]:
    """Random prunings, without end."""
    for number in itertools.count():
        yield Request("recovery", number, random_pruning(space, np.random.default_rng([0, number])), "search")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deadline_s", type=float, default=2.0, help="after which a silent rank counts as hung")
    options = parser.parse_args()
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": _NUM_CPUS, "include_dashboard": False})
    ray.init(cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    measures: dict[str, Callable[[], Seconds]] = {
        fault.name: partial(measure, fault, cluster, options.deadline_s) for fault in FAULTS
    }
    measures["SIGKILL of the driver, which is started again"] = partial(measure_driver, cluster)
    found: dict[str, dict[str, list[float]]] = {name: {column: [] for column in COLUMNS} for name in measures}
    try:
        for _, (name, one) in itertools.product(range(options.repeats), measures.items()):
            for column, seconds in one().items():
                found[name][column].append(seconds)
            _wait(lambda: ray.available_resources().get("CPU", 0.0) >= _NUM_CPUS, "all room is given back")
    finally:
        ray.shutdown()
        cluster.shutdown()
    table = Table("fault", *(f"{column}, s" for column in COLUMNS), title=f"median (range) of {options.repeats}")
    for name, columns in found.items():
        table.add_row(name, *(_cell(columns[column]) for column in COLUMNS))
    Console().print(table)
    print_figures("recovery", {"deadline_s": options.deadline_s, "seconds": found})


def _cell(seconds: Sequence[float]) -> str:
    return f"{np.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})" if seconds else ""


if __name__ == "__main__":
    main()
