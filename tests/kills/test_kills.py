"""Commands that are killed at random moments: nothing that was finished is lost, and the next command works."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from moe_evo.cli.main import main
from moe_evo.errors import JournalError
from moe_evo.models.export.export import export_checkpoint  # noqa: F401 - with all of torch, before any fork
from moe_evo.models.export.target_folder import EXPORT_RECORD
from moe_evo.records.journal import MAIN, Journal

KILLS = 2 * int(os.environ.get("FUZZ", "1"))
OLD_RUNS = Path(__file__).parent.parent / "data" / "old_runs"
TASKS = '[{"data": "syll", "num_search": 6, "num_validation": 4, "num_test": 4}]'
FAST = ["--tasks", TASKS, "--model.self_check", "false", "--evaluation.threads", "1"]

_RNG = random.Random(0)


def _child(argv: list[str]) -> int:
    """A process of its own that runs the command; forked, so that it need not import torch."""
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os._exit(main(argv))


def _finished(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killed(argv: list[str], begun: Callable[[], bool], within_s: float) -> None:
    """Run the command, and kill it at a random moment after `begun`."""
    child = _child(argv)
    ends = time.monotonic() + 120
    while not begun() and time.monotonic() < ends and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(_RNG.uniform(0, within_s))
    try:
        os.kill(child, signal.SIGKILL)
        _finished(child)
    except (ProcessLookupError, ChildProcessError):
        return  # it had ended before


def _outcomes(run: Path) -> int:
    try:
        with Journal(run / "journal.sqlite", read_only=True) as journal:
            return len(journal.outcomes(MAIN, "search"))
    except JournalError:
        return 0


def test_a_search_loses_no_evaluation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = ["search", *FAST, "--search.evaluations", "12", "--selection.finalists", "2", "--folder", str(run)]
    known = 0
    for _ in range(KILLS):
        _killed(argv, lambda: _outcomes(run) > known, 0.3)  # noqa: B023 - called at once
        assert _outcomes(run) >= known
        known = _outcomes(run)
    assert _finished(_child(argv)) == 0
    assert json.loads((run / "result.json").read_text())["search"]["evaluations"] == 12
    assert not [one.name for one in run.iterdir() if one.name.endswith((".part", ".tmp"))]


def _assert_whole(checkpoint: Path) -> None:
    """An export with all its files, and a file that was added to it."""
    record = json.loads((checkpoint / EXPORT_RECORD).read_text())
    assert {one.name for one in checkpoint.iterdir()} >= set(record["files"])
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as weights:
        assert all(weights.get_tensor(name) is not None for name in weights.keys())  # noqa: SIM118 - it is no dict
    assert (checkpoint / "notes.txt").read_text() == "mine"


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(OLD_RUNS / "finished", tmp_path / "run")
    yield tmp_path / "run"


@pytest.mark.parametrize("command", ["export", "prune"])
def test_an_older_export_is_there_until_the_new_one_is(command: str, finished: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    target = place / "small"
    argv = {
        "export": ["export", str(finished), "--to", str(target), "--overwrite"],
        "prune": ["prune", *FAST, "--method", "frequency", "--num_kept", "4", "--to", str(target), "--overwrite"],
    }[command]
    assert _finished(_child(argv)) == 0
    (target / "notes.txt").write_text("mine")

    def is_writing() -> bool:
        return len(list(place.iterdir())) > 1

    for _ in range(KILLS):
        _killed(argv, is_writing, 0.5)
        _assert_whole(target)
    assert _finished(_child(argv)) == 0
    _assert_whole(target)
    assert [one.name for one in place.iterdir()] == ["small"]
