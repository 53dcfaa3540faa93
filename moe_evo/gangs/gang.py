"""`Gang`: one placement group with an actor for each rank. They are built, called and killed together.

Ranks run every request in lockstep, so a rank that dies or hangs blocks the others. A broken gang is never repaired;
it is killed and built anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
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
from moe_evo.gangs.dispatcher import Answer, Batch
from moe_evo.gangs.rank import Rank, Work
from moe_evo.gangs.ray_border import ActorHandle, ray

_GRACE_S = 2.0  # one broken rank breaks the others; wait so long for all errors, to find the first
_REASON_LENGTH = 300


class GangBroken(Exception):
    """A gang is broken and must be killed; `cause`: the error of the rank that broke it, if it raised one."""

    def __init__(self, reason: str, cause: BaseException | None = None) -> None:
        super().__init__(" ".join(reason.split())[:_REASON_LENGTH])
        self.cause = cause

    @property
    def out_of_memory(self) -> bool:
        return isinstance(self.cause, OutOfMemory) and not isinstance(self.cause, RowOutOfMemory)

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
        self._begun: set[str] = set()
        self.halvings = halvings
        labels = [dict(cluster.labels)] * size if cluster.labels else None
        actor = ray.remote(concurrency_groups={"watch": 1})(rank)
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
        where = (self.node, (await self._all("free_port", timeout_s=timeout_s))[0])
        await self._all("load", model, model_hash, where, timeout_s, report, timeout_s=timeout_s)

    @property
    def node(self) -> str:
        """Address of the node of rank 0."""
        bundles = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return str(addresses.get(bundles[0], "unknown"))

    async def begin(self, work: Work) -> Sequence[str]:
        """Prepare all ranks for batches of `work`; returns notes for the user, the first time."""
        if work.key in self._begun:
            return ()
        notes = await self._all("begin", work, self.halvings, timeout_s=self._load_timeout_s)
        self._begun.add(work.key)
        return tuple(dict.fromkeys(note for of_rank in notes for note in of_rank))

    async def run(self, batch: Batch, work: Work, deadline_s: float) -> Sequence[Answer]:
        """Evaluate a batch on all ranks in lockstep; returns one result a job. Call `begin` before."""
        question = batch[0].question
        if question is not None:
            return [(await self._all("ask", work.key, question, timeout_s=deadline_s))[0]]
        arguments = (work.key, [job.genome for job in batch], batch[0].split, [job.rival for job in batch])
        answers: Sequence[Answer] = (await self._all("evaluate", *arguments, timeout_s=deadline_s))[0]
        return answers

    def kill(self) -> None:
        """End all ranks and free their resources."""
        self.died.cancel()
        for rank in self._ranks:
            ray.kill(rank)
        remove_placement_group(self._group)

    async def _all(self, method: str, *arguments: Any, timeout_s: float | None, group: str | None = None) -> list[Any]:
        """Call one method of all ranks; raises GangBroken at the first that fails, or after the time."""
        calls = [getattr(rank, method) for rank in self._ranks]
        if group is not None:
            calls = [call.options(concurrency_group=group) for call in calls]
        tasks = [asyncio.ensure_future(_answer(call.remote(*arguments))) for call in calls]
        try:
            done, pending = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.exception() for task in done):
                more, _ = await asyncio.wait(pending, timeout=_GRACE_S) if pending else (set(), None)
                raise _broken([(rank, task.exception()) for rank, task in enumerate(tasks) if task in done | more])
            if pending:
                silent = ", ".join(str(rank) for rank, task in enumerate(tasks) if task in pending)
                raise GangBroken(f"no answer of rank {silent} to {method} within {timeout_s:.0f} s")
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()


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


def _broken(errors: Sequence[tuple[int, BaseException | None]]) -> GangBroken:
    """The error that broke the gang; a rank's own error is preferred to the lost connections that follow from it."""
    found = [(rank, _cause(error)) for rank, error in errors if error is not None]
    rank, cause = min(found, key=lambda one: _distance(one[1]))
    if isinstance(cause, RayActorError):
        return GangBroken(f"rank {rank} died ({_first_sentence(cause)})", cause)
    return GangBroken(f"rank {rank}: {type(cause).__name__}: {cause}", cause)


def _cause(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


def _distance(error: BaseException) -> int:
    """How far an error is from the first cause; the smallest is told."""
    if isinstance(error, OutOfMemory):
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
