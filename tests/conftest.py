"""What all tests share: one torch thread each, no network, and nothing written into the user's home."""

from __future__ import annotations

import os
import secrets

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "disabled"  # the tests of tracking ask for it in their configs
os.environ.pop("WANDB_API_KEY", None)
# Before anything imports ray: whatever Ray a test starts listens on loopback only and asks for a token, which only
# this process and its children know (otherwise Ray writes one into the user's home); and a neighbour that fills the
# memory must not kill our actors.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

_WITH_CLUSTERS = ("gangs", "cluster", "kills", "test_sweep.py", "test_recover_workers.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those of a file stay together, and so do all that start clusters or kill."""
    for item in items:
        is_clusters = not {item.path.parent.name, item.path.name}.isdisjoint(_WITH_CLUSTERS)
        group = "clusters" if is_clusters else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
