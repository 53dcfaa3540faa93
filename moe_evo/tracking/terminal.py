"""Progress of a run where a person looks: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moe_evo.population import Evaluation, Individual

_PLAIN_INTERVAL_S = 5.0


class TerminalTracker:
    """Writes to stderr, so that standard output holds results alone. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._total = self._done = self._done_before = 0
        self._started = self._last_line = 0.0
        self._failures = 0

    def __enter__(self) -> TerminalTracker:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._progress.stop()

    def message(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stage(self, title: str, total: int, done: int = 0) -> None:
        """Begin `total` steps, `done` of which an earlier process did."""
        self._title, self._total, self._done, self._done_before = title, total, done, done
        self._started = self._last_line = time.monotonic()
        self._failures = 0
        if self._live:
            self._task = self._progress.add_task(title, total=total, completed=done, rate="", note="")
        else:
            resumed = f", {done} done before" if done else ""
            self.message(f"{title}: {total} evaluation{'s' if total != 1 else ''}{resumed}")

    def evaluated(self, individual: Individual, best: Individual | None, phase: str) -> None:
        """One more step is done."""
        self._done += 1
        self._failures += not isinstance(individual.outcome, Evaluation)
        rate = f"{self._rate():.1f}/s"
        note = self._note(best, phase)
        if self._task is not None and self._live:
            self._progress.update(self._task, completed=self._done, rate=rate, note=note)
        elif self._done == self._total or time.monotonic() - self._last_line > _PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            left_s = (self._total - self._done) / self._rate()
            self.message(f"{self._title}: {self._done}/{self._total}  {rate}  {left_s:.0f} s left  {note}")

    def _rate(self) -> float:
        elapsed_s = max(time.monotonic() - self._started, 1e-6)
        return max(self._done - self._done_before, 1) / elapsed_s

    def _note(self, best: Individual | None, phase: str) -> str:
        parts = [phase] if phase else []
        if best is not None:
            parts.append(f"best {best.evaluation.fitness:.4f} (#{best.number})")
        if self._failures:
            parts.append(f"{self._failures} failed")
        return "  ".join(parts)
