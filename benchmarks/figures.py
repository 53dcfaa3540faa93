"""How every benchmark ends: one JSON line with its figures, the commit and the machine."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any


def print_figures(benchmark: str, figures: Mapping[str, Any]) -> None:
    """Print the JSON line."""
    device = platform.processor() or platform.machine()
    print(json.dumps({"benchmark": benchmark, "commit": _commit(), "device": device, **figures}))


def _commit() -> str | None:
    """None where there is no git, or no repository."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
