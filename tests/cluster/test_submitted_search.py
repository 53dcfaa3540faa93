"""cluster/submit.sh against a real Ray head with token authentication: a search, submitted twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray_head import RayHead, own_environment, ray_head
from stub_programs import CLUSTER

# random search: its candidates do not depend on the order in which outcomes arrive
SEARCH = """\
tasks: [{data: syll, num_search: 16, num_validation: 8, num_test: 16}]
search: {algorithm: random, num_kept: 4, evaluations: 12}
selection: {finalists: 3}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def head(home: Path) -> Iterator[RayHead]:
    with ray_head(home, num_cpus=2) as one:
        yield one


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(SEARCH)
    return folder


def submit(head: RayHead, project: Path, *arguments: str, token: str | None = None) -> tuple[int, str]:
    """Exit code and everything that is printed."""
    environment = head.environment | ({} if token is None else {"RAY_AUTH_TOKEN": token})
    command = ["bash", str(CLUSTER / "submit.sh"), "tiny.yaml", "--address", head.dashboard, "--python", sys.executable]
    done = subprocess.run(
        [*command, *arguments], cwd=project, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def search_locally(project: Path, folder: Path, home: Path) -> None:
    command = [sys.executable, "-m", "moe_evo", "search", "tiny.yaml", "--folder", str(folder)]
    subprocess.run(command, cwd=project, env=own_environment(home), check=True, capture_output=True, timeout=120)


def scores(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """What a run found: every row with its scores, and nothing about when or where."""
    rows = json.loads((folder / "result.json").read_text())["rows"]
    return [(row["key"], {key: row[key] for key in ("digest", "scores")}) for row in rows]


def test_a_search_submitted_twice_runs_once_and_finds_what_a_local_one_finds(
    head: RayHead, project: Path, home: Path
) -> None:
    folder, local = project / "out" / "run", project / "local"
    where = ("--folder", "out/run", "--cluster.num_gangs", "1")
    with ThreadPoolExecutor() as threads:
        here = threads.submit(search_locally, project, local, home)
        wrong = threads.submit(submit, head, project, "--search.num_kept", "0")
        refused = threads.submit(submit, head, project, token="0" * 64)
        code, output = submit(head, project, *where)
        here.result()
    outputs = [output, wrong.result()[1], refused.result()[1]]
    assert code == 0 and "done; the result is in" in output, output
    assert wrong.result()[0] == 2 and "search.num_kept: got 0" in outputs[1], outputs[1]
    assert refused.result()[0] == 2 and "authentication token is invalid" in outputs[2], outputs[2]
    assert (folder / "journal.sqlite").is_file() and scores(folder) == scores(local)

    result = (folder / "result.json").read_bytes()
    code, again = submit(head, project, *where)
    assert code == 0 and "this run is finished" in again, again
    assert (folder / "result.json").read_bytes() == result

    token = head.environment["RAY_AUTH_TOKEN"]
    assert not any(token in one for one in (*outputs, again))
    written = [path for path in (*project.rglob("*"), *home.rglob("*")) if path.is_file()]
    assert [path for path in written if token.encode() in path.read_bytes()] == []
