"""`Pool`: takes evaluation requests and returns outcomes; and the news that it tells about itself.

`LocalPool` evaluates in this process, `RayPool` on gangs of Ray actors; both pass one contract suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moe_evo.criteria.questions import Question
from moe_evo.criteria.sums import Observation
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import ExampleScores, Outcome
from moe_evo.genomes.space import ModelShape
from moe_evo.tasks.answered import Answered


@dataclass(frozen=True)
class Request:
    """Evaluate the genome of candidate `number` of `search` on all examples of `split`, or of a `Sample` of it.

    rival: scores of an individual; where the genome is surely worse it need not be scored to the end.
    """

    search: str
    number: int
    genome: Genome
    split: str
    rival: ExampleScores | None = None


GangState = Literal["waiting", "loading", "ready", "busy"]


@dataclass(frozen=True)
class GangStatus:
    """One gang as it is now.

    state: 'waiting' for free resources on the cluster, 'loading' its model, 'ready', or 'busy'. node: address of
    rank 0. pids: its ranks' processes. restarts: how often it was built anew. progress: of loading, in words.
    """

    number: int
    state: GangState = "waiting"
    node: str = ""
    pids: tuple[int, ...] = ()
    evaluations: int = 0
    evaluations_per_s: float = 0.0
    restarts: int = 0
    progress: str = ""


@dataclass(frozen=True)
class PoolStatus:
    """All gangs and the queue before them; a pool without gangs has none to show.

    waiting: evaluations that no gang has taken. under_way: those that one has. runs: how many share the gangs.
    """

    gangs: tuple[GangStatus, ...] = ()
    waiting: int = 0
    under_way: int = 0
    evaluations: int = 0
    failures: int = 0
    restarts: int = 0
    runs: int = 1


@dataclass(frozen=True)
class PoolEvent:
    """Something that happened to a gang: kind is a word to count by, detail a line to read.

    at: seconds since the epoch.
    """

    at: float
    gang: int
    kind: Literal["waiting", "placed", "ready", "broken", "released", "quarantined", "batch_halved", "note"]
    detail: str


@dataclass(frozen=True)
class PoolNews:
    """What changed since the last news."""

    status: PoolStatus = field(default_factory=PoolStatus)
    events: Sequence[PoolEvent] = ()


Listener = Callable[[PoolNews], None]


class Pool(Protocol):
    """Evaluators behind a queue. Outcomes come in the order in which they are ready.

    listener: called with what happens to the evaluators, within calls of `next_outcomes` and
    `ask` only.
    """

    listener: Listener

    @property
    def shape(self) -> ModelShape: ...

    @property
    def free_slots(self) -> int:
        """How many requests are worth submitting now: they would start, or wait in a short queue."""

    def submit(self, requests: Sequence[Request]) -> None: ...

    def next_outcomes(self) -> list[tuple[Request, Outcome]]:
        """Wait for outcomes, at least one; call only while requests are under way."""

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[Question, Observation[Any]]]:
        """Observations of the model's experts, as they are ready; only while no request is under way."""

    def answered(self, genome: Genome | None, split: str, first: int | None = None) -> tuple[Answered, ...]:
        """See `Evaluator.answered`; only while no request is under way."""

    def close(self) -> None:
        """Release everything; requests that are under way are lost."""
