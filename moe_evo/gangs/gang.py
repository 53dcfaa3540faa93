"""`Gang`: one placement group with an actor for each rank. They are built, called and killed together.

Ranks run every request in lockstep, so a rank that dies or hangs blocks the others. A broken gang is never repaired;
it is killed and built anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError, MoeEvoError, OutOfMemory, RowOutOfMemory
from moe_evo.gangs.capacity import ranks_on_a_device
from moe_evo.gangs.dispatcher import Answer, Batch
from moe_evo.gangs.rank import Rank, Work
from moe_evo.gangs.ray_border import ActorHandle, ray

_GRACE_S = 2.0  # one broken rank breaks the others; wait so long for all errors, to find the first
_REASON_LENGTH = 300
_PROGRESS_S = 5.0
_NODE_ANSWERS_S = 5.0
_NODE_CHECKS = 4


@dataclass(frozen=True)
class Patience:
    """When a request that is not answered counts as hung.

    deadline_s: so long after it was sent. silence_s: after so long without any progress of the ranks.
    """

    deadline_s: float | None = None
    silence_s: float | None = None


class GangBroken(Exception):
    """A gang is broken and must be killed.

    cause: the error of the rank that broke it, if it raised one. lost_node: whether a node of the gang went away, which
    says nothing of what it was computing.
    """

    def __init__(self, reason: str, cause: BaseException | None = None, *, lost_node: bool = False) -> None:
        super().__init__(" ".join(reason.split())[:_REASON_LENGTH])
        self.cause = cause
        self.lost_node = lost_node

    @property
    def out_of_memory(self) -> bool:
        """Whether smaller batches may help; Ray ends ranks when the memory of their node is nearly full."""
        return isinstance(self.cause, OutOfMemory | OutOfMemoryError) and not isinstance(self.cause, RowOutOfMemory)

    @property
    def permanent(self) -> MoeEvoError | None:
        """The error with which every other gang would fail, too, as the input is wrong; None where another may not."""
        return self.cause if isinstance(self.cause, MoeEvoError) and not self.out_of_memory else None


class Gang:
    """Ranks that hold one model together. Whoever builds one must `kill` it in the end.

    name: of its placement group, see `remove_groups`. size: number of ranks. bundle: Ray resources of one
    rank. rank: the class whose methods a rank offers. halvings: how often batch sizes were halved
    before it was built, because memory ran out.
    """

    def __init__(
        self, name: str, size: int, bundle: dict[str, float], cluster: ClusterConfig, *, halvings: int, rank: type[Rank]
    ) -> None:
        self._load_timeout_s = cluster.load_timeout_s
        self._bundle, self._num_gangs = bundle, cluster.num_gangs
        self._begun: set[str] = set()
        self.halvings = halvings
        labels = [dict(cluster.labels)] * size if cluster.labels else None
        actor = ray.remote(concurrency_groups={"watch": 1, "progress": 1})(rank)
        self._group: Any = None
        try:
            self._group = placement_group(
                [bundle] * size, strategy=cluster.strategy, name=name, bundle_label_selector=labels
            )
            self._ranks: list[ActorHandle] = [
                actor.options(
                    **_options(bundle),
                    max_restarts=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        self._group, placement_group_bundle_index=index
                    ),
                ).remote(index, size)
                for index in range(size)
            ]
        except (ValueError, TypeError) as error:
            if self._group is not None:
                remove_placement_group(self._group)
            raise ConfigError(f"cluster.resources or cluster.labels: Ray refuses them ({error})") from error
        self.died: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def placed(self) -> tuple[int, ...]:
        """Wait for free resources on the cluster; returns the ranks' process ids."""
        pids = await self._all("pid", timeout_s=None)
        self.died = asyncio.ensure_future(self._all("watch", timeout_s=None, group="watch"))
        return tuple(pids)

    async def load(self, model: ModelConfig, model_hash: str, report: Callable[[str], None]) -> None:
        """Load the model on all ranks; `report` must be picklable."""
        timeout_s = self._load_timeout_s
        await self._all("share_memory", self._num_sharing(), timeout_s=timeout_s)
        where = (self.node, (await self._all("free_port", timeout_s=timeout_s))[0])
        await self._all("load", model, model_hash, where, timeout_s, report, timeout_s=timeout_s)

    @property
    def node(self) -> str:
        """Address of the node of rank 0."""
        bundles = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return str(addresses.get(bundles[0], "unknown"))

    def _num_sharing(self) -> int:
        """How many ranks may share a node's memory, or a GPU's."""
        own = set(placement_group_table(self._group)["bundles_to_node_id"].values())
        nodes = [node["Resources"] for node in ray.nodes() if node["NodeID"] in own and node["Alive"]]
        return ranks_on_a_device(nodes, self._bundle, len(self._ranks), self._num_gangs) if nodes else 1

    async def begin(self, work: Work) -> Sequence[str]:
        """Prepare all ranks for batches of `work`; returns notes for the user, the first time."""
        if work.key in self._begun:
            return ()
        notes = await self._all("begin", work, self.halvings, timeout_s=self._load_timeout_s)
        self._begun.add(work.key)
        return tuple(dict.fromkeys(note for of_rank in notes for note in of_rank))

    async def forget_but(self, works: Set[str]) -> None:
        """Let the ranks drop what they hold for all works but these."""
        ended = self._begun - works
        if ended:
            await self._all("forget", sorted(ended), timeout_s=self._load_timeout_s)
            self._begun -= ended

    async def run(self, batch: Batch, work: Work, patience: Patience) -> Sequence[Answer]:
        """Evaluate a batch on all ranks in lockstep; returns one result a job. Call `begin` before."""
        question = batch[0].question
        if question is not None:
            return [(await self._answers("ask", (work.key, question), patience))[0]]
        arguments = (work.key, [job.genome for job in batch], batch[0].split, [job.rival for job in batch])
        answers: Sequence[Answer] = (await self._answers("evaluate", arguments, patience))[0]
        return answers

    def kill(self) -> None:
        """End all ranks and free their resources."""
        self.died.cancel()
        for rank in self._ranks:
            ray.kill(rank)
        remove_placement_group(self._group)

    async def _all(self, method: str, *arguments: Any, timeout_s: float | None, group: str | None = None) -> list[Any]:
        """Call one method of all ranks; raises GangBroken at the first that fails, or after the time."""
        return await self._answers(method, arguments, Patience(deadline_s=timeout_s), group)

    async def _answers(
        self, method: str, arguments: Sequence[Any], patience: Patience, group: str | None = None
    ) -> list[Any]:
        tasks = self._call(method, arguments, group)
        try:
            pending = await self._wait(tasks, patience)
            failed = [task for task in tasks if task.done() and task.exception()]
            if failed:
                if pending:
                    await asyncio.wait(pending, timeout=_GRACE_S)
                raise await self._broken([(rank, _error(task)) for rank, task in enumerate(tasks) if task.done()])
            if pending:
                silent = ", ".join(str(rank) for rank, task in enumerate(tasks) if task in pending)
                if patience.silence_s is None:
                    raise GangBroken(f"no answer of rank {silent} to {method} within {patience.deadline_s:.0f} s")
                raise GangBroken(f"no progress of rank {silent} in {method} for {patience.silence_s:.0f} s")
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    def _call(self, method: str, arguments: Sequence[Any], group: str | None) -> list[asyncio.Future[Any]]:
        calls = [getattr(rank, method) for rank in self._ranks]
        if group is not None:
            calls = [call.options(concurrency_group=group) for call in calls]
        return [asyncio.ensure_future(_answer(call.remote(*arguments))) for call in calls]

    async def _wait(self, tasks: Sequence[asyncio.Future[Any]], patience: Patience) -> set[asyncio.Future[Any]]:
        """Wait until all tasks are done, one has failed, or patience is over; returns those that are not done."""
        silence_s = patience.silence_s
        if silence_s is None:
            _, pending = await asyncio.wait(tasks, timeout=patience.deadline_s, return_when=asyncio.FIRST_EXCEPTION)
            return pending
        progress: dict[int, int] = {}
        moved_at = time.monotonic()
        while time.monotonic() - moved_at < silence_s:
            pause_s = min(_PROGRESS_S, silence_s / 4)
            done, pending = await asyncio.wait(tasks, timeout=pause_s, return_when=asyncio.FIRST_EXCEPTION)
            if not pending or any(task.exception() for task in done):
                return pending
            before = dict(progress)
            progress |= await self._progress(pause_s)
            if progress != before:
                moved_at = time.monotonic()
        return pending

    async def _progress(self, within_s: float) -> dict[int, int]:
        """How far each rank has come, by rank; those that do not answer in time are left out."""
        tasks = self._call("progress", (), "progress")
        await asyncio.wait(tasks, timeout=within_s)
        found = {rank: task.result() for rank, task in enumerate(tasks) if task.done() and not task.exception()}
        for task in tasks:
            task.cancel()
        return found

    async def _broken(self, errors: Sequence[tuple[int, BaseException | None]]) -> GangBroken:
        """The error that broke the gang; a rank's own is preferred to the lost connections that follow from it."""
        found = [(rank, _cause(error)) for rank, error in errors if error is not None]
        rank, cause = min(found, key=lambda one: _distance(one[1]))
        if isinstance(cause, OutOfMemoryError):
            return GangBroken(f"rank {rank} was ended, as its node ran out of memory ({_first_sentence(cause)})", cause)
        if not isinstance(cause, RayActorError):
            return GangBroken(f"rank {rank}: {type(cause).__name__}: {cause}", cause)
        if not cause.actor_init_failed and (lost := await self._lost_node()):
            return GangBroken(f"node {lost} was lost", cause, lost_node=True)
        return GangBroken(f"rank {rank} died ({_first_sentence(cause)})", cause, lost_node=cause.preempted)

    async def _lost_node(self) -> str | None:
        """The address of a node of this gang that went away, if there is one.

        Ray itself learns of a lost node half a minute later, so its nodes are asked whether they still answer; for a
        while, as the ranks of a node that is shut down end before the rest of it does.
        """
        own = set(placement_group_table(self._group)["bundles_to_node_id"].values())
        for _ in range(_NODE_CHECKS):
            for node in ray.nodes():
                if node["NodeID"] in own and not (node["Alive"] and await _answers_at(node)):
                    return str(node["NodeManagerAddress"])
            await asyncio.sleep(_GRACE_S / _NODE_CHECKS)
        return None


