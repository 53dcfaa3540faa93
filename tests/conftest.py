"""What all tests share: one torch thread each, no network, and nothing written into the user's home."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "disabled"  # the tests of tracking ask for it in their configs
os.environ.pop("WANDB_API_KEY", None)
# before anything imports ray: a local one otherwise writes a token into the user's home, and a neighbour
# that fills the memory must not kill our actors
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
