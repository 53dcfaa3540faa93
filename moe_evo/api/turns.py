"""A lock that lets one computation at a time run in a process; calls from other threads wait.

Each computation sets state of the whole process, and restores it afterwards: torch's number of threads, the log
level of transformers, W&B's environment variables and the connection to Ray. To run searches at the same time, use
a sweep, or one process for each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moe_evo.tracking.base import Tracker, Trackers

_TURN = threading.RLock()


@contextmanager
def turn(*, progress: bool) -> Iterator[Tracker]:
    """Hold the lock until the block is left; yields the tracker that the computation reports to.

    progress: show the progress on the standard error stream; False prints nothing.
    """
    with _TURN:
        if progress:
            from moe_evo.tracking.terminal import TerminalTracker

            with TerminalTracker() as tracker:
                yield tracker
        else:
            yield Trackers()
