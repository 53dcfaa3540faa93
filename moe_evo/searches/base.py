"""`Search` proposes candidates and gets their outcomes; `Phase` is a part of its plan; `Archive` is its memory.

A search has no hidden state: candidate n depends only on `default_rng([seed, n])` and on the archive, and the
archive can be rebuilt from a run's journal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Individual, Population


class Search(Protocol):
    """Proposes candidates; a genome that was proposed or told before is not proposed again.

    ask: returns up to n candidates, fewer or none when the space is exhausted. tell: takes finished candidates, in
    any order and any number at a time. restore: takes the candidates that a process which died had asked for, in
    order. `tell` follows for those of them that are finished, and the search continues as if uninterrupted.

    A search is constructed from a space and a `SearchConfig`. One that can begin from given genomes, or with opinions
    about experts, also takes `wider`, `seeds` or `priors`, see `build_search`. Two static methods are optional:
    `phases(config, *, can_prune)` returns the plan as a list of `Phase`, and `parameters(config)` what a tracker
    records. Two attributes say what else it can do: `varies_num_kept = True`, choose how many experts each layer keeps;
    `has_objectives = True`, search a front of several objectives. `ArchiveSearch` has most of a search, and
    `moe_evo.testing.searches.SearchContract` tests a new one.

    >>> import numpy as np
    >>> from moe_evo import Candidate, Evaluation, Individual, ModelShape, SearchSpace
    >>> from moe_evo.config.search import SearchConfig
    >>> from moe_evo.genomes.operators import random_pruning
    >>> from moe_evo.searches.base import ArchiveSearch
    >>> class Draws(ArchiveSearch):
    ...     phase = "drawing"
    ...
    ...     def __init__(self, space, config):
    ...         super().__init__()
    ...         self.space, self.seed = space, config.seed
    ...
    ...     def _next(self):
    ...         number = self._archive.next_number
    ...         rng = np.random.default_rng([self.seed, number])
    ...         genomes = (random_pruning(self.space, rng) for _ in range(100))
    ...         new = next((one for one in genomes if one not in self._archive), None)
    ...         return None if new is None else Candidate(number, new, "random_pruning")
    >>> shape = ModelShape("mixtral", num_experts=(4, 4), top_k=(1, 1), decoder_layers=(0, 1))
    >>> search = Draws(SearchSpace.build(shape, num_kept=2), SearchConfig(seed=0))
    >>> for _ in range(20):
    ...     (candidate,) = search.ask(1)
    ...     right = sum(3 in layer for layer in candidate.genome.kept)  # expert 3 is worth keeping
    ...     search.tell([Individual(candidate, Evaluation(right / 2))])
    >>> search.population.best.evaluation.fitness
    1.0
    """

    @property
    def population(self) -> Population: ...

    @property
    def phase(self) -> str: ...

    def ask(self, n: int) -> list[Candidate]: ...

    def tell(self, individuals: Iterable[Individual]) -> None: ...

    def restore(self, candidates: Sequence[Candidate]) -> None: ...


@dataclass(frozen=True)
class Phase:
    """A part of a search, as it is planned before the first evaluation.

    name: for a plot's legend. title: of the row in the final table for the best candidate found by the end of the
    phase; '{evaluations}' in it is replaced by the number of evaluations made. evaluations: how many are planned; 0
    for a phase beyond the budget, which is reached only if the phases before it find nothing new. only_prunes: every
    candidate is a pruning. own_operators: operators that no earlier phase uses; a report finds by them where the
    phase began.
    """

    name: str
    title: str
    evaluations: int
    only_prunes: bool = False
    own_operators: tuple[str, ...] = ()

    def row_title(self, evaluations: int) -> str:
        return self.title.replace("{evaluations}", str(evaluations))


def phase_starts(phases: Sequence[Phase], operators: Mapping[int, str]) -> list[int]:
    """The number of the candidate with which each phase starts.

    operators: the operator that made each candidate so far, by candidate number. A phase that was skipped starts
    with the same candidate as the next one.
    """
    starts, planned = [], 0
    for phase in phases:
        used = (number for number, operator in operators.items() if operator in phase.own_operators)
        starts.append(min(planned, min(used, default=planned)))
        planned += phase.evaluations
    return [min(starts[place:]) for place in range(len(starts))]


class Archive:
    """The candidates asked and the outcomes told so far: all the state that a search has.

    next_number: the next candidate's number. num_prunings: how many different prunings are among the genomes seen.
    """

    def __init__(self) -> None:
        self.population = Population()
        self.next_number = 0
        self.num_prunings = 0
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """How many different genomes were seen."""
        return len(self._numbers)

    def __contains__(self, genome: Genome) -> bool:
        return genome.digest in self._numbers

    def number_of(self, genome: Genome) -> int:
        """The number of the candidate with this genome, which must have been seen."""
        return self._numbers[genome.digest]

    def ask(self, n: int, draw: Callable[[], Candidate | None]) -> list[Candidate]:
        """Up to n candidates from as many calls of `draw`; stops early when `draw` returns None."""
        candidates: list[Candidate] = []
        while len(candidates) < n and (candidate := draw()) is not None:
            self.restore([candidate])
            candidates.append(candidate)
        return candidates

    def restore(self, candidates: Sequence[Candidate]) -> None:
        """Add candidates that are asked now, or were asked before."""
        for candidate in candidates:
            self.next_number = max(self.next_number, candidate.number + 1)
            self._see(candidate)

    def tell(self, individuals: Iterable[Individual]) -> None:
        """Add outcomes; the genome of a failure counts as seen, but does not join the population."""
        told = list(individuals)
        for individual in told:
            self._see(individual.candidate)
        self.population = self.population.with_outcomes(told)

    def _see(self, candidate: Candidate) -> None:
        if candidate.genome not in self:
            self._numbers[candidate.genome.digest] = candidate.number
            self.num_prunings += candidate.genome.is_pruning


class ArchiveSearch(ABC):
    """All of a `Search` but `phase`, for one that proposes candidate by candidate and knows nothing but its archive."""

    def __init__(self) -> None:
        self._archive = Archive()

    @property
    def population(self) -> Population:
        return self._archive.population

    def ask(self, n: int) -> list[Candidate]:
        return self._archive.ask(n, self._next)

    def tell(self, individuals: Iterable[Individual]) -> None:
        self._archive.tell(individuals)

    def restore(self, candidates: Sequence[Candidate]) -> None:
        self._archive.restore(candidates)

    @abstractmethod
    def _next(self) -> Candidate | None:
        """The candidate number `self._archive.next_number`, or None where there is no other."""
