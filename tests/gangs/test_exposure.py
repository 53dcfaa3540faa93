"""Who reaches a Ray of our own: its processes listen on loopback only, and refuse whoever lacks the token."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest
from process_groups import run_gang

from moe_evo.models.ranks import Ranks

OWNER = """
import os, ray, sys
os.environ["RAY_AUTH_MODE"] = "disabled"  # as a careless user may have it
from moe_evo.gangs.connection import answers_on, connected
with connected("local"):
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in os.environ
    answers_on()
    waits = ray.remote(num_cpus=0)(type("Waits", (), {"pid": lambda self: os.getpid()})).remote()
    ray.get(waits.pid.remote())
    print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    sys.stdin.readline()
assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
"""

CLIENT = """
import sys, ray, logging
ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
print("in:", ray.get(ray.remote(num_cpus=0)(lambda: "code was run").remote()))
"""


@dataclass(frozen=True)
class OwnRay:
    """A Ray that `cluster.address local` started in process `pid`."""

    pid: int
    address: str
    token: str


@contextmanager
def own_ray() -> Iterator[OwnRay]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_memory_monitor_refresh_ms": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdin is not None and owner.stdout is not None
        try:
            address, token = owner.stdout.readline().split()
            yield OwnRay(owner.pid, address, token)
        finally:
            owner.stdin.write("\n")
            owner.stdin.close()
        assert owner.wait(60) == 0


@pytest.fixture(scope="module")
def own() -> Iterator[OwnRay]:
    with own_ray() as one:
        yield one


def listeners(pid: int) -> dict[str, list[str]]:
    """The addresses that a process and its descendants listen on, with their names."""
    found: dict[str, list[str]] = {}
    for one in (root := psutil.Process(pid), *root.children(recursive=True)):
        for connection in one.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.setdefault(connection.laddr.ip, []).append(one.name())
    return found


def assert_loopback_only(pid: int, at_least: int) -> None:
    found = listeners(pid)
    assert sum(map(len, found.values())) >= at_least, found
    assert all((ip := ipaddress.ip_address(one)).is_loopback or is_mapped_loopback(ip) for one in found), found


def is_mapped_loopback(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None and ip.ipv4_mapped.is_loopback


def client(own: OwnRay, **environment: str) -> subprocess.CompletedProcess[str]:
    """What somebody on this machine gets who tries to run code on the Ray of another."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return subprocess.run(
        [sys.executable, "-c", CLIENT, own.address],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_processes_of_a_local_ray_listen_on_loopback_only(own: OwnRay) -> None:
    assert own.address.startswith("127.0.0.1:")
    assert_loopback_only(own.pid, at_least=6)  # the head's server, raylet, agents and workers


def test_the_port_of_a_local_ray_is_closed_to_the_network(own: OwnRay) -> None:
    outward = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with outward:
        try:
            outward.connect(("192.0.2.1", 9))  # sends nothing; tells the address that others reach this machine at
        except OSError:
            pytest.skip("this machine has no network")
        address = outward.getsockname()[0]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, int(own.address.rpartition(":")[2])), timeout=10)


def test_a_local_ray_runs_code_for_nobody_without_its_token(own: OwnRay) -> None:
    another = secrets.token_hex(32)
    with ThreadPoolExecutor() as threads:  # a refused one tries for half a minute
        waits = [
            threads.submit(client, own, RAY_AUTH_MODE="disabled"),
            threads.submit(client, own, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=another),
            threads.submit(client, own, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=own.token),
        ]
        without, with_another, with_it = (one.result() for one in waits)
    assert (with_it.returncode, with_it.stdout) == (0, "in: code was run\n"), with_it.stderr
    for refused in (without, with_another):
        assert refused.returncode != 0 and refused.stdout == ""
        assert "AuthenticationError" in refused.stderr


@pytest.mark.usefixtures("cluster")
def test_the_rays_of_the_tests_listen_on_loopback_only() -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert_loopback_only(os.getpid(), at_least=5)


def own_listeners(ranks: Ranks) -> dict[str, list[str]]:
    assert ranks.gather(ranks.rank) == [0, 1]
    found = listeners(os.getpid())
    ranks.gather(None)  # nobody leaves before all have looked
    return found


def test_ranks_that_meet_on_loopback_listen_nowhere_else() -> None:
    found = run_gang(own_listeners, 2)
    assert found[0], "rank 0 keeps the store where they meet"
    for one in found:
        assert all(is_mapped_loopback(ip := ipaddress.ip_address(where)) or ip.is_loopback for where in one), found
