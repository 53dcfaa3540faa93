"""`Observer`: what one-shot methods ask for observations of a model. It remembers them, in a file too if wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_evo.criteria.observation_file import StoredObservations, add_observations, load_observations
from moe_evo.criteria.questions import Question
from moe_evo.criteria.sums import Observation, together

Ask = Callable[[Sequence[Question]], Iterator[tuple[Question, Observation[Any]]]]
"""Sends questions to the process that holds the model; yields each with its observation, as they are ready."""


class Observer:
    """Observations of one model on some tasks.

    ask: as `Pool.ask`. tasks: the names of the tasks, each with a name that changes with its data. file: observations
    are read from it, and new ones are added as they come; it may hold other tasks', and other processes may add to
    it. message: called with the progress. blend: how many times each task counts (default: once).
    Raises ObservationError where the file holds something else.
    """

    def __init__(
        self,
        ask: Ask,
        tasks: Mapping[str, str],
        model_hash: str,
        file: Path | None = None,
        message: Callable[[str], None] = lambda text: None,
        blend: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._ask = ask
        self._tasks = tasks
        self._model_hash = model_hash
        self._file = file
        self._message = message
        self._blend = blend
        is_there = file is not None and file.is_file()
        self._answers = dict(load_observations(str(file), model_hash).answers) if is_there else {}

    def about_tasks(self, question: Question) -> dict[str, Observation[Any]]:
        """The observation of each task; under '' where the question is not about data."""
        asked = {name: replace(question, task=name) for name in (self._tasks if question.needs_data else [""])}  # type: ignore[type-var]
        keys = {name: self._key(one) for name, one in asked.items()}
        missing = [asked[name] for name, key in keys.items() if key not in self._answers]
        started = time.monotonic()
        if missing:
            self._message(f"observing the experts ({type(question).__name__.lower()})")
        for number, (one, answer) in enumerate(self._ask(missing) if missing else (), start=1):
            found = StoredObservations(self._model_hash, {self._key(one): answer})
            self._answers |= (found if self._file is None else add_observations(self._file, found)).answers
            rate = number / max(time.monotonic() - started, 1e-9)
            if number < len(missing):
                left_s = (len(missing) - number) / rate
                self._message(f"observed {one.task} ({number} of {len(missing)}, {left_s:.0f} s left)")
        return {name: self._answers[key] for name, key in keys.items()}

    def about(self, question: Question) -> Observation[Any]:
        """The observation of all tasks together."""
        answers = self.about_tasks(question)
        return together(one * self._blend.get(name, 1.0) for name, one in answers.items())

    def _key(self, question: Question) -> str:
        return replace(question, task=self._tasks.get(question.task, "")).key  # type: ignore[type-var]
