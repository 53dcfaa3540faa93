"""Stubs for programs that a shell script calls: each writes down what it was called with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CLUSTER = Path(__file__).parents[2] / "cluster"

_RECORDER = """#!{python}
# a stub: not the real program
import json, os, sys
from pathlib import Path

call = {{"program": {name!r}, "argv": sys.argv[1:], "environment": dict(os.environ)}}
for flag, value in zip(sys.argv, sys.argv[1:]):
    if flag == "--runtime-env":
        path = Path(value)
        call["runtime_env"] = path.read_text()
        call["modes"] = [oct(one.stat().st_mode & 0o777) for one in (path, path.parent)]
    if flag == "--working-dir":
        call["uploaded"] = sorted(str(one.relative_to(value)) for one in Path(value).rglob("*") if one.is_file())
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(call) + "\\n")
{body}
"""


@dataclass
class StubPrograms:
    """A folder of stubs, the only folder on the PATH beside those of the system."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._calls = self.folder / "calls.jsonl"

    def add(self, name: str, body: str = "") -> None:
        """A stub that writes its call down, then runs `body` (Python)."""
        path = self.folder / name
        path.write_text(_RECORDER.format(python=sys.executable, name=name, calls=str(self._calls), body=body))
        path.chmod(0o755)

    @property
    def calls(self) -> list[dict]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()] if self._calls.exists() else []

    def run(
        self, script: str, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of cluster/ with the stubs first on the PATH, and nothing of Ray's or ours in its settings."""
        foreign = ("RAY_", "MOE_EVO_", "SLURM_")
        base = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        base |= {"PATH": f"{self.folder}:/usr/bin:/bin", "HOME": str(self.folder), **(environment or {})}
        return subprocess.run(
            ["bash", str(CLUSTER / script), *arguments], cwd=cwd, env=base, capture_output=True, text=True, timeout=60
        )
