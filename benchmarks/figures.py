"""How every benchmark ends: one JSON line with its figures, the commit and the machine."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from typing import Any


def print_figures(benchmark: str, figures: Mapping[str, Any]) -> None:
    """Print the JSON line."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = platform.processor() or platform.machine()
    print(json.dumps({"benchmark": benchmark, "commit": commit.stdout.strip() or None, "device": device, **figures}))
