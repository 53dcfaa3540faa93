"""Training over the workers of a Ray cluster: started by Ray Train, watched, and started again where one is lost."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray.train as _train
import ray.train.torch as _train_torch
from ray.exceptions import RayError
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_evo.config.cluster import ClusterConfig
from moe_evo.errors import ClusterError, ConfigError, MoeEvoError, OutOfMemory, RowOutOfMemory
from moe_evo.evaluation.evaluator import torch_threads
from moe_evo.gangs.capacity import gangs_that_fit
from moe_evo.gangs.connection import cluster_capacity, connected, rank_bundle, reason
from moe_evo.gangs.ray_border import free_in_words, ray
from moe_evo.models.ranks import Ranks
from moe_evo.plugins import import_modules, registering_modules
from moe_evo.recovery.sharded import ShardedJob, train_share
from moe_evo.recovery.sharded_state import ShardedState
from moe_evo.recovery.state import Learned
from moe_evo.recovery.training import Done

train: Any = _train
train_torch: Any = _train_torch

_TICK_S = 0.5
_PATIENCE_S = 30.0  # how long the workers may wait for resources before the user is told


@dataclass(frozen=True)
class Listener:
    """Who is told while workers train.

    begin: of the steps that are done, whenever workers begin. done: of every step. tell: of what a user should know.
    """

    begin: Callable[[int], None]
    done: Done
    tell: Callable[[str], None]


def train_on_workers(job: ShardedJob, cluster: ClusterConfig, threads: int | None, listener: Listener) -> Learned:
    """Train on `cluster.gang_size` workers until the job is done; its weights are in the state's folder afterwards.

    Where a worker is lost all begin again at the last state. threads: of torch, in each worker. Raises ClusterError
    where workers are lost `cluster.max_attempts` times in a row, with no new state between.
    """
    assert cluster.address is not None, "workers are processes of Ray"
    found = _finished(job)
    if found is not None:
        return found
    with connected(cluster.address):
        bundle = rank_bundle(job.model, cluster)
        _check_capacity(job, cluster, bundle)
        lost = 0
        while True:
            before = _steps(job)
            error = _run(job, cluster, bundle, threads, listener)
            found = _finished(job)  # a worker may fail when it leaves, too
            if found is not None:
                return found
            if error is not None and not isinstance(error, train.TrainingFailedError | RayError):
                raise error
            cause = _cause(error)
            if isinstance(cause, OutOfMemory) and not isinstance(cause, RowOutOfMemory):
                job = _with_smaller_passes(job)
                listener.tell(f"{cause}; going on with passes of {job.recover.batch_tokens} tokens")
                continue
            if isinstance(cause, MoeEvoError):
                raise cause
            lost = 1 if before != _steps(job) else lost + 1
            if lost >= cluster.max_attempts:
                raise ClusterError(
                    f"workers were lost {lost} times in a row ({_reason(cause)}); look at the Ray cluster, then run "
                    "the same command again: it goes on where it stood"
                ) from error
            listener.tell(f"a worker was lost ({_reason(cause)}); all go on behind step {max(_steps(job), 0)}")


def _check_capacity(job: ShardedJob, cluster: ClusterConfig, bundle: dict[str, float]) -> None:
    """Raise ConfigError where the workers can never fit: they would wait for ever."""
    capacity = cluster_capacity(job.model, cluster)
    nodes, workers = capacity.nodes, cluster.gang_size
    if not capacity.can_grow and not gangs_that_fit(
        nodes, bundle, workers, cluster.strategy, cluster.labels, of="total"
    ):
        total = ", ".join(f"{name} {nodes[0].total.get(name, 0):g}" for name in bundle)
        raise ConfigError(
            f"cluster: the workers need {_needs(cluster, bundle)}, this machine has {total}; lower cluster.gang_size "
            "or cluster.resources, and check cluster.labels"
        )


def _needs(cluster: ClusterConfig, bundle: dict[str, float]) -> str:
    amounts = ", ".join(f"{name} {amount:g}" for name, amount in bundle.items())
    return f"{cluster.gang_size} x ({amounts})"


def _run(
    job: ShardedJob, cluster: ClusterConfig, bundle: dict[str, float], threads: int | None, listener: Listener
) -> Exception | None:
    """Let one group of workers train as far as it gets; returns the error that ended it."""
    # beside this process: it is then lost with this node and no other
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    ending = _Ending()
    # not in this thread: Ray Train would take over its interrupts
    fit = _trainer(job, cluster, bundle, threads, news).fit
    thread = threading.Thread(target=ending.of, args=(fit,), daemon=True)
    thread.start()
    started, is_told = time.monotonic(), False
    try:
        while thread.is_alive() or not news.empty():
            try:
                learned = news.get(timeout=_TICK_S)
            except Empty:
                if not is_told and time.monotonic() - started > _PATIENCE_S:
                    needs = _needs(cluster, bundle)
                    listener.tell(f"waiting for {needs} to start on the cluster; free: {free_in_words()}")
                    is_told = True
                continue
            is_told = True
            if learned is None:
                listener.begin(max(_steps(job), 0))
            else:
                listener.done(learned)
    except RayError as error:
        raise ClusterError(
            f"the Ray cluster is gone ({reason(error)}); run the same command again, on any "
            "cluster: it goes on where it stood"
        ) from error
    finally:
        news.shutdown(force=True)  # a group that still works ends at its next news
    return ending.error


def _trainer(
    job: ShardedJob, cluster: ClusterConfig, bundle: dict[str, float], threads: int | None, news: Queue
) -> Any:
    labels = {"label_selector": dict(cluster.labels)} if cluster.labels else {}
    has_gpu = bundle.get("GPU", 0) > 0
    return train_torch.TorchTrainer(
        _be_worker,
        train_loop_config={"job": job, "threads": threads, "news": news, "modules": registering_modules()},
        torch_config=train_torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout_s=int(cluster.load_timeout_s)
        ),
        scaling_config=train.ScalingConfig(
            num_workers=cluster.gang_size,
            use_gpu=has_gpu,
            resources_per_worker=bundle,
            placement_strategy=cluster.strategy,
            **labels,
        ),
        run_config=train.RunConfig(
            storage_path=str(job.state / "ray"),
            failure_config=train.FailureConfig(max_failures=0),  # the caller tells whether to go on
        ),
    )


class _Ending:
    """How a function of Ray Train ended: with an error, or None."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def of(self, function: Callable[[], object]) -> None:
        # of Ray Data, which Ray Train sets up though nothing uses it
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
        try:
            with suppress(SystemExit):  # which Ray raises where this process leaves the cluster
                function()
        except Exception as error:  # noqa: BLE001 - the border of the thread: its caller raises or tells it
            self.error = error


