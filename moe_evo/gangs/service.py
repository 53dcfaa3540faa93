"""`GangService`: builds gangs, sends them jobs, replaces broken ones, and returns results to the runs.

An asynchronous Ray actor with one coroutine a gang. It keeps nothing that must last: each run has its own journal and
submits again what a lost service had not finished.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from moe_evo.errors import ClusterError, MoeEvoError, TaskError
from moe_evo.evaluation.pool import GangStatus, PoolEvent, PoolNews, PoolStatus
from moe_evo.gangs.dispatcher import Answer, Batch, Dispatcher, Job
from moe_evo.gangs.gang import Gang, GangBroken, Patience
from moe_evo.gangs.metrics import PoolMetrics
from moe_evo.gangs.rank import Work
from moe_evo.gangs.ray_border import ActorHandle, free_in_words, ray
from moe_evo.gangs.service_spec import News, ServiceSpec

_TICK_S = 1.0
_PATIENCE_S = 10.0  # how long a gang waits for resources before the run is told about it
_SHORTEST_SILENCE_S = 60.0
_SILENCE_FACTOR = 20
_MOST_HALVINGS = 10
_LONGEST_PAUSE_S = 60.0


@dataclass
class _Listener:
    """A run that asks for news. work: the key of its work."""

    asked_at: float
    work: str
    events: list[PoolEvent] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class GangService:
    """Gangs for one model. A run calls `join`, then `exchange` to send jobs and get results, then `leave`."""

    def __init__(self, spec: ServiceSpec) -> None:
        cluster = spec.cluster
        self._spec = spec
        self._dispatcher = Dispatcher(cluster.max_batch, cluster.max_attempts)
        self._listeners: dict[str, _Listener] = {}
        self._works: dict[str, Work] = {}
        self._wanted_at: dict[str, float] = {}
        self._notes: dict[str, PoolEvent] = {}
        self._gangs: dict[int, GangStatus] = {}
        self._coroutines: dict[int, asyncio.Task[None]] = {}
        self._idle: dict[int, asyncio.Future[Batch]] = {}
        self._next_number = 0
        self._halvings = 0
        self._restarts = 0
        self._failed_loads = 0
        self._was_ready = False
        self._fatal: Exception | None = None
        self._left_at = time.monotonic()
        self._metrics = PoolMetrics(cluster.service or "private")
        self._supervisor: asyncio.Task[None] | None = None

    async def spec(self) -> ServiceSpec:
        return self._spec

    async def join(self, run: str, work: Work) -> None:
        """Make a run known; harmless where it is."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise())
            self._supervisor.add_done_callback(self._end_at_defects)
        if self._fatal is not None and not self._listeners:  # the next run may come after the fault was mended
            self._fatal, self._failed_loads = None, 0
        self._listeners.setdefault(run, _Listener(time.monotonic(), work.key, list(self._notes.values())))
        self._works[work.key] = work
        self._wanted_at[work.key] = time.monotonic()
        self._dispatcher.join(run)

    async def leave(self, run: str) -> None:
        self._listeners.pop(run, None)
        self._dispatcher.leave(run)
        self._left_at = time.monotonic()

    async def exchange(self, run: str, jobs: Sequence[tuple[int, Job]], timeout_s: float) -> News:
        """Take jobs, wait until there is news or the time is over, and return the news."""
        listener = self._listeners.get(run)
        if listener is None:
            return News(known=False)
        listener.asked_at = time.monotonic()
        if jobs:
            self._dispatcher.submit(run, jobs)
            self._grow()
            self._assign()
        if not (self._dispatcher.has_answers(run) or listener.events or self._fatal):
            listener.wake.clear()
            with suppress(TimeoutError):  # the status is news too
                await asyncio.wait_for(listener.wake.wait(), timeout_s)
        if run not in self._listeners:
            return News(known=False)
        listener.asked_at = time.monotonic()
        events, listener.events = listener.events, []
        return News(
            answers=self._dispatcher.answers(run),
            slots=self._dispatcher.slots(max(len(self._gangs), 1)),
            pool=PoolNews(self._status(), tuple(events)),
            fatal=self._fatal,
        )

    async def report(self, gang: int, text: str) -> None:
        """A rank tells how far it has loaded."""
        if gang in self._gangs and self._gangs[gang].state == "loading":
            self._update(gang, progress=text)

    async def _supervise(self) -> None:
        """Once a second: forget runs that are gone, see whether another gang is wanted, publish the numbers."""
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for run in [name for name, one in self._listeners.items() if now - one.asked_at > self._spec.lease_s]:
                await self.leave(run)
            is_shared = self._spec.cluster.service is not None
            if is_shared and not self._listeners and now - self._left_at > self._spec.cluster.idle_release_s:
                ray.kill(ray.get_runtime_context().current_actor)
            self._drop_ended_works(now)
            self._grow()
            self._metrics.tell(self._status())

    def _drop_ended_works(self, now: float) -> None:
        """Forget the data and results of runs that ended, unless another one with the same tasks follows soon."""
        for key in self._dispatcher.works.union(one.work for one in self._listeners.values()):
            self._wanted_at[key] = now
        for key in [key for key, at in self._wanted_at.items() if now - at > self._spec.cluster.idle_release_s]:
            del self._wanted_at[key], self._works[key]
            self._dispatcher.forget(key)

    def _grow(self) -> None:
        """Start the gangs that are wanted and not there."""
        if self._fatal is not None or not self._listeners:
            return
        wanted = self._spec.cluster.num_gangs
        while len(self._gangs) < wanted if wanted != "auto" else self._wants_one_more():
            number = self._next_number
            self._next_number += 1
            self._gangs[number] = GangStatus(number)
            self._coroutines[number] = asyncio.create_task(self._live(number))
            self._coroutines[number].add_done_callback(self._end_at_defects)

    def _end_at_defects(self, coroutine: asyncio.Task[None]) -> None:
        """Tell the runs about an unexpected error in a gang's coroutine: otherwise they would wait for ever."""
        if not coroutine.cancelled() and (error := coroutine.exception()) is not None:
            failed = RuntimeError(f"the service failed: {type(error).__name__}: {error}")
            self._fatal = error if isinstance(error, MoeEvoError) else failed
            self._wake()

    def _wants_one_more(self) -> bool:
        """Whether to build another gang: none waits for resources, and more jobs wait than loading gangs take."""
        states = [gang.state for gang in self._gangs.values()]
        to_come = states.count("loading") * self._dispatcher.batch_size
        return "waiting" not in states and self._dispatcher.waiting > to_come

    async def _live(self, number: int) -> None:
        """The life of one gang, built anew whenever it breaks, until nobody needs it."""
        try:
            while self._fatal is None:
                gang = self._build()
                try:
                    if not await self._is_ready(gang, number):
                        return
                    await self._serve(gang, number)
                    self._tell(number, "released", f"idle for {self._spec.cluster.idle_release_s:.0f} s")
                    return
                except GangBroken as broken:
                    self._note(number, broken)
                finally:
                    gang.kill()
                await asyncio.sleep(self._pause_s())
        finally:
            del self._gangs[number], self._coroutines[number]

    def _build(self) -> Gang:
        spec = self._spec
        name = f"{spec.name} {uuid.uuid4().hex}"
        return Gang(name, spec.ranks, spec.bundle, spec.cluster, halvings=self._halvings, rank=spec.rank)

    async def _is_ready(self, gang: Gang, number: int) -> bool:
        """Place a gang and load its model; False once nobody needs it any more."""
        try:
            if not await self._is_placed(gang, number):
                return False
            await self._load(gang, number)
        except GangBroken:
            self._failed_loads += 1
            raise
        self._failed_loads, self._was_ready = 0, True
        return True

    async def _is_placed(self, gang: Gang, number: int) -> bool:
        """Wait for free resources on the cluster; False once nobody needs the gang any more."""
        self._update(number, state="waiting", node="", pids=(), progress="")
        placed = asyncio.ensure_future(gang.placed())
        try:
            if not (await asyncio.wait({placed}, timeout=_PATIENCE_S))[0]:
                self._tell(number, "waiting", f"needs {self._spec.needs}; the cluster has free: {free_in_words()}")
            limit_s = self._spec.cluster.idle_release_s
            while not (await asyncio.wait({placed}, timeout=limit_s))[0]:
                if self._spec.cluster.num_gangs == "auto" and not self._dispatcher.waiting:
                    return False
            self._update(number, pids=placed.result(), node=gang.node)
            self._tell(number, "placed", f"on {self._gangs[number].node}")
            return True
        finally:
            placed.cancel()

    async def _load(self, gang: Gang, number: int) -> None:
        self._update(number, state="loading")
        started = time.monotonic()
        report = _Report(ray.get_runtime_context().current_actor, number)
        await gang.load(self._spec.model, self._spec.model_hash, report)
        self._update(number, state="ready", progress="")
        self._tell(number, "ready", f"the model is loaded after {time.monotonic() - started:.1f} s")

    async def _serve(self, gang: Gang, number: int) -> None:
        """Evaluate batches until the gang has been idle for too long."""
        can_end = self._spec.cluster.num_gangs == "auto"
        idle_s = self._spec.cluster.idle_release_s if can_end else None
        while True:
            batch = await self._next_batch(gang, number, idle_s)
            if not batch:
                return
            self._update(number, state="busy")
            started = time.monotonic()
            try:
                await gang.forget_but(self._works.keys())
                work = self._works[batch[0].work]
                self._take_notes(number, await gang.begin(work))
                answers = await gang.run(batch, work, self._patience(batch))
            except GangBroken as broken:
                self._give_back(gang, number, batch, broken)
                raise
            self._finish(number, batch, answers, time.monotonic() - started)

    async def _next_batch(self, gang: Gang, number: int, idle_s: float | None) -> Batch:
        """Wait for work; () after `idle_s` without. Raises GangBroken where a rank dies meanwhile."""
        future: asyncio.Future[Batch] = asyncio.get_running_loop().create_future()
        self._idle[number] = future
        self._assign()
        try:
            await asyncio.wait({future, gang.died}, timeout=idle_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._idle.pop(number, None)
        if gang.died.done():
            if future.done():
                self._dispatcher.give_back(future.result(), "", blame=False)
                self._assign()
            await gang.died  # raises the error that ended it
        return future.result() if future.done() else ()

    def _assign(self) -> None:
        """Batches for idle gangs, as long as there are both."""
        num_serving = sum(gang.state in ("ready", "busy") for gang in self._gangs.values())
        while self._idle:
            batch = self._dispatcher.take(num_serving)
            if not batch:
                return
            self._idle.popitem()[1].set_result(
                batch
            )  # the gang that became idle last, so that the others stay idle and are released

    def _finish(self, number: int, batch: Batch, answers: Sequence[Answer], duration_s: float) -> None:
        self._dispatcher.finish(batch, answers, duration_s)
        status = self._gangs[number]
        each_s = duration_s / len(batch)
        before = status.evaluations_per_s or 1 / max(each_s, 1e-9)
        rate = 0.8 * before + 0.2 / max(each_s, 1e-9)
        done = status.evaluations + len(batch)
        self._update(number, state="ready", evaluations=done, evaluations_per_s=rate)
        self._wake()

    def _give_back(self, gang: Gang, number: int, batch: Batch, broken: GangBroken) -> None:
        """Put the batch of a broken gang back into the queue, or give up a genome that breaks every gang."""
        if isinstance(broken.permanent, TaskError):  # no other gang would read the tasks either
            self._fatal = broken.permanent
        shortens = broken.out_of_memory and gang.halvings < _MOST_HALVINGS
        if shortens and gang.halvings == self._halvings:
            self._halvings += 1
            self._tell(number, "batch_halved", f"out of memory: batches are 1/{2**self._halvings} as large from now on")
        is_innocent = shortens or broken.lost_node
        for job in self._dispatcher.give_back(batch, str(broken), blame=not is_innocent):
            self._tell(number, "quarantined", f"{job.name}: {broken}")
        self._assign()
        self._wake()

    def _note(self, number: int, broken: GangBroken) -> None:
        """A gang broke: tell it, and end everything where no gang can ever serve."""
        self._restarts += 1
        self._update(number, state="waiting", restarts=self._gangs[number].restarts + 1)
        self._tell(number, "broken", str(broken))
        limit = self._spec.cluster.max_attempts * (10 if self._was_ready else 1)
        # a rank whose neighbour was killed may say that the model cannot be loaded, but not twice in a row
        is_sure = self._failed_loads >= min(self._spec.ranks, 2)
        if is_sure and broken.permanent is not None:
            self._fatal = broken.permanent
        elif self._failed_loads >= limit:
            self._fatal = ClusterError(
                f"no gang can load {self._spec.model.path}: {self._failed_loads} failures in a row, the last: {broken}"
            )
        self._wake()

    def _pause_s(self) -> float:
        """Longer and longer while gangs fail to load, none while they serve."""
        return min(2.0 ** (self._failed_loads - 1), _LONGEST_PAUSE_S) if self._failed_loads else 0.0

    def _patience(self, batch: Batch) -> Patience:
        """How long a gang may take: a deadline where the config has one, else any time, as long as it makes progress.

        How long a request takes, nobody can know before the first of its kind: answers to thousands of examples are
        generated for hours, and labels scored in seconds.
        """
        deadline_s = self._spec.cluster.deadline_s
        if deadline_s is not None:
            return Patience(deadline_s=deadline_s * len(batch))
        longest_s, most_s = self._dispatcher.longest_s(batch), self._spec.longest_silence_s
        grown_s = most_s if longest_s is None else max(_SILENCE_FACTOR * longest_s, _SHORTEST_SILENCE_S)
        return Patience(silence_s=min(grown_s, most_s))

    def _status(self) -> PoolStatus:
        dispatcher = self._dispatcher
        return PoolStatus(
            gangs=tuple(self._gangs[number] for number in sorted(self._gangs)),
            waiting=dispatcher.waiting,
            under_way=dispatcher.under_way,
            evaluations=dispatcher.evaluations,
            failures=dispatcher.failures,
            restarts=self._restarts,
            runs=len(self._listeners),
        )

    def _update(self, number: int, **changes: Any) -> None:
        self._gangs[number] = replace(self._gangs[number], **changes)

    def _take_notes(self, number: int, notes: Sequence[str]) -> None:
        """Tell each note of a gang once to every run, to those that join later as well."""
        for note in notes:
            if note not in self._notes:
                self._notes[note] = self._tell(number, "note", note)

    def _tell(self, number: int, kind: Any, detail: str) -> PoolEvent:
        event = PoolEvent(time.time(), number, kind, detail)
        for listener in self._listeners.values():
            listener.events.append(event)
        self._wake()
        return event

    def _wake(self) -> None:
        """Wake the calls of `exchange` of runs for which there is news."""
        for run, listener in self._listeners.items():
            if listener.events or self._fatal or self._dispatcher.has_answers(run):
                listener.wake.set()


class _Report:
    """A callback that ranks get: it sends their reports to the service."""

    def __init__(self, service: ActorHandle, gang: int) -> None:
        self._service, self._gang = service, gang

    def __call__(self, text: str) -> None:
        self._service.report.remote(self._gang, text)
