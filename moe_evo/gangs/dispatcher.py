"""`Dispatcher`: decides which gang evaluates what next. A plain state machine without Ray, clocks or waiting.

Runs get fair turns. A job that several runs ask for is done once, and its result is cached. Jobs whose gang broke are
tried again one by one, so that only the genome that breaks gangs is given up.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, TypeAlias

from moe_evo.criteria.questions import Answers, Question
from moe_evo.criteria.sums import Observation
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, EvaluationFailure, ExampleScores, Outcome
from moe_evo.tasks.answered import Answered
from moe_evo.tasks.samples import without_number

Answer: TypeAlias = Outcome | Observation[Any] | tuple[Answered, ...]

Key = tuple[str, str, str, str]

_REQUEST_S = 0.2  # sending a request costs little beside so long a request
_CACHE_SIZE = 100_000


@dataclass(frozen=True)
class Job:
    """A genome to evaluate on a split of the tasks `work`, or a question about the experts.

    rival: see `Request`; another rival may lead to another outcome, so it is a part of the key.
    """

    work: str
    split: str = ""
    genome: Genome | None = None
    rival: ExampleScores | None = None
    question: Question | None = None

    @property
    def name(self) -> str:
        """In messages."""
        if isinstance(self.question, Answers):
            return "answering examples"
        if self.question is not None:
            return f"observing the experts ({type(self.question).__name__.lower()})"
        return f"genome {self.genome.digest[:8]}" if self.genome is not None else "the full model"

    @property
    def kind(self) -> tuple[str, str]:
        """Equal for jobs that take about equally long."""
        return (self.work, without_number(self.split) if self.question is None else f"{self.question.key}?")

    @cached_property
    def key(self) -> Key:
        if self.question is not None:
            return (*self.kind, "", "")
        rival = sha256(b"".join(one.tobytes() for one in self.rival.values())).hexdigest() if self.rival else ""
        return (self.work, self.split, self.genome.digest if self.genome is not None else "", rival)


Batch = tuple[Job, ...]
"""Jobs for one request: genomes on one split of one work, or a single question."""


@dataclass
class _Run:
    """One run's queue. turns: how many of its jobs were begun, beginning at `Dispatcher._fair_start`."""

    turns: float = 0.0
    queue: deque[Key] = field(default_factory=deque)
    answers: list[tuple[int, Answer]] = field(default_factory=list)


@dataclass
class _Entry:
    """A job that is not done. wanted_by: each run that asked for it, with the run's own number of the job."""

    job: Job
    wanted_by: list[tuple[str, int]]
    attempts: int = 0


