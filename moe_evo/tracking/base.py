"""`Tracker`: shows the progress of a run to people. A run never reads from it, so that its failure does no harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from moe_evo.evaluation.pool import PoolNews
from moe_evo.genomes.population import Individual
from moe_evo.records.result import RunResult


class Tracker(Protocol):
    """Gets the events of a run, by calls in the driver's thread.

    message: a line to show. stage: a stage of `total` evaluations, or of what else `unit` says, begins, `done` of which
    an earlier process made, one every `pace_s` seconds where that is known. evaluated: an evaluation is done. advanced:
    so many others are. recorded: an outcome was written into the journal; called once for every candidate of a search
    (MAIN, RANDOM, REFERENCE) and split. pool: events and status of the gangs. measured: a point of the curves of a
    recovery, by key, in the order of steps; called for what an earlier process did, too. finished: the result, and the
    files of the winners.
    """

    def message(self, text: str) -> None: ...

    def stage(
        self, title: str, total: int, done: int = 0, unit: str = "evaluation", pace_s: float | None = None
    ) -> None: ...

    def advanced(self, number: int, note: str = "") -> None: ...

    def evaluated(self, individual: Individual, best: Individual | None, phase: str) -> None: ...

    def recorded(self, search: str, split: str, individual: Individual) -> None: ...

    def pool(self, news: PoolNews) -> None: ...

    def measured(self, values: Mapping[str, float]) -> None: ...

    def finished(self, result: RunResult, files: Sequence[Path]) -> None: ...


class Trackers:
    """Passes every event to several trackers."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def message(self, text: str) -> None:
        for tracker in self._trackers:
            tracker.message(text)

    def stage(
        self, title: str, total: int, done: int = 0, unit: str = "evaluation", pace_s: float | None = None
    ) -> None:
        for tracker in self._trackers:
            tracker.stage(title, total, done, unit, pace_s)

    def advanced(self, number: int, note: str = "") -> None:
        for tracker in self._trackers:
            tracker.advanced(number, note)

    def evaluated(self, individual: Individual, best: Individual | None, phase: str) -> None:
        for tracker in self._trackers:
            tracker.evaluated(individual, best, phase)

    def recorded(self, search: str, split: str, individual: Individual) -> None:
        for tracker in self._trackers:
            tracker.recorded(search, split, individual)

    def pool(self, news: PoolNews) -> None:
        for tracker in self._trackers:
            tracker.pool(news)

    def measured(self, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.measured(values)

    def finished(self, result: RunResult, files: Sequence[Path]) -> None:
        for tracker in self._trackers:
            tracker.finished(result, files)
