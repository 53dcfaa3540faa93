"""The tracker for Weights & Biases, which calls wandb in a thread of its own.

A search does not wait for W&B while it runs, and an error of W&B is one line on the terminal.
"""

from __future__ import annotations

import netrc
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from moe_evo.evaluation.pool import PoolNews
from moe_evo.genomes.population import Individual
from moe_evo.records.result import RunResult
from moe_evo.tracking.base import Tracker
from moe_evo.tracking.wandb_run import WandbRun

if TYPE_CHECKING:  # wandb is imported where a search is tracked, not before
    from moe_evo.tracking.wandb_log import SearchLog


_GRACE_S = 5.0  # for the steps of W&B that have no time limit of their own
_POOL_INTERVAL_S = 5.0


@contextmanager
def wandb_tracker(run: WandbRun, terminal: Tracker) -> Iterator[WandbTracker]:
    """A tracker that writes a W&B run; sets W&B's environment variables meanwhile. Errors are shown on `terminal`."""
    files = run.folder / "wandb"
    if run.mode == "offline":  # everything is written again, which includes what is in older offline files
        for old in [*files.glob(f"offline-run-*{run.replaced_offline}"), files / "staging"]:
            shutil.rmtree(old, ignore_errors=True)
    own = {
        "WANDB_DATA_DIR": str(files / "staging"),
        "WANDB_CACHE_DIR": str(files / "cache"),
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",  # its telemetry delays the end of a process for seconds
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    tracker = WandbTracker(run, terminal)
    try:
        tracker.start()
        try:
            yield tracker
        except BaseException as error:
            tracker.close(255 if isinstance(error, KeyboardInterrupt) else 1)
            raise
        tracker.close(0)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class WandbTracker:
    """Puts events into a queue, from which a thread writes them to W&B, and shows W&B's messages on the terminal.

    failure: which part of the run W&B did not get and why, if any. where: the run's page, or the command that uploads
    it, once known.
    """

    def __init__(self, run: WandbRun, terminal: Tracker) -> None:
        self.failure: str | None = None
        self.where = ""
        self._run = run
        self._terminal = terminal
        self._events: queue.SimpleQueue[Callable[[SearchLog], None] | int] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._has_begun = False
        self._pool_at = -float("inf")

    def start(self) -> None:
        if self._run.mode == "online" and not _has_credentials():
            self._fail("no key: set WANDB_API_KEY, or use --tracking.wandb offline")
        else:
            try:  # in this thread, as it is about to import torch: imports in two threads can see half a module
                import moe_evo.tracking.wandb_log  # noqa: F401
            except ImportError as error:
                self._fail(f"cannot be imported ({error})")
            else:
                self._thread.start()
        self._say()

    def message(self, text: str) -> None:
        """Does nothing: the terminal shows lines."""

    def stage(
        self, title: str, total: int, done: int = 0, unit: str = "evaluation", pace_s: float | None = None
    ) -> None:
        """Does nothing: the terminal shows stages."""

    def advanced(self, number: int, note: str = "") -> None:
        """Does nothing: the terminal shows stages."""

    def evaluated(self, individual: Individual, best: Individual | None, phase: str) -> None:
        """Does nothing: `recorded` gets the same outcome, with search and split."""

    def recorded(self, search: str, split: str, individual: Individual) -> None:
        now = time.monotonic()
        self._put(lambda log: log.recorded(search, split, individual, now))

    def told(self, history: Sequence[tuple[str, str, Individual]]) -> None:
        """Pass on the outcomes in the journal when this process began, as (search, split, individual)."""
        self._put(lambda log: log.told(history))

    def pool(self, news: PoolNews) -> None:
        now = time.monotonic()
        if news.status.gangs and now - self._pool_at > _POOL_INTERVAL_S:
            self._pool_at = now
            self._put(lambda log: log.pool(news.status))

    def measured(self, values: Mapping[str, float]) -> None:
        self._put(lambda log: log.measured(values))

    def finished(self, result: RunResult, files: Sequence[Path]) -> None:
        self._put(lambda log: log.finished(result, files))

    def close(self, exit_code: int) -> None:
        """End the W&B run; waits at most the finish timeout and a few seconds, and less after an error."""
        if self._thread.is_alive():
            self._events.put(exit_code)
            limit_s = _GRACE_S
            if self.failure is None:
                limit_s += self._run.finish_timeout_s if self._has_begun else self._run.begin_timeout_s
            self._thread.join(limit_s)
            if self._thread.is_alive():
                self._fail(f"no answer for {limit_s:.0f} s")
                self._end_service(kill=True)
                self._thread.join(_GRACE_S)
        self._say()

    def _put(self, event: Callable[[SearchLog], None]) -> None:
        if self._thread.is_alive():
            self._events.put(event)
        self._say()

    def _show(self, where: str) -> None:
        self.where = where
        self._messages.put(f"W&B: {where}")

    def _say(self) -> None:
        """Print the messages of the W&B thread; called in the driver's thread, which alone may print."""
        while not self._messages.empty():
            self._terminal.message(self._messages.get())

    def _fail(self, reason: str) -> None:
        """Show once that W&B did not get everything, with the reason."""
        if self.failure is None:
            self.failure = " ".join(reason.split())[:300]
            self._messages.put(f"W&B: {self.failure}; {self._run.without_it}")

    def _work(self) -> None:
        try:
            self._write()
        except Exception as error:  # noqa: BLE001 - the end of the thread: no error of W&B may end a search
            self._fail(str(error) or type(error).__name__)
        self._end_service()

    def _end_service(self, *, kill: bool = False) -> None:
        """End W&B's service process, if it is still there."""
        from moe_evo.tracking.wandb_log import teardown

        with suppress(Exception):
            try:
                teardown(kill=kill)
            except LookupError as error:
                self._messages.put(f"W&B: {error}")

    def _write(self) -> None:
        from moe_evo.tracking.wandb_log import SearchLog, begin, end

        run = begin(self._run, lambda: self._fail("the upload was stopped, by the service or in its pages"))
        if self._run.mode == "online":
            self._show(str(run.url))
        self._has_begun = True
        log = SearchLog(
            run,
            num_rows=self._run.num_rows,
            fitness_label=self._run.fitness_label,
            step_metric=self._run.step_metric,
        )
        while not isinstance(event := self._events.get(), int):
            try:
                event(log)
            except Exception as error:  # noqa: BLE001 - after one refused table, curves are still written
                self._fail(str(error) or type(error).__name__)
        log.close()
        if trouble := end(run, event):
            self._fail(trouble)
        elif self._run.mode == "offline":
            self._show(f"wandb sync {run.settings.sync_dir}")


def _has_credentials() -> bool:
    """Whether wandb would find a key without asking for it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    paths = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in [Path(one).expanduser() for one in paths if one]:
        with suppress(OSError, netrc.NetrcParseError):
            return netrc.netrc(path).authenticators(host) is not None
    return False
