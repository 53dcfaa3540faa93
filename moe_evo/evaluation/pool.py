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
    """One evaluator in this process; up to `genomes_per_request` genomes are evaluated together.

    Slots are free only while nothing is under way, so what a search knew when it proposed a
    candidate depends on the order of candidates alone, and an interrupted run repeats exactly.
    """

    def __init__(self, evaluator: Evaluator, genomes_per_request: int) -> None:
        self._evaluator = evaluator
        self._genomes_per_request = genomes_per_request
        self._waiting: deque[Request] = deque()
        self._ready: deque[tuple[Request, Outcome]] = deque()

    @property
    def shape(self) -> ModelShape:
        return self._evaluator.model.shape

    @property
    def free_slots(self) -> int:
        under_way = len(self._waiting) + len(self._ready)
        return 0 if under_way else self._genomes_per_request

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)

    def next_outcome(self) -> tuple[Request, Outcome]:
        if not self._ready:
            assert self._waiting, "next_outcome was called with no request under way"
            self._evaluate_next_batch()
        return self._ready.popleft()

    def _evaluate_next_batch(self) -> None:
        split = self._waiting[0].split
        batch: list[Request] = []
        while self._waiting and len(batch) < self._genomes_per_request and self._waiting[0].split == split:
            batch.append(self._waiting.popleft())
        outcomes = self._evaluator.evaluate([request.genome for request in batch], split)
        self._ready.extend(zip(batch, outcomes, strict=True))

    def frequency_pruning(self, space: SearchSpace) -> Genome:
        return frequency_pruning(self._evaluator, space)
