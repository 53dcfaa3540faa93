"""The pool without a cluster: one evaluator in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from moe_evo.criteria.answering import answer
from moe_evo.criteria.questions import Question
from moe_evo.criteria.sums import Observation
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.pool import Listener, Request
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Outcome
from moe_evo.genomes.space import ModelShape
from moe_evo.tasks.answered import Answered


class LocalPool:
    """One evaluator in this process, one request at a time.

    A slot is free only while nothing is under way. So a search knows all earlier outcomes when it proposes a candidate,
    and an interrupted run repeats exactly.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self._waiting: deque[Request] = deque()
        self.listener: Listener = lambda news: None

    @property
    def shape(self) -> ModelShape:
        return self.evaluator.model.shape

    @property
    def free_slots(self) -> int:
        return 0 if self._waiting else 1

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)

    def next_outcomes(self) -> list[tuple[Request, Outcome]]:
        assert self._waiting, "next_outcomes was called with no request under way"
        request = self._waiting.popleft()
        return [(request, self.evaluator.evaluate([request.genome], request.split, rivals=[request.rival])[0])]

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Observation[Any]]]:
        return ((question, answer(question, self.evaluator)) for question in questions)

    def answered(self, genome: Genome | None, split: str, first: int | None = None) -> tuple[Answered, ...]:
        return self.evaluator.answered(genome, split, first)

    def close(self) -> None:
        self._waiting.clear()
