"""Reaching a Ray cluster, and the service of gangs on it."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from ray.exceptions import AuthenticationError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_evo.config.cluster import ClusterConfig, num_ranks
from moe_evo.config.model import ModelConfig
from moe_evo.errors import ClusterError, ConfigError, MoeEvoError
from moe_evo.gangs.capacity import ClusterCapacity, NodeCapacity
from moe_evo.gangs.gang import remove_groups
from moe_evo.gangs.head import answer_of
from moe_evo.gangs.ray_border import (
    LOOPBACK,
    ActorHandle,
    answers,
    ask_for_token,
    bootstrap_address,
    free_by_node,
    on_loopback,
    ray,
    refuses,
)
from moe_evo.gangs.service import GangService
from moe_evo.gangs.service_spec import ServiceSpec
from moe_evo.versions import ADVICE

NAMESPACE = "moe_evo"
_ANSWER_S = 20.0
_START_S = 300.0
_END_S = 10.0
_REASON_LENGTH = 200


@contextmanager
def connected(address: str, extra_cpus: int = 0) -> Iterator[None]:
    """Be connected to the Ray cluster at `address` ('local' starts one); raises ClusterError, also for what Ray raises
    in the block.

    extra_cpus: CPUs that a Ray of our own counts beside the real ones, for processes that mostly wait. A process that
    is connected already, as in a Ray task or a test, keeps its connection. A Ray of our own listens on loopback only,
    and asks for a token that only this process and its children know.
    """
    try:
        if ray.is_initialized():
            yield
            return
        with on_loopback() if address == "local" else nullcontext():
            _connect(address, extra_cpus)
            try:
                yield
            finally:
                ray.shutdown()
    except RayTaskError:
        raise  # a defect in a process of ours, not a fault of the cluster
    except RayError as error:
        raise ClusterError(
            f"the Ray cluster failed ({reason(error)}); look at it, then run the same command again"
        ) from error


def _connect(address: str, extra_cpus: int) -> None:
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        _secure()
        options["include_dashboard"] = False
        if extra_cpus:
            options["num_cpus"] = (os.cpu_count() or 1) + extra_cpus
    else:
        _check_answers(address)
    at_end = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **options)
    except Exception as error:
        raise _not_connected(address, error) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_end)  # Ray's own prints a stack of C++ frames
    if address == "local" and (hosts := {node["NodeManagerAddress"] for node in ray.nodes()}) != {LOOPBACK}:
        ray.shutdown()
        raise ClusterError(
            f"cluster.address: Ray {ray.__version__} was told to listen on {LOOPBACK} only and listens on "
            f"{', '.join(sorted(hosts))}; {ADVICE}"
        )


def _secure() -> None:
    """What a Ray of our own finds in its environment: that it asks for a token, and which; no file holds it."""
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ask_for_token()


def _check_answers(address: str) -> None:
    """Raise ClusterError where no Ray answers at an address soon."""
    if "://" in address:
        raise ConfigError(
            f"cluster.address: got {address!r}, expected HOST:PORT of the cluster's head, as in 10.0.0.7:6379, 'auto' "
            "or 'local'; a search does not run through the Ray client, start it on a node of the cluster"
        )
    try:
        where = bootstrap_address(address)
    except (ConnectionError, ValueError, OSError) as error:
        raise _not_connected(address, error) from error
    if not answers(where, _ANSWER_S):
        raise ClusterError(
            f"cluster.address: no Ray cluster at {address!r} (nothing answered at {where} within {_ANSWER_S:.0f} s); "
            "check the address and that the head runs, or use 'local' for a Ray on this machine"
        )
    if refuses(where, _ANSWER_S):
        raise _refused(address)


def _not_connected(address: str, error: Exception) -> MoeEvoError:
    """What to tell where `ray.init` failed."""
    told = reason(error)
    if "AF_UNIX" in str(error):
        return ConfigError(
            f"TMPDIR: has too long a name for the sockets that Ray makes below it ({told}); set RAY_TMPDIR to a folder "
            "with a short name, such as /tmp"
        )
    if "AuthenticationError" in str(error) or isinstance(error, AuthenticationError):
        return _refused(address)
    if address == "local":
        return ClusterError(
            f"cluster.address: Ray could not be started on this machine ({told}); is it overloaded, or short of memory "
            "or disk? `moe-evo doctor` tells; leave cluster.address out to evaluate without Ray"
        )
    return ClusterError(
        f"cluster.address: no Ray cluster at {address!r} ({told}); start one with `ray start --head`, or use "
        "'local' for one on this machine"
    )


def _refused(address: str) -> ConfigError:
    return ConfigError(
        f"cluster.address: the Ray cluster at {address!r} refuses this process; set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
    )


def reason(error: BaseException) -> str:
    """The message of an error of Ray, which may be a page, in a part of one line."""
    return " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__


def answers_on() -> str:
    """Start an actor on the connected cluster and return its node; raises ClusterError where that fails."""
    actor = ray.remote(num_cpus=0)(_Answering).remote()
    try:
        return str(ray.get(actor.node.remote(), timeout=_START_S))
    except RayError as error:
        raise ClusterError(f"an actor was started and did not answer ({reason(error)})") from error
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
    """The service named in the config, found or started; without a name, a new one for this run alone.

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
        found = answer_of(service.spec.remote(), _START_S)
    except RayTaskError:
        raise
    except RayError as error:  # it died or hangs, or was ended because memory ran out
        raise ClusterError(
            f"the service of gangs did not start ({reason(error)}); see the logs of the Ray cluster"
        ) from error
    if (found.model, found.model_hash, _gangs(found)) != (spec.model, spec.model_hash, _gangs(spec)):
        raise ClusterError(
            f"cluster.service: {name!r} serves {found.model.path} with other options or other gangs; use its options, "
            "or another name"
        )
    return service


@contextmanager
def shared_service(model: ModelConfig, model_hash: str, cluster: ClusterConfig, *, keep: bool) -> Iterator[None]:
    """Keep the service that `cluster` names alive until the block is left; with `keep`, after it too."""
    spec = ServiceSpec(model, model_hash, cluster, rank_bundle(model, cluster))
    service = start_service(spec)
    try:
        yield
    finally:
        if not keep:
            end_service(service, spec)


def gangs_without_drivers(model: ModelConfig, cluster: ClusterConfig) -> int:
    """How many gangs a Ray of our own has real CPUs for, without its `extra_cpus`."""
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
