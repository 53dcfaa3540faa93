"""Searches that end before their time: what is said, what is kept, and how they go on."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_evo.errors import JournalError
from moe_evo.records.journal import MAIN, Journal

FAST = [
    "--tasks", '[{"data": "syll", "num_search": 12, "num_validation": 8, "num_test": 8}]',
    "--search.evaluations", "6", "--selection.finalists", "2", "--evaluation.threads", "1",
]  # fmt: skip


def num_outcomes(folder: Path) -> int:
    """How many evaluations are in the journal, which another process writes."""
    try:
        with Journal(folder / "journal.sqlite", read_only=True) as journal:
            return len(journal.outcomes(MAIN, "search"))
    except JournalError:
        return 0


def test_sigint_ends_cleanly_says_how_to_go_on_and_the_same_command_does(tmp_path: Path) -> None:
    longer = ["--search.evaluations", "80", "--folder", str(tmp_path / "run")]
    argv = [sys.executable, "-m", "moe_evo", "search", *FAST, *longer]

    def hear_sigint() -> None:  # which is ignored by what a shell starts in the background, these tests for one
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, **pipes, text=True, preexec_fn=hear_sigint) as process:
        while process.poll() is None and num_outcomes(tmp_path / "run") < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; all finished evaluations are kept" in err.splitlines()[-1]
    assert "Traceback" not in err
    unfinished = subprocess.run([*argv[:3], "show", str(tmp_path / "run")], capture_output=True, text=True, check=True)
    assert "of 80 evaluations done" in unfinished.stdout
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["search"]["evaluations"] == 80
    assert "done before" in done.stderr


def test_a_full_disk_is_one_line_and_nothing_that_was_finished_is_lost(tmp_path: Path) -> None:
    longer = ["--search.evaluations", "30", "--folder", str(tmp_path / "run")]
    argv = [sys.executable, "-m", "moe_evo", "search", *FAST, *longer]

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (36_000, 36_000))

    full = subprocess.run(argv, capture_output=True, text=True, check=False, preexec_fn=small_disk)
    assert full.returncode == 2, full.stderr
    assert "free space on that disk and run the same command again" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    show = [*argv[:3], "show", str(tmp_path / "run"), "--json"]
    told = subprocess.run(show, capture_output=True, text=True, check=True)
    before = json.loads(told.stdout)
    assert 0 < before["evaluations"] < 30
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["search"]["evaluations"] == 30
    assert f"{before['evaluations']} done before" in done.stderr