def remove_groups(prefix: str) -> None:
    """Free the placement groups of all gangs whose names begin so.

    Ray ends the ranks of a service that died, but keeps their placement groups until the whole job ends.
    """
    for group in placement_group_table().values():
        if group["name"].startswith(prefix) and group["state"] != "REMOVED":
            with suppress(ValueError):  # it has just gone
                remove_placement_group(get_placement_group(group["name"]))


async def _answer(reference: Awaitable[Any]) -> Any:
    return await reference


def _options(bundle: dict[str, float]) -> dict[str, Any]:
    """Ray's actor options for these resources."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    custom = {name: amount for name, amount in bundle.items() if name not in named}
    options: dict[str, Any] = {"num_cpus": 0, "resources": custom}
    return options | {named[name]: amount for name, amount in bundle.items() if name in named}


async def _answers_at(node: Mapping[str, Any]) -> bool:
    """Whether Ray's process on a node takes connections."""
    try:
        async with asyncio.timeout(_NODE_ANSWERS_S):
            _, writer = await asyncio.open_connection(node["NodeManagerAddress"], node["NodeManagerPort"])
    except OSError:  # a TimeoutError is one
        return False
    writer.close()
    return True


def _error(task: asyncio.Future[Any]) -> BaseException | None:
    return None if task.cancelled() else task.exception()


def _cause(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


def _distance(error: BaseException) -> int:
    """How far an error is from the first cause; the smallest is told."""
    if isinstance(error, OutOfMemory | OutOfMemoryError):
        return 0
    if isinstance(error, RayError):
        return 1
    return 2 if isinstance(error, MoeEvoError) else 3


def _first_sentence(error: BaseException) -> str:
    """Ray tells a page about a dead actor; its cause is in the line that begins so, or in the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "raised in its creation task" in lines[0]:
        return lines[-1]
    told = [line for line in lines if line.startswith(("The actor", "The process", "Worker unexpectedly"))]
    return (told or lines or [type(error).__name__])[-1].split(". ")[0].rstrip(".")
