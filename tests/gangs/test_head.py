"""A head that does not answer for a while: a run outlives a short silence, and is told of a long one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import GetTimeoutError

from moe_evo.errors import ClusterError
from moe_evo.gangs import head
from moe_evo.gangs.head import answer_of


@ray.remote(num_cpus=0)
def slow(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


@contextmanager
def silent(cluster: Cluster, seconds: float) -> Iterator[None]:
    """The head is stopped, for so long at most."""
    pid = cluster.head_node.all_processes["gcs_server"][0].process.pid
    os.kill(pid, signal.SIGSTOP)
    waking = threading.Timer(seconds, os.kill, (pid, signal.SIGCONT))
    waking.start()
    try:
        yield
    finally:
        waking.cancel()
        os.kill(pid, signal.SIGCONT)


def test_a_silence_of_ten_seconds_is_no_loss(cluster: Cluster) -> None:
    assert answer_of(slow.remote(0), 60) == "done"  # a worker is there
    waiting = slow.remote(13)
    with silent(cluster, 10):
        assert answer_of(waiting, 60) == "done"


def test_a_longer_silence_is_told(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_LOST_S", 3.0)
    assert answer_of(slow.remote(0), 60) == "done"
    waiting = slow.remote(30)
    with silent(cluster, 20), pytest.raises(ClusterError, match=r"its head at 127\.0\.0\.1:\d+ did not answer"):
        answer_of(waiting, 60)
    ray.cancel(waiting, force=True)


def test_no_answer_of_an_actor_alone_is_what_ray_says(cluster: Cluster) -> None:
    waiting, started = slow.remote(30), time.monotonic()
    with pytest.raises(GetTimeoutError):
        answer_of(waiting, 6)
    assert 5.9 < time.monotonic() - started < 9
    ray.cancel(waiting, force=True)
