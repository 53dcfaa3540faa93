"""`Tracker`: where people look while a search runs. Nothing is ever read back; losing one loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from moe_evo.evaluation.pool import PoolNews
from moe_evo.genomes.population import Individual
from moe_evo.records.result import RunResult


class Tracker(Protocol):
    """Hears of a run as it goes on, in the driver's thread.

    message: a line to read. stage: `total` evaluations begin, `done` of which an earlier process did.
    evaluated: one of them is done. recorded: an outcome stands in the journal, told once for every
    candidate of a search (MAIN, RANDOM, REFERENCE) and split. pool: what gangs do. finished: the result,
    and the files of the winners.
    """

    def message(self, text: str) -> None: ...

    def stage(self, title: str, total: int, done: int = 0) -> None: ...

    def evaluated(self, individual: Individual, best: Individual | None, phase: str) -> None: ...

    def recorded(self, search: str, split: str, individual: Individual) -> None: ...

    def pool(self, news: PoolNews) -> None: ...

    def finished(self, result: RunResult, files: Sequence[Path]) -> None: ...


class Trackers:
    """Several trackers as one."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def message(self, text: str) -> None:
        for tracker in self._trackers:
            tracker.message(text)

    def stage(self, title: str, total: int, done: int = 0) -> None:
        for tracker in self._trackers:
            tracker.stage(title, total, done)

    def evaluated(self, individual: Individual, best: Individual | None, phase: str) -> None:
        for tracker in self._trackers:
            tracker.evaluated(individual, best, phase)

    def recorded(self, search: str, split: str, individual: Individual) -> None:
        for tracker in self._trackers:
            tracker.recorded(search, split, individual)

    def pool(self, news: PoolNews) -> None:
        for tracker in self._trackers:
            tracker.pool(news)

    def finished(self, result: RunResult, files: Sequence[Path]) -> None:
        for tracker in self._trackers:
            tracker.finished(result, files)
