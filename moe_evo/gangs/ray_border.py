"""What is used of Ray that is not typed or not public.

Ray is imported here as Any, because its annotations do not cover `remote`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc as _grpc  # type: ignore[import-untyped]
import ray as _library

from moe_evo.errors import ClusterError
from moe_evo.versions import ADVICE

ray: Any = _library
grpc: Any = _grpc
ActorHandle = Any
"""An actor whose methods are called with `.remote(...)`."""

LOOPBACK = "127.0.0.1"
_MAY_LEAVE_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def on_loopback() -> Iterator[None]:
    """Until the block is left, a Ray that is started here listens on loopback only, in all its processes.

    That is what Ray does by itself on macOS and Windows; elsewhere it listens on every interface, whatever address
    it is given.
    """
    before = os.environ.get(_MAY_LEAVE_LOOPBACK)
    constants = ray._private.ray_constants
    is_allowed = constants.ENABLE_RAY_CLUSTER
    os.environ[_MAY_LEAVE_LOOPBACK] = "0"  # read by the processes that Ray starts
    constants.ENABLE_RAY_CLUSTER = False  # read by this one when it imported Ray
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = is_allowed
        if before is None:
            del os.environ[_MAY_LEAVE_LOOPBACK]
        else:
            os.environ[_MAY_LEAVE_LOOPBACK] = before


def ask_for_token() -> None:
    """A Ray that is started from now on asks for the token in RAY_AUTH_TOKEN, or the file of RAY_AUTH_TOKEN_PATH."""
    os.environ["RAY_AUTH_MODE"] = "token"
    ray._raylet.Config.initialize("")  # Ray has read its settings when it was imported


def bootstrap_address(address: str) -> str:
    """HOST:PORT of the cluster that `ray.init(address)` would join; raises ConnectionError or ValueError for none."""
    found: str = ray._private.services.canonicalize_bootstrap_address_or_die(address)
    return found


def answers(host_and_port: str, within_s: float) -> bool:
    """Whether a gRPC server, such as a head of Ray, answers at HOST:PORT.

    `ray.init` itself tries for a quarter of an hour, and writes three lines every 40 seconds meanwhile.
    """
    if _uses_tls():
        return _accepts(host_and_port, within_s)
    channel = grpc.insecure_channel(host_and_port)
    try:
        grpc.channel_ready_future(channel).result(timeout=within_s)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


def refuses(host_and_port: str, within_s: float) -> bool:
    """Whether the head of Ray at HOST:PORT refuses the token of this process, or its lack of one.

    `ray.init` itself says then, after 20 seconds, that it could not connect. False with TLS, where it cannot be told.
    """
    if _uses_tls():
        return False
    from ray._private.authentication import grpc_authentication_client_interceptor as interceptor

    with grpc.insecure_channel(host_and_port) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")  # bytes in, bytes out
        try:
            ask(b"", metadata=interceptor._get_authentication_metadata_tuple(), timeout=within_s)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _accepts(host_and_port: str, within_s: float) -> bool:
    """Whether anything listens at HOST:PORT."""
    host, _, port = host_and_port.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=within_s).close()
    except OSError:
        return False
    return True


def free_by_node() -> Mapping[str, Mapping[str, float]]:
    """What is free on each node of the connected cluster, by node id; no public name of Ray's tells it."""
    try:
        available = ray._private.state.available_resources_per_node
    except AttributeError as error:
        raise ClusterError(
            f"Ray {ray.__version__} has no available_resources_per_node, where what is free on each node was "
            f"expected; {ADVICE}"
        ) from error
    found: Mapping[str, Mapping[str, float]] = available()
    return found


def free_in_words() -> str:
    """GPUs and CPUs that are free on the connected cluster."""
    free = ray.available_resources()
    return ", ".join(f"{name} {free[name]:g}" for name in ("GPU", "CPU") if name in free) or "nothing"
