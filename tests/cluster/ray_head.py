"""A real Ray head of a test's own: its own home, token, ports and temporary folder, gone when the test ends."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(sys.executable).parent  # where `ray` and `python` of this environment lie


@dataclass(frozen=True)
class RayHead:
    """Where a head answers, and what its users need in their environment."""

    address: str
    dashboard: str
    environment: dict[str, str]
    folder: Path

    def kill(self) -> None:
        """End the head and all that it started at once, as when its machine is lost."""
        for pid in processes_of(self.folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_environment(home: Path) -> dict[str, str]:
    """This environment without any setting of Ray, with `home` as the home folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # a neighbour that fills the memory must not kill our actors
    }


@contextmanager
def ray_head(home: Path, *, num_cpus: int, token: str | None = None) -> Iterator[RayHead]:
    """A head with token authentication that listens on loopback only; token: a new one, unless it is given."""
    environment = {
        **own_environment(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token or secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # it listens on loopback only
    }
    port, dashboard = free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: names of its sockets end at 107 bytes
    command = [
        str(SCRIPTS / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
        f"--num-cpus={num_cpus}", "--num-gpus=0", f"--temp-dir={folder}", "--object-store-memory=80000000",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{dashboard}"
            _wait_until_it_answers(url, environment["RAY_AUTH_TOKEN"], process, home / "head.log")
            yield RayHead(f"127.0.0.1:{port}", url, environment, folder)
        finally:
            _end(process, folder)
            shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(url: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the head does not answer:\n{log.read_text()}")


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End the head and whatever it started. `ray stop` would end every Ray of this user on this machine."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def processes_of(folder: Path) -> list[int]:
    """Processes that have the temporary folder of our head in their command line or environment."""
    needle, found = str(folder).encode(), []
    for one in Path("/proc").iterdir():
        if not one.name.isdigit() or int(one.name) == os.getpid():
            continue
        try:
            if needle in (one / "cmdline").read_bytes() or needle in (one / "environ").read_bytes():
                found.append(int(one.name))
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return found
