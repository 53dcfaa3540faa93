"""Runs in forked processes, which can be killed, and what their journals hold."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from moe_evo.errors import JournalError
from moe_evo.records.journal import Journal

Content = dict[str, list[tuple[object, ...]]]


def content(folder: Path) -> Content:
    """All that a journal says but for times."""
    with Journal(folder / "journal.sqlite", read_only=True) as journal:
        read = journal._database.execute
        return {
            "candidates": read(
                "SELECT search, number, digest, operator, parents FROM candidates ORDER BY search, number"
            ).fetchall(),
            "outcomes": read(
                "SELECT position, search, number, split, fitness, tie_break, standard_error, num_examples, metrics,"
                " failure_kind, failure_reason FROM outcomes ORDER BY position"
            ).fetchall(),
        }


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process, which has the model loaded already; answers its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def num_outcomes(folder: Path) -> int:
    """Finished evaluations; 0 before there is a journal."""
    try:
        return len(content(folder)["outcomes"])
    except JournalError:
        return 0


def wait_for_outcomes(folder: Path, number: int, child: int) -> None:
    while num_outcomes(folder) < number and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
