"""What a user reads where Ray does not answer, does not start, or ends processes: one line and the right code, soon."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from ray.cluster_utils import Cluster

CONNECTS = """
import json, os, sys, time
import ray
from moe_evo.errors import MoeEvoError
from moe_evo.gangs.connection import answers_on, connected

if "OVERLOADED" in os.environ:

    def init(*_, **__):  # as ray._private.node does, which no setting brings about for sure
        raise Exception("The current node timed out during startup. This could happen because\\n the raylet failed")

    ray.init = init

for address in sys.argv[1:]:
    started = time.monotonic()
    try:
        with connected(address):
            answers_on()
        error = None
    except MoeEvoError as one:
        error = one
    print(json.dumps([type(error).__name__, str(error), time.monotonic() - started]))
"""


class Told(NamedTuple):
    """The error of a connection, and how long it took."""

    error: str
    message: str
    seconds: float


def connect(*addresses: str, **environment: str) -> list[Told]:
    """What connecting to each address ends with; nothing else is on the terminal."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECTS, *addresses],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [Told(*json.loads(line)) for line in done.stdout.splitlines()]
    assert all("\n" not in one.message for one in told)
    return told


def test_an_address_where_nothing_answers_is_given_up_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        one, client, nowhere = connect(address, "ray://127.0.0.1:10001", "nowhere")
    assert one.error == "ClusterError"  # exit code 3
    assert f"no Ray cluster at '{address}' (nothing answered at {address} within 20 s)" in one.message
    assert 19 < one.seconds < 30
    assert client.error == "ConfigError" and "expected HOST:PORT of the cluster's head" in client.message
    assert nowhere.error == "ClusterError" and "no Ray cluster at 'nowhere'" in nowhere.message


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_token_that_the_cluster_refuses_is_wrong_input(mode: str, cluster: Cluster) -> None:
    another = secrets.token_hex(32)
    (one,) = connect(cluster.address, RAY_AUTH_TOKEN=another, RAY_AUTH_MODE=mode)
    assert one.error == "ConfigError" and "refuses this process; set RAY_AUTH_MODE=token" in one.message
    assert another not in one.message


def test_a_folder_of_temporary_files_with_too_long_a_name_is_told(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    (one,) = connect("local", TMPDIR=str(folder))
    assert one.error == "ConfigError" and one.message.startswith("TMPDIR: has too long a name")
    assert "set RAY_TMPDIR" in one.message


def test_a_ray_that_does_not_start_in_time_is_a_fault_of_the_cluster() -> None:
    (one,) = connect("local", OVERLOADED="yes")
    assert one.error == "ClusterError"
    assert "Ray could not be started on this machine (The current node timed out during startup" in one.message


def test_an_actor_that_ray_ends_for_its_memory_is_a_fault_of_the_cluster() -> None:
    for _ in range(4):  # on a busy machine Ray's monitor may come too late, once
        (one,) = connect("local", RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100")
        if one.error != "NoneType":
            break
    assert one.error == "ClusterError" and "memory" in one.message
