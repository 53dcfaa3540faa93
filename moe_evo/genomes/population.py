"""Candidates, their outcomes, and populations of evaluated individuals: frozen values.

Fitness is higher-is-better everywhere. A failure is a type, never a sentinel number.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from moe_evo.genomes.genome import Genome


@dataclass(frozen=True)
class Candidate:
    """A genome that a search proposes, with its lineage.

    number: position in the search, from 0. operator: what made it. parents: candidate numbers.
    """

    number: int
    genome: Genome
    operator: str
    parents: tuple[int, ...] = ()


RankKey = tuple[bool, float, float]

ExampleScores = Mapping[str, npt.NDArray[np.float64]]
"""Scores of a split's examples by task, (N,) each, in the order of the examples."""


ACTIVE_EXPERTS = "active_experts"
"""The metric of every task that is evaluated with dynamic routing: experts that a token ran, mean over MoE layers."""


def mean_active_experts(metrics: Mapping[str, float]) -> float | None:
    """Mean over tasks of that metric; None without dynamic routing. metrics: `task/metric` -> value."""
    found = [value for name, value in metrics.items() if name.endswith(f"/{ACTIVE_EXPERTS}")]
    return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    fitness: the score that is searched for. tie_break: orders equal fitness (mean log-likelihood of
    the right answers). standard_error: of the fitness over examples. num_examples: on which the fitness
    rests. metrics: `task/metric` -> value. scores: of every example by task, (N,) each; None where the
    evaluation was stopped before it had seen all, as it was worse than a rival. sample: number of the sample of the
    search split on which it rests; None for all of a split.
    """

    fitness: float
    tie_break: float = 0.0
    standard_error: float = 0.0
    num_examples: int = 0
    duration_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    scores: ExampleScores | None = field(default_factory=dict, hash=False, compare=False)
    sample: int | None = None

    def __post_init__(self) -> None:
        assert math.isfinite(self.fitness), "a fitness that is not finite is an EvaluationFailure"
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))

    @property
    def is_stopped(self) -> bool:
        """Whether the fitness is an estimate from some of the examples."""
        return self.scores is None

    @property
    def rank_key(self) -> RankKey:
        """Greater is better. A stopped evaluation ranks below every complete one."""
        return (not self.is_stopped, self.fitness, self.tie_break)

    def __reduce__(self) -> tuple[type[Evaluation], tuple[object, ...]]:
        numbers = (self.fitness, self.tie_break, self.standard_error, self.num_examples, self.duration_s)
        return (Evaluation, (*numbers, dict(self.metrics), self.scores, self.sample))


@dataclass(frozen=True)
class EvaluationFailure:
    """An evaluation that gave no fitness; kind is a word to count by, reason a line to read."""

    kind: str
    reason: str
    duration_s: float = 0.0


Outcome = Evaluation | EvaluationFailure


@dataclass(frozen=True)
class Individual:
    """A candidate with its outcome."""

    candidate: Candidate
    outcome: Outcome

    @property
    def genome(self) -> Genome:
        return self.candidate.genome

    @property
    def number(self) -> int:
        return self.candidate.number

    @property
    def evaluation(self) -> Evaluation:
        """The outcome of an individual that is known to have succeeded."""
        assert isinstance(self.outcome, Evaluation), f"candidate {self.number} failed"
        return self.outcome


@dataclass(frozen=True)
class Population:
    """The individuals that were evaluated with success, in the order in which they finished.

    ranked: best first: by fitness, then tie-break, then the earlier candidate; those that were stopped last.
    ranking: the same, where whoever makes the population knows it already.
    """

    individuals: tuple[Individual, ...] = ()
    ranking: InitVar[Iterable[Individual] | None] = None
    ranked: tuple[Individual, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self, ranking: Iterable[Individual] | None) -> None:
        ranked = sorted(self.individuals, key=_descending) if ranking is None else ranking
        object.__setattr__(self, "ranked", tuple(ranked))

    def with_outcomes(self, individuals: Iterable[Individual]) -> Population:
        """This population and those of `individuals` that did not fail."""
        succeeded = [one for one in individuals if isinstance(one.outcome, Evaluation)]
        ranked = list(self.ranked)
        for one in succeeded:  # a search asks for the ranking after every outcome: do not sort it anew
            insort(ranked, one, key=_descending)
        return Population((*self.individuals, *succeeded), ranked)

    def __len__(self) -> int:
        return len(self.individuals)

    def __iter__(self) -> Iterator[Individual]:
        return iter(self.individuals)

    def __getitem__(self, index: int) -> Individual:
        return self.individuals[index]

    @cached_property
    def fitness(self) -> npt.NDArray[np.float64]:
        """(N,) fitness in order of completion."""
        return np.array([one.evaluation.fitness for one in self.individuals], dtype=np.float64)

    @property
    def best(self) -> Individual:
        return self.ranked[0]

    @cached_property
    def complete(self) -> Population:
        """The part of the population that was scored on all examples."""
        stopped = any(one.evaluation.is_stopped for one in self.individuals)
        return Population(tuple(one for one in self.individuals if not one.evaluation.is_stopped)) if stopped else self

    @cached_property
    def prunings(self) -> Population:
        """The part of the population that only prunes."""
        return Population(tuple(one for one in self.individuals if one.genome.is_pruning))


def _descending(individual: Individual) -> tuple[float, float, float, int]:
    is_complete, fitness, tie_break = individual.evaluation.rank_key
    return (-is_complete, -fitness, -tie_break, individual.number)
