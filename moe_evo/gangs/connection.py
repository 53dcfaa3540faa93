"""Reaching a Ray cluster, and the service of gangs on it."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_evo.config.cluster import ClusterConfig, num_ranks
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ClusterError
from moe_evo.gangs.capacity import ClusterCapacity, NodeCapacity
from moe_evo.gangs.gang import remove_groups
from moe_evo.gangs.ray_border import ActorHandle, free_by_node, ray
from moe_evo.gangs.service import GangService, ServiceSpec

NAMESPACE = "moe_evo"
_START_S = 300.0
_END_S = 10.0


@contextmanager
def connected(address: str, extra_cpus: int = 0) -> Iterator[None]:
    """Be connected to the Ray cluster at `address` ('local' starts one); raises ClusterError.

    extra_cpus: how many more CPUs than it has a Ray of our own counts, for processes that mostly wait.
    Where this process is connected already, as in a Ray task or a test, that connection is used and left.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        # Ray asks for a token; this one only we and our children know, and no file of the user's holds it
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options["include_dashboard"] = False
        if extra_cpus:
            options["num_cpus"] = (os.cpu_count() or 1) + extra_cpus
    at_end = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **options)
    except (ConnectionError, RayError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(
            f"cluster.address: no Ray cluster at {address!r} ({reason}); start one with `ray start --head`, or use "
            "'local' for one on this machine"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, at_end)  # Ray's own prints a stack of C++ frames
    try:
        yield
    finally:
        ray.shutdown()


def answers_on() -> str:
    """The node on which an actor of the connected cluster answers; raises ClusterError where none does."""
    actor = ray.remote(num_cpus=0)(_Answering).remote()
    try:
        return str(ray.get(actor.node.remote(), timeout=_START_S))
    except (RayError, GetTimeoutError) as error:
        raise ClusterError(f"an actor was started and did not answer ({' '.join(str(error).split())[:200]})") from error
    finally:
        ray.kill(actor)


class _Answering:
    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def rank_bundle(model: ModelConfig, cluster: ClusterConfig) -> dict[str, float]:
    """Ray resources of one rank: what the config says, else a GPU where the cluster has one, else a CPU."""
    if cluster.resources is not None:
        return {name: float(amount) for name, amount in cluster.resources.items()}
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    if not (model.device.startswith("cuda") or (model.device == "auto" and has_gpu)):
        return {"CPU": 1.0}
    gpus = cluster.gang_size if model.sharding == "device_map" else 1
    return {"GPU": float(gpus), "CPU": 1.0}


def cluster_capacity(model: ModelConfig, cluster: ClusterConfig) -> ClusterCapacity:
    """The nodes of the cluster that this process is connected to, with what is free on each."""
    free = free_by_node()
    nodes = [
        NodeCapacity(
            name=str(node["NodeManagerAddress"]),
            total=node["Resources"],
            available=free.get(node["NodeID"], {}),
            labels=node.get("Labels", {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return ClusterCapacity(tuple(nodes), rank_bundle(model, cluster), can_grow=cluster.address != "local")


def start_service(spec: ServiceSpec) -> ActorHandle:
    """A service of this run alone, or the one of that name on the cluster, which is started where there is none.

    Raises ClusterError where the name belongs to a service of another model or other gangs.
    """
    name = spec.cluster.service
    if name is None:
        remove_groups(spec.name)  # of the service before this one, if that was lost
    # beside the driver: the service is then lost with this node and no other
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 10_000, "scheduling_strategy": here}
    if name is not None:
        options |= {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    service = ray.remote(GangService).options(**options).remote(spec)
    try:
        found = ray.get(service.spec.remote(), timeout=_START_S)
    except (RayActorError, GetTimeoutError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(f"the service of gangs did not start ({reason}); see the logs of the Ray cluster") from error
    if (found.model, found.model_hash, _gangs(found)) != (spec.model, spec.model_hash, _gangs(spec)):
        raise ClusterError(
            f"cluster.service: {name!r} serves {found.model.path} with other options or other gangs; use its options, "
            "or another name"
        )
    return service


@contextmanager
def shared_service(model: ModelConfig, model_hash: str, cluster: ClusterConfig, *, keep: bool) -> Iterator[None]:
    """The service that `cluster` names is there until the block is left, and after it where `keep` says so."""
    spec = ServiceSpec(model, model_hash, cluster, rank_bundle(model, cluster))
    service = start_service(spec)
    try:
        yield
    finally:
        if not keep:
            end_service(service, spec)


def gangs_without_drivers(model: ModelConfig, cluster: ClusterConfig) -> int:
    """How many gangs a Ray of our own has real CPUs for, whatever it counts for processes that wait."""
    bundle, ranks = rank_bundle(model, cluster), num_ranks(model, cluster)
    if "GPU" in bundle:
        return max(int(ray.cluster_resources()["GPU"] / bundle["GPU"] / ranks), 1)
    return max(int((os.cpu_count() or 1) / bundle.get("CPU", 1) / ranks), 1)


def end_service(service: ActorHandle, spec: ServiceSpec) -> None:
    """End a service that no other run shares, with its gangs."""
    ray.kill(service)
    with suppress(RayError):  # which tells that it has ended
        ray.get(service.spec.remote(), timeout=_END_S)
    remove_groups(spec.name)


def _gangs(spec: ServiceSpec) -> tuple[Any, ...]:
    cluster = spec.cluster
    return (spec.bundle, cluster.gang_size, cluster.num_gangs, cluster.labels, cluster.strategy)
