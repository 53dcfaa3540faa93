"""Where evaluation requests go: `Pool`, and `LocalPool`, which evaluates in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_evo.criteria.frequency import frequency_pruning
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genome import Genome
from moe_evo.population import Outcome
from moe_evo.space import ModelShape, SearchSpace


@dataclass(frozen=True)
class Request:
    """Evaluate the genome of candidate `number` of `search` on all examples of `split`."""

    search: str
    number: int
    genome: Genome
    split: str


class Pool(Protocol):
    """Evaluators behind a queue. Outcomes come in the order in which they are ready."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def free_slots(self) -> int:
        """How many requests would start, or be queued to advantage, if they were submitted now."""

    def submit(self, requests: Sequence[Request]) -> None: ...

    def next_outcome(self) -> tuple[Request, Outcome]:
        """Wait for the next outcome; call only while requests are under way."""

    def frequency_pruning(self, space: SearchSpace) -> Genome:
        """The pruning that keeps the experts which the search split uses most."""


class LocalPool:
    """One evaluator in this process, one request at a time.

    A slot is free only while nothing is under way, so what a search knew when it proposed a candidate
    depends on the order of candidates alone, and an interrupted run repeats exactly.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._waiting: deque[Request] = deque()

    @property
    def shape(self) -> ModelShape:
        return self._evaluator.model.shape

    @property
    def free_slots(self) -> int:
        return 0 if self._waiting else 1

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)

    def next_outcome(self) -> tuple[Request, Outcome]:
        assert self._waiting, "next_outcome was called with no request under way"
        request = self._waiting.popleft()
        return request, self._evaluator.evaluate([request.genome], request.split)[0]

    def frequency_pruning(self, space: SearchSpace) -> Genome:
        with self._evaluator.within_memory():
            return frequency_pruning(self._evaluator, space)