def _be_worker(settings: dict[str, Any]) -> None:
    """What each worker does, in a process group that Ray Train has made."""
    context = train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    import_modules(settings["modules"])
    # of the GPUs of a node that all of its workers see, DeepSpeed takes the one with this number
    os.environ["LOCAL_RANK"] = str(train_torch.get_device().index or 0)
    news = settings["news"]
    if ranks.rank == 0:
        news.put(None)  # they have begun

    def done(learned: Learned) -> None:
        if ranks.rank == 0:
            news.put(learned)

    with torch_threads(settings["threads"]):
        train_share(settings["job"], ranks, done)


def _with_smaller_passes(job: ShardedJob) -> ShardedJob:
    state, tokens = ShardedState.load(job.state), job.recover.batch_tokens
    tokens = tokens if state is None else min(state.batch_tokens, tokens)
    return replace(job, recover=replace(job.recover, batch_tokens=max(tokens // 2, 1)))


def _finished(job: ShardedJob) -> Learned | None:
    """What was learned, where nothing is left to be done."""
    state = ShardedState.load(job.state)
    return state.learned if state is not None and state.learned.is_over(job.recover.steps) else None


def _steps(job: ShardedJob) -> int:
    """Of the last state; -1 before the first."""
    state = ShardedState.load(job.state)
    return -1 if state is None else state.learned.steps


def _cause(error: Exception | None) -> Exception | None:
    """Of the workers' errors the one that tells most: ours first, then that a worker died."""
    failures: list[Exception] = list(getattr(error, "worker_failures", {}).values())
    return min(failures, key=_distance) if failures else error


def _distance(error: Exception) -> int:
    if isinstance(error, OutOfMemory):
        return 0
    return 1 if isinstance(error, MoeEvoError) else 2 if isinstance(error, RayError) else 3


def _reason(error: Exception | None) -> str:
    return "they ended without a word" if error is None else f"{type(error).__name__}: {reason(error)}"
