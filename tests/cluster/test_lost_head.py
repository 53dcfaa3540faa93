"""A Ray head that is killed under two searches, a command and a script: both tell it soon, and go on on another one."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray_head import RayHead, ray_head

from moe_evo.records.journal import MAIN

EVALUATIONS = 60
TASK = {"data": "syll", "num_search": 40, "num_validation": 4, "num_test": 4}
COMMAND = [
    "-m", "moe_evo", "search", "--tasks", json.dumps([TASK]), "--search.evaluations", str(EVALUATIONS),
    "--selection.finalists", "2", "--model.self_check", "false", "--evaluation.threads", "1",
    "--cluster.num_gangs", "1", "--cluster.max_batch", "1", "--folder", "run", "--cluster.address",
]  # fmt: skip
SCRIPT = f"""
import sys
import moe_evo
from moe_evo.errors import ClusterError

def search(address):
    cluster = {{"address": address, "num_gangs": 1, "max_batch": 1}}
    return moe_evo.search(
        tasks=[{TASK}], evaluations={EVALUATIONS}, finalists=2, self_check=False, threads=1, folder="run",
        cluster=cluster,
    )

try:
    search(sys.argv[1])
except ClusterError as error:
    print(error, flush=True)
print(search(sys.stdin.readline().strip()).is_finished)
"""


@contextmanager
def search(arguments: list[str], head: RayHead, home: Path) -> Iterator[Search]:
    """A search that has begun, and is ended when the block is left."""
    home.mkdir(exist_ok=True)
    with subprocess.Popen(
        [sys.executable, *arguments, head.address],
        env={**head.environment, "OMP_NUM_THREADS": "1"}, cwd=home, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield Search(process, home)
        finally:
            process.kill()


class Search(NamedTuple):
    """A search in a process and a folder of its own."""

    process: subprocess.Popen[str]
    home: Path

    def end(self, answer: str | None = None) -> tuple[int, str, str]:
        """Its exit code and what it prints from now on; answer: what it may read."""
        output, errors = self.process.communicate(answer, timeout=120)
        return self.process.returncode, output, errors

    def outcomes(self) -> list[tuple[Any, ...]]:
        """All that the journal holds of the evaluations, in order."""
        journal = self.home / "run" / "journal.sqlite"
        if not journal.exists():
            return []
        database = sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True)
        try:
            return database.execute("SELECT * FROM outcomes ORDER BY position").fetchall()
        except sqlite3.OperationalError:  # it is being made
            return []
        finally:
            database.close()

    def wait_until_it_evaluates(self) -> None:
        ends = time.monotonic() + 120
        while len(self.outcomes()) < 8:
            assert self.process.poll() is None and time.monotonic() < ends, f"{self.home.name} does not evaluate"
            time.sleep(0.1)

    def assert_went_on(self, before: list[tuple[Any, ...]]) -> None:
        """What was known when the head was lost is there as it was; the search is whole."""
        after = self.outcomes()
        assert after[: len(before)] == before
        result = json.loads((self.home / "run" / "result.json").read_text())
        assert result["search"]["evaluations"] == EVALUATIONS


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "head").mkdir()
    return tmp_path / "head"


def test_a_lost_head_is_told_in_one_line_and_both_searches_go_on_on_another(home: Path, tmp_path: Path) -> None:
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        first = stack.enter_context(ray_head(home, num_cpus=2))
        command = stack.enter_context(search(COMMAND, first, tmp_path / "command"))
        script = stack.enter_context(search(["-c", SCRIPT], first, tmp_path / "script"))
        command.wait_until_it_evaluates()
        script.wait_until_it_evaluates()
        first.kill()
        killed = time.monotonic()
        other = ray_head(home, num_cpus=2, token=first.environment["RAY_AUTH_TOKEN"])
        starting = threads.submit(stack.enter_context, other)

        line = f"the Ray cluster is gone (its head at {first.address} did not answer for "
        code, _, told = command.end()
        assert code == 3, told
        assert time.monotonic() - killed < 55  # Ray itself ends it after 60 s
        progress, last = told[told.index("\nsearch (") + 1 :].rstrip().rsplit("\n", 1)
        assert last.startswith(f"moe-evo: error: {line}")
        assert all(one.startswith("search (") for one in progress.splitlines()), told
        assert script.process.stdout is not None
        assert script.process.stdout.readline().startswith(line)
        known = command.outcomes(), script.outcomes()
        assert all(8 <= len(one) < EVALUATIONS for one in known)

        second = starting.result()
        again = stack.enter_context(search(COMMAND, second, command.home))
        code, finished, errors = script.end(f"{second.address}\n")
        assert (code, finished) == (0, "True\n"), errors
        code, _, errors = again.end()
        assert code == 0, errors
        done = sum(row[1:4:2] == (MAIN, "search") for row in known[0])
        assert f"search (surrogate): {EVALUATIONS} evaluations, {done} done before" in errors
        again.assert_went_on(known[0])
        script.assert_went_on(known[1])