class Dispatcher:
    """Jobs of several runs on their way to gangs and back.

    max_batch: most jobs in a batch. max_attempts: a job that broke so many gangs fails.
    """

    def __init__(self, max_batch: int, max_attempts: int) -> None:
        self._max_batch = max_batch
        self._max_attempts = max_attempts
        self._runs: dict[str, _Run] = {}
        self._entries: dict[Key, _Entry] = {}
        self._under_way: set[Key] = set()
        self._turn = 0.0
        self._cache: OrderedDict[Key, Answer] = OrderedDict()
        self._seconds: float | None = None  # a job takes, by the latest batches
        self._longest_s: dict[tuple[str, str], float] = {}
        self.evaluations = self.failures = 0

    @property
    def runs(self) -> frozenset[str]:
        return frozenset(self._runs)

    @property
    def waiting(self) -> int:
        return len(self._entries) - len(self._under_way)

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    @property
    def batch_size(self) -> int:
        """How many evaluations make one request worth its cost."""
        if self._seconds is None:
            return 1
        return max(1, min(self._max_batch, math.ceil(_REQUEST_S / max(self._seconds, 1e-6))))

    def longest_s(self, batch: Batch) -> float | None:
        """The longest that a job on the same examples has taken; None before the first."""
        return self._longest_s.get(batch[0].kind)

    def slots(self, num_gangs: int) -> int:
        """How many jobs keep `num_gangs` gangs busy until more are submitted: a batch each, and a reserve."""
        return (num_gangs + math.ceil(num_gangs / 4)) * self.batch_size

    def join(self, run: str) -> None:
        self._runs.setdefault(run, _Run(turns=self._fair_start()))

    def leave(self, run: str) -> None:
        """Forget a run, and drop its waiting jobs that no other run wants."""
        self._runs.pop(run, None)
        for key, entry in list(self._entries.items()):
            entry.wanted_by = [(name, number) for name, number in entry.wanted_by if name != run]
            if key in self._under_way:
                continue
            if not entry.wanted_by:
                del self._entries[key]
            elif not any(key in other.queue for other in self._runs.values()):
                self._runs[entry.wanted_by[0][0]].queue.append(key)

    def submit(self, run: str, jobs: Sequence[tuple[int, Job]]) -> None:
        """Queue jobs, each with the run's own number; the results of cached ones are ready at once."""
        mine = self._runs[run]
        if not mine.queue:
            mine.turns = max(mine.turns, self._fair_start())
        for number, job in jobs:
            key = job.key
            if key in self._cache:
                self._cache.move_to_end(key)
                mine.answers.append((number, self._cache[key]))
            elif key in self._entries:
                self._entries[key].wanted_by.append((run, number))
            else:
                self._entries[key] = _Entry(job, [(run, number)])
                mine.queue.append(key)

    def take(self, num_gangs: int) -> Batch:
        """The next batch for one of `num_gangs` gangs; () where nothing waits.

        The run with the fewest turns is next. Towards the end batches shrink so that all gangs have some.
        """
        waiting = [run for run in self._runs.values() if run.queue]
        if not waiting:
            return ()
        run = min(waiting, key=lambda one: one.turns)
        size = min(self.batch_size, math.ceil(self.waiting / max(num_gangs, 1)))
        first = self._entries[run.queue.popleft()]
        keys = [first.job.key]
        while len(keys) < size and run.queue and _go_together(first, self._entries[run.queue[0]]):
            keys.append(run.queue.popleft())
        self._turn = run.turns
        run.turns += len(keys)
        self._under_way.update(keys)
        return tuple(self._entries[key].job for key in keys)

    def finish(self, batch: Batch, answers: Sequence[Answer], duration_s: float) -> None:
        """A gang has done a batch."""
        each_s = duration_s / len(batch)
        if batch[0].question is None:  # which takes as long as many evaluations, and comes before them
            self._seconds = each_s if self._seconds is None else 0.8 * self._seconds + 0.2 * each_s
        kind = batch[0].kind
        self._longest_s[kind] = max(self._longest_s.get(kind, 0.0), each_s)
        for job, answer in zip(batch, answers, strict=True):
            self._answer(job, answer)

    def give_back(self, batch: Batch, reason: str, *, blame: bool) -> list[Job]:
        """Take back the batch of a gang that broke; returns the jobs that are given up.

        blame: whether a job of the batch may have broken the gang. Only a job that ran alone is given up.
        """
        given_up = []
        for job in reversed(batch):
            entry = self._entries[job.key]
            entry.attempts += blame
            if len(batch) == 1 and entry.attempts >= self._max_attempts:
                gangs = f"{entry.attempts} gangs" if entry.attempts > 1 else "a gang"
                self._answer(job, EvaluationFailure("quarantined", f"broke {gangs}: {reason}"))
                given_up.append(job)
                continue
            self._under_way.discard(job.key)
            if entry.wanted_by:
                self._runs[entry.wanted_by[0][0]].queue.appendleft(job.key)
            else:
                del self._entries[job.key]
        return given_up

    @property
    def works(self) -> frozenset[str]:
        """Of jobs that are not done."""
        return frozenset(entry.job.work for entry in self._entries.values())

    def forget(self, work: str) -> None:
        """Drop the results of a work that no run has any more."""
        for key in [key for key in self._cache if key[0] == work]:
            del self._cache[key]
        for kind in [kind for kind in self._longest_s if kind[0] == work]:
            del self._longest_s[kind]

    def answers(self, run: str) -> list[tuple[int, Answer]]:
        """The results for a run since the last call, with the run's own numbers."""
        mine = self._runs[run]
        ready, mine.answers = mine.answers, []
        return ready

    def has_answers(self, run: str) -> bool:
        return bool(self._runs[run].answers)

    def _answer(self, job: Job, answer: Answer) -> None:
        entry = self._entries.pop(job.key)
        self._under_way.discard(job.key)
        if isinstance(answer, EvaluationFailure):
            self.failures += 1
        else:
            self._cache[job.key] = answer
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        self.evaluations += isinstance(answer, Evaluation | EvaluationFailure)
        for run, number in entry.wanted_by:
            self._runs[run].answers.append((number, answer))

    def _fair_start(self) -> float:
        """The turns that a new run begins with: those of the run that is served next, so that it gets its fair part."""
        return min((run.turns for run in self._runs.values() if run.queue), default=self._turn)


def _go_together(first: _Entry, second: _Entry) -> bool:
    """Whether two jobs may be in one request; a job that broke a gang, or is no evaluation, runs alone."""
    alone = first.attempts or second.attempts or first.job.question or second.job.question
    return not alone and (first.job.kind, first.job.split) == (second.job.kind, second.job.split)
