"""What a search maximises: the quality of a genome, or that on each task, and its size or its active experts.

Quality is scored, so a search has to learn it; the others are known of every genome.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_evo.config.search import ACTIVE, PARAMETERS, TASKS
from moe_evo.genomes.bounds import Numbers
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, Individual
from moe_evo.searches.masks import MaskSpace
from moe_evo.searches.steps import Masks

NAMES = {PARAMETERS: "experts", ACTIVE: "top_k"}
"""What a table calls the objectives of which less is better."""


class Objectives:
    """The objectives of a search, by the names in its config: first what is learned (T), then what is known (K)."""

    def __init__(self, names: Sequence[str]) -> None:
        self._by_task = TASKS in names
        self._known = [name for name in names if name in (PARAMETERS, ACTIVE)]

    @property
    def is_single(self) -> bool:
        """Whether there is nothing but the quality over all tasks."""
        return not self._by_task and not self._known

    def learned(self, evaluation: Evaluation) -> list[float]:
        """(T,) the fitness, or the mean score of each task."""
        if not self._by_task:
            return [evaluation.fitness]
        assert evaluation.scores, "each task is an objective, so no evaluation is stopped early"
        return [float(scores.mean()) for _, scores in sorted(evaluation.scores.items())]

    def known(self, space: MaskSpace, masks: Masks) -> Numbers:
        """(P, K) of masks (P, S, W)."""
        steps = {PARAMETERS: space.kept, ACTIVE: space.active}
        layers = space.space.shape.num_layers
        found = [-steps[name].totals(masks) / layers for name in self._known]
        return np.array(found).reshape(len(found), len(masks)).T

    def points(self, individuals: Sequence[Individual]) -> Numbers:
        """(N, T + K) of individuals that were scored on all examples."""
        found = [[*self.learned(one.evaluation), *self._known_of(one.genome)] for one in individuals]
        return np.array(found, dtype=np.float64)

    def values(self, individual: Individual, point: Numbers | None = None) -> dict[str, float]:
        """The T + K objectives by name: 'quality' or 'quality TASK', and 'experts' and 'top_k', means over layers.

        point: (T + K,) other values than those of the individual itself.
        """
        scores = individual.evaluation.scores or {}
        names = [f"quality {name}" for name in sorted(scores)] if self._by_task else ["quality"]
        point = self.points([individual])[0] if point is None else point
        signed = zip([*names, *(NAMES[name] for name in self._known)], point.tolist(), strict=True)
        return {name: value if name in names else -value for name, value in signed}

    def _known_of(self, genome: Genome) -> list[float]:
        numbers = {PARAMETERS: genome.num_kept, ACTIVE: genome.top_k}
        return [-float(np.mean(numbers[name])) for name in self._known]
