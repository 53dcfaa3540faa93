"""Runs of requests through a pool, with faults on the way, and what must be true of them afterwards.

Whatever waits here has a limit, so that a defect fails a test and never hangs it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from stand_ins import StandIn, outcome_of

from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.pool import Pool, PoolEvent, PoolNews, PoolStatus, Request
from moe_evo.gangs.rank import Rank
from moe_evo.gangs.ray_pool import RayPool, ray_pool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.population import Outcome
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.source import ModelSource
from moe_evo.tasks.data import check_tasks

TASK = TaskConfig(data="syll", num_search=16, num_validation=8, num_test=16)
MODEL = ModelConfig(self_check=False)
LIMIT_S = 150.0


def genomes(number: int, seed: int = 0) -> list[Genome]:
    """Prunings of the embedded model, which all differ."""
    space = SearchSpace.build(ModelSource(MODEL).shape, num_kept=4)
    found = [random_pruning(space, np.random.default_rng([seed, n])) for n in range(number)]
    assert len({one.digest for one in found}) == number
    return found


def requests(number: int, seed: int = 0, split: str = "search") -> list[Request]:
    return [Request("search", n, genome, split) for n, genome in enumerate(genomes(number, seed))]


@contextmanager
def gangs(
    rank: type[Rank] = StandIn,
    *,
    model: ModelConfig = MODEL,
    task: TaskConfig = TASK,
    tokens: Mapping[str, str] | None = None,
    **cluster: Any,
) -> Iterator[RayPool]:
    """A pool of gangs of `rank` on the cluster that this process is connected to."""
    config = ScoringConfig(model=model, tasks=[task], cluster=ClusterConfig(**{"address": "local", **cluster}))
    known_as = ModelSource(model).hash if rank is Rank else "no model"
    with ray_pool(
        config, check_tasks(config.tasks), ModelSource(model).shape, known_as, rank, tokens=tokens or {}
    ) as pool:
        yield pool


@dataclass
class Progress:
    """How far a run of requests has come."""

    outcomes: dict[tuple[int, str], Outcome] = field(default_factory=dict)
    events: list[PoolEvent] = field(default_factory=list)
    status: PoolStatus = field(default_factory=PoolStatus)

    @property
    def done(self) -> int:
        return len(self.outcomes)

    def kinds(self) -> list[str]:
        """Of the events, without waits: a busy machine frees what a dead gang held late."""
        return [event.kind for event in self.events if event.kind != "waiting"]

    def pids(self, gang: int = 0) -> tuple[int, ...]:
        return self.status.gangs[gang].pids


React = Callable[[Progress], None]


def complete(pool: Pool, wanted: Sequence[Request], react: React = lambda progress: None) -> Progress:
    """Put all requests through a pool; each is answered exactly once. `react` is called again and again."""
    progress, todo, deadline = Progress(), list(wanted), time.monotonic() + LIMIT_S

    def hear(news: PoolNews) -> None:
        assert time.monotonic() < deadline, f"{progress.done} of {len(wanted)} are done: {news.status}"
        progress.status = news.status
        progress.events += news.events
        react(progress)

    pool.listener = hear
    while progress.done < len(wanted):
        slots = pool.free_slots
        pool.submit(todo[:slots])
        del todo[:slots]
        for request, outcome in pool.next_outcomes():
            key = (request.number, request.split)
            assert key not in progress.outcomes, f"{key} was answered twice"
            progress.outcomes[key] = outcome
        react(progress)
    assert progress.outcomes.keys() == {(one.number, one.split) for one in wanted}
    return progress


def assert_scores(progress: Progress, wanted: Sequence[Request], *, but: Sequence[int] = ()) -> None:
    """All outcomes are what stand-ins say of the genomes, but for the requests of these numbers."""
    for one in wanted:
        if one.number not in but:
            assert progress.outcomes[one.number, one.split] == outcome_of(one.genome, one.split)


class Once:
    """`act`, the first time that `when` holds."""

    def __init__(self, when: Callable[[Progress], bool], act: React) -> None:
        self._when, self._act = when, act
        self.happened = False

    def __call__(self, progress: Progress) -> None:
        if not self.happened and self._when(progress):
            self.happened = True
            self._act(progress)


def wait_until(true: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"after {limit_s:.0f} s it is still not true that {what}"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, if only as a zombie that its parent has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def service_pid(pool: RayPool) -> int:
    """Process of the service's actor."""
    return int(ray.get(pool.service.__ray_call__.remote(lambda service: os.getpid()), timeout=20.0))
