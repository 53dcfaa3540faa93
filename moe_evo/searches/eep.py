"""EEP (arXiv 2407.00945): evolve prunings, then untie and evolve the merging and routing matrices.

The evolution is steady-state: every candidate is one child of the individuals told so far. There are no
generations, and no individual is removed. Where this differs from the released search, a comment says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from moe_evo.config.search import EEP_RELEASE, EEPConfig, SearchConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import (
    gaussian_mutation,
    layer_crossover,
    normalise_rows,
    parent_pool,
    random_pruning,
    row_crossover,
    swap_mutation,
)
from moe_evo.genomes.population import Candidate, Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.base import ArchiveSearch, Phase
from moe_evo.searches.beginning import Beginning
from moe_evo.searches.enumeration import num_prunings, unseen_pruning

_TRIES = 16
_MERGING = "gaussian_mutation"  # an operator that only the merging phase uses


def eep_config(config: SearchConfig) -> EEPConfig:
    """The parameters of EEP: the published ones for 'eep_release', else those of the config."""
    return EEP_RELEASE if config.algorithm == "eep_release" else config.eep


def schedule(eep: EEPConfig, evaluations: int) -> tuple[int, int]:
    """The number of initial candidates, and the number of all candidates before merging starts."""
    if eep.num_pruning is not None:
        num_pruning = min(eep.num_pruning, evaluations)
        return min(eep.num_initial, num_pruning), num_pruning
    num_pruning = max(evaluations // 2, 1)
    return min(eep.num_initial, max(num_pruning // 2, 1)), num_pruning  # half of it is for evolution


class EEPSearch(ArchiveSearch):
    """Both phases of EEP over a space; `config.algorithm` 'eep_release' takes the published values.

    Where every expert is kept there is nothing to prune: the search starts from the identity and
    merges from the first candidate on. wider: good prunings that keep more experts; every second
    initial candidate keeps only experts of one of them. seeds: the genomes of `config.init_methods`, by method. They
    and their mutants are the first initial candidates, as many as each method's share; random ones follow.
    """

    def __init__(
        self,
        space: SearchSpace,
        config: SearchConfig,
        wider: Sequence[Genome] = (),
        seeds: Mapping[str, Genome] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.space = space
        self.eep = eep_config(config)
        self.num_initial, self.num_pruning = schedule(self.eep, config.evaluations)
        self._seed = config.seed
        self._beginning = Beginning(space, self.num_initial, config.init_shares, wider, seeds)
        self._num_prunings = num_prunings(space)

    @staticmethod
    def phases(config: SearchConfig, *, can_prune: bool) -> list[Phase]:
        """Three phases: initial prunings, their children, and merges; only merges if every expert is kept (K = E)."""
        if not can_prune:
            return [Phase("merging", "EEP merge", config.evaluations)]
        num_initial, num_pruning = schedule(eep_config(config), config.evaluations)
        return [
            Phase("initial prunings", "EEP prune", num_initial, only_prunes=True),
            Phase("children of prunings", "EEP prune", num_pruning - num_initial, only_prunes=True),
            Phase("merging", "EEP prune + merge", config.evaluations - num_pruning, own_operators=(_MERGING,)),
        ]

    @staticmethod
    def parameters(config: SearchConfig) -> dict[str, Any]:
        """The options that a tracker records for this search, beside the config's general ones."""
        return {"eep": asdict(eep_config(config))}

    @property
    def phase(self) -> str:
        """'pruning' or 'merging': what the next candidate belongs to."""
        prunes = self.space.can_prune and self._archive.next_number < self.num_pruning
        return "pruning" if prunes and not self._all_pruned else "merging"

    @property
    def _all_pruned(self) -> bool:
        return self._archive.num_prunings >= self._num_prunings

    def _next(self) -> Candidate | None:
        number = self._archive.next_number
        rng = np.random.default_rng([self._seed, number])
        # Redraw a child that was seen before. Where the best parents have no new children, take a child of any
        # individual, then a random genome, then the next pruning in order that was not seen.
        for draw in (self._child, self._child_of_anybody, self._immigrant):
            for _ in range(_TRIES):
                candidate = draw(number, rng)
                if candidate.genome not in self._archive:
                    return candidate
        genome = unseen_pruning(self.space, self._archive, rng)
        return None if genome is None else Candidate(number, genome, "random_pruning")

    def _child(self, number: int, rng: np.random.Generator) -> Candidate:
        eep, merges = self.eep, self.phase == "merging"
        parents = (self.population if merges else self.population.prunings).complete
        initial = number < self.num_initial and not self._all_pruned
        if initial:
            given = self._beginning.candidate(number, self._archive, rng, partial(self._seed_mutant, rng=rng))
            if given is not None:
                return given
        # There are no parents yet where candidates are asked ahead of outcomes, or where all failed.
        if initial or len(parents) < min(eep.mutation_parents, self.num_initial):
            return self._immigrant(number, rng)
        crosses = rng.random() < eep.crossover_rate and (merges or eep.pruning_crossover)
        if crosses and len(parents) >= 2:
            pool = parent_pool(parents, eep.crossover_margin, max(eep.crossover_parents, 2), eep.margin_unit)
            first, second = (pool[index] for index in rng.choice(len(pool), 2, replace=False))
            first_group = self._first_group(rng)
            genome, operator = self._crossed(first.genome, second.genome, rng, first_group)
            return Candidate(number, self._mutated(genome, rng, first_group), operator, (first.number, second.number))
        pool = parent_pool(parents, eep.mutation_margin, eep.mutation_parents, eep.margin_unit)
        return self._mutant(number, pool, rng)

    def _seed_mutant(self, genome: Genome, rng: np.random.Generator) -> Genome:
        return self._swapped(genome, rng, 0) if genome.is_pruning else self._shifted(genome, rng, 0)

    def _child_of_anybody(self, number: int, rng: np.random.Generator) -> Candidate:
        parents = self.population if self.phase == "merging" else self.population.prunings
        if not len(parents):
            return self._immigrant(number, rng)
        return self._mutant(number, parents.ranked, rng)

    def _immigrant(self, number: int, rng: np.random.Generator) -> Candidate:
        """A random pruning (the identity, if K = E), or a mutant of one where all prunings were asked."""
        if self._all_pruned and len(self.population):
            return self._mutant(number, self.population.ranked, rng)
        genome = random_pruning(self.space, rng)
        if not self._all_pruned:
            return Candidate(number, genome, "random_pruning" if self.space.can_prune else "identity")
        parent = self._archive.number_of(genome)
        return Candidate(number, self._mutated(genome, rng, self._first_group(rng)), _MERGING, (parent,))

    def _mutant(self, number: int, pool: Sequence[Individual], rng: np.random.Generator) -> Candidate:
        parent = pool[int(rng.integers(len(pool)))]
        operator = _MERGING if self.phase == "merging" else "swap_mutation"
        genome = self._mutated(parent.genome, rng, self._first_group(rng))
        return Candidate(number, genome, operator, (parent.number,))

    def _first_group(self, rng: np.random.Generator) -> int:
        """The first layer group that a child may change."""
        keeps = self.eep.prefix_rate > 0 and rng.random() < self.eep.prefix_rate
        return int(rng.integers(len(self.space.layer_groups))) if keeps else 0

    def _mutated(self, genome: Genome, rng: np.random.Generator, first_group: int) -> Genome:
        if self.phase == "pruning":
            return self._swapped(genome, rng, first_group)
        eep, space = self.eep, self.space
        child = self._shifted(genome, rng, first_group)
        if rng.random() >= eep.normalise_rate:
            return child
        return space.genome([*space.genes(child)[:first_group], *space.genes(normalise_rows(child))[first_group:]])

    def _swapped(self, genome: Genome, rng: np.random.Generator, first_group: int) -> Genome:
        rates = {"layer_rate": self.eep.layer_rate, "swap_rate": self.eep.swap_rate}
        return swap_mutation(genome, self.space, rng, **rates, first_group=first_group)

    def _shifted(self, genome: Genome, rng: np.random.Generator, first_group: int) -> Genome:
        rates = {"layer_rate": self.eep.layer_rate, "entry_rate": self.eep.entry_rate, "sigma": self.eep.sigma}
        return gaussian_mutation(genome, self.space, rng, **rates, first_group=first_group)

    def _crossed(self, first: Genome, second: Genome, rng: np.random.Generator, first_group: int) -> tuple[Genome, str]:
        eep, space = self.eep, self.space
        if rng.random() < eep.layer_crossover_rate:
            crossed = layer_crossover(first, second, space, rng, bias=eep.crossover_bias, first_group=first_group)
            return crossed, "layer_crossover"
        rates = {"layer_rate": eep.layer_rate, "bias": eep.crossover_bias}
        return row_crossover(first, second, space, rng, **rates, first_group=first_group), "row_crossover"
