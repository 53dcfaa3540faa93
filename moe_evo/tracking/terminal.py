"""Shows the progress of a run: a live bar on a terminal, plain lines elsewhere, such as in a log file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from moe_evo.evaluation.pool import PoolNews, PoolStatus
from moe_evo.genomes.population import Evaluation, Individual
from moe_evo.records.result import RunResult
from moe_evo.report.screen import screen

_PLAIN_INTERVAL_S = 5.0
_LOADING_INTERVAL_S = 30.0
_MOST_GANGS = 16  # rows of the live table
_TRUSTED = 5  # so many evaluations of an earlier process count beside those of this one in the rate


class _ProgressWithGangs(Progress):
    """Progress bars, and below them the gangs."""

    status = PoolStatus()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.status.gangs:
            yield _gang_table(self.status)


def _gang_table(status: PoolStatus) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("gang", justify="right")
    for title in ("state", "node"):
        table.add_column(title)
    for title in ("evaluations", "rate", "restarts"):
        table.add_column(title, justify="right")
    for gang in status.gangs[:_MOST_GANGS]:
        state = f"{gang.state} {gang.progress}".rstrip()
        rate = f"{gang.evaluations_per_s:.1f}/s" if gang.evaluations else ""
        table.add_row(str(gang.number), state, gang.node, str(gang.evaluations), rate, str(gang.restarts))
    if len(status.gangs) > _MOST_GANGS:
        table.add_row("", f"and {len(status.gangs) - _MOST_GANGS} more")
    return table


def _in_words(status: PoolStatus) -> str:
    """The gangs in one line, as in '3 busy, 1 loading; 5 waiting'."""
    states = Counter(gang.state for gang in status.gangs)
    gangs = ", ".join(f"{number} {state}" for state, number in states.items())
    parts = [f"gangs: {gangs}", f"queue {status.waiting}"]
    if status.restarts:
        parts.append(f"{status.restarts} restarts")
    if status.runs > 1:
        parts.append(f"shared by {status.runs} runs")
    return ", ".join(parts)


class TerminalTracker:
    """Writes to stderr, so that standard output has only results. Use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or screen(stderr=True)
        self._live = self._console.is_terminal
        self._progress = _ProgressWithGangs(
            TextColumn("{task.description:<26}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._total = self._done = self._done_before = 0
        self._started = self._last_line = 0.0
        self._pace_s: float | None = None
        self._failures = 0
        self._status = PoolStatus()
        self._status_line = 0.0

    def __enter__(self) -> TerminalTracker:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._progress.stop()

    def message(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stage(
        self, title: str, total: int, done: int = 0, unit: str = "evaluation", pace_s: float | None = None
    ) -> None:
        """Begin a bar of `total` evaluations or other units, `done` of which an earlier process made.

        pace_s: the seconds that each of those took, all evaluators together, if that is known.
        """
        self._title, self._total, self._done, self._done_before = title, total, done, done
        self._started = self._last_line = time.monotonic()
        self._pace_s = pace_s
        self._failures = 0
        left = self._left() if pace_s is not None and done < total else ""
        if self._live:
            self._task = self._progress.add_task(title, total=total, completed=done, rate="", left=left, note="")
        else:
            resumed = f", {done} done before" if done else ""
            self.message(f"{title}: {total} {unit}{'s' if total != 1 else ''}{resumed}{left and f', {left}'}")

    def evaluated(self, individual: Individual, best: Individual | None, phase: str) -> None:
        """Advance the bar by one evaluation."""
        self._failures += not isinstance(individual.outcome, Evaluation)
        self.advanced(1, self._note(best, phase))

    def advanced(self, number: int, note: str = "") -> None:
        """Advance the bar; note: shown beside it."""
        self._done += number
        rate = self._rate_label()
        if self._task is not None and self._live:
            self._progress.update(self._task, completed=self._done, rate=rate, left=self._left(), note=note)
        elif self._done == self._total or time.monotonic() - self._last_line > _PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            self.message(f"{self._title}: {self._done}/{self._total}  {rate}  {self._left()}  {note}")

    def recorded(self, search: str, split: str, individual: Individual) -> None:
        """Shows nothing: `evaluated` shows the same outcome."""

    def measured(self, values: Mapping[str, float]) -> None:
        """Shows nothing: notes of `advanced` tell the losses."""

    def finished(self, result: RunResult, files: Sequence[Path]) -> None:
        """Shows nothing: the command prints the result."""

    def pool(self, news: PoolNews) -> None:
        """Show events of gangs as lines, and their states below the bar; without a bar, as lines until one is ready."""
        self._progress.status = self._status = news.status
        for event in news.events:
            self.message(f"gang {event.gang} {event.kind.replace('_', ' ')}: {event.detail}")
        gangs = news.status.gangs
        is_serving = any(gang.state in ("ready", "busy") for gang in gangs)
        if gangs and not is_serving and not self._live:
            now = time.monotonic()
            if now - self._status_line > _LOADING_INTERVAL_S:
                self._status_line = now
                progress = next((f" ({gang.progress})" for gang in gangs if gang.progress), "")
                self.message(f"{_in_words(news.status)}{progress}")

    def _rate(self) -> float:
        """Evaluations a second; at the beginning those of an earlier process count, too, if their pace is known."""
        done, elapsed_s = self._done - self._done_before, time.monotonic() - self._started
        if self._pace_s is not None:
            done, elapsed_s = done + _TRUSTED, elapsed_s + _TRUSTED * self._pace_s
        return max(done, 1) / max(elapsed_s, 1e-6)

    def _rate_label(self) -> str:
        rate = self._rate()
        return f"{rate:.1f}/s" if rate >= 0.1 else f"{1 / rate:.0f} s each"

    def _left(self) -> str:
        """The time that is left, at this rate."""
        left_s = (self._total - self._done) / self._rate()
        if left_s < 100:
            return f"{left_s:.0f} s left"
        return f"{left_s / 60:.0f} min left" if left_s < 6000 else f"{left_s / 3600:.1f} h left"

    def _note(self, best: Individual | None, phase: str) -> str:
        parts = [phase] if phase else []
        if best is not None:
            parts.append(f"best {best.evaluation.fitness:.4f} (#{best.number})")
        if self._failures:
            parts.append(f"{self._failures} failed")
        if self._status.gangs and not self._live:
            parts.append(_in_words(self._status))
        return "  ".join(parts)
