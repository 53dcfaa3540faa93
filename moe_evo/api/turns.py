"""One computation at a time in a process: others wait for their turn.

Torch's number of threads, the chatter of transformers, W&B's environment and the connection to Ray belong to the
whole process, and each computation sets them for itself and puts them back. So calls from several threads are
correct, but take turns. For searches side by side use a sweep, or a process each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moe_evo.tracking.base import Tracker, Trackers

_TURN = threading.RLock()


@contextmanager
def turn(*, progress: bool) -> Iterator[Tracker]:
    """Wait for this thread's turn, and keep it until the block is left; answers where to tell what happens.

    progress: whether it is shown on the standard error stream; else nothing is printed.
    """
    with _TURN:
        if progress:
            from moe_evo.tracking.terminal import TerminalTracker

            with TerminalTracker() as tracker:
                yield tracker
        else:
            yield Trackers()
