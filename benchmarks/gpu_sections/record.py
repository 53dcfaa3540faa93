"""What a section of the GPU benchmark found, point by point, and how long it may take."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_evo.errors import MoeEvoError
from moe_evo.models.transformers_border import LIBRARY_ERRORS, one_line

POINT_ERRORS = (*LIBRARY_ERRORS, MoeEvoError, AssertionError, ArithmeticError, MemoryError)
"""What a point may raise without ending its section; CUDA's errors are RuntimeErrors."""


class Record:
    """The points of one section: figures, failures, and what was left out, with the reason.

    budget_s: no point begins later than so many seconds from now. changed: called after every point.
    """

    def __init__(self, budget_s: float, changed: Callable[[], None]) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.budget_s = budget_s
        self.seconds: float | None = None  # where the section is over
        self._started = time.monotonic()
        self._share = 1.0
        self._changed = changed

    @property
    def left_s(self) -> float:
        """Seconds in which points may still begin."""
        return self._started + self._share * self.budget_s - time.monotonic()

    def may_use(self, share: float) -> None:
        """Let points begin up to this share of the budget, so that something is left for those that follow."""
        self._share = share

    def attempt(self, point: str, measure: Callable[[], Mapping[str, Any]], needs_s: float = 0.0) -> bool:
        """Measure a point if there is time for it; whether there are figures of it now.

        needs_s: how long it will take, where that is known.
        """
        if self.left_s < needs_s or self.left_s <= 0:
            self.skip(point, f"the section's {self.budget_s:.0f} s are used up")
            return False
        try:
            self.figures[point] = dict(measure())
        except POINT_ERRORS as error:
            self.failed[point] = failure(error)
        self._changed()
        if point in self.failed:  # only now, as an error holds on to the tensors of the calls that it went through
            free_memory()
        return point in self.figures

    def skip(self, point: str, reason: str) -> None:
        """Note why there are no figures of a point."""
        self.skipped[point] = reason
        self._changed()

    def fail(self, error: Exception) -> None:
        """Note what ended the whole section."""
        self.failed["the section"] = failure(error)
        self._changed()

    def finish(self) -> None:
        """Nothing more will come."""
        self.seconds = time.monotonic() - self._started
        self._changed()

    def to_json(self) -> dict[str, Any]:
        """Plain data; whatever is empty is left out."""
        parts = {"figures": self.figures, "failed": self.failed, "skipped": self.skipped}
        timing = {"budget_s": self.budget_s, "seconds": self.seconds}
        return {**timing, **{name: part for name, part in parts.items() if part}}


def failure(error: Exception) -> dict[str, Any]:
    """Type, message and the last lines of the traceback."""
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return {"type": type(error).__name__, "message": one_line(error), "traceback": [line[:200] for line in lines[-12:]]}


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
