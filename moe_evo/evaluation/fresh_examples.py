"""Fresh examples: candidates are scored on samples of the search split that change from batch to batch.

A search can learn a few fixed examples by heart. On fresh ones a candidate that was lucky does not stay lucky. So that
scores on different samples can be compared, each is corrected by how hard its sample is for the full model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moe_evo.config.evaluation import FitnessRule
from moe_evo.evaluation.fitness import over_tasks
from moe_evo.genomes.population import Evaluation, ExampleScores, Outcome
from moe_evo.tasks.examples import Example
from moe_evo.tasks.samples import Sample

CANDIDATES_A_SAMPLE = 10
"""So many candidates with consecutive numbers are scored on the same sample."""

_Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FreshExamples:
    """Samples of the search split for the candidates of a search.

    size: examples a task in each. rule: of the fitness over tasks. examples: the search split, by task. full: the full
    model's scores of them.
    """

    size: int
    rule: FitnessRule
    examples: Mapping[str, Sequence[Example]]
    full: ExampleScores

    def sample(self, number: int) -> Sample:
        """The sample for the candidate of this number."""
        return Sample("search", self.size, number // CANDIDATES_A_SAMPLE)

    def corrected(self, outcome: Outcome, sample: Sample) -> Outcome:
        """The outcome with the fitness that it would have on a sample as hard as the whole split.

        Control variate (Owen, Monte Carlo theory, methods and examples, ch. 8.9), task by task: the full model's scores
        are the control, and the coefficient is that of the regression of the genome's scores on them.
        """
        if not isinstance(outcome, Evaluation):
            return outcome
        assert outcome.scores is not None, "on a sample nothing is stopped early"
        found = [
            _corrected(scores, self.full[task], sample.of(self.examples[task]))
            for task, scores in outcome.scores.items()
        ]
        fitness, error = over_tasks([mean for mean, _ in found], [error for _, error in found], self.rule)
        return replace(outcome, fitness=fitness, standard_error=error)


def _corrected(scores: _Scores, full: _Scores, numbers: Sequence[int]) -> tuple[float, float]:
    """Mean of scores (n,) on the examples of these numbers, and its standard error. full: (N,)."""
    control = full[list(numbers)]
    apart = control - control.mean()
    variance = float(apart @ apart)
    slope = float(apart @ scores) / variance if variance > 0 else 0.0
    left = scores - scores.mean() - slope * apart
    error = float(np.sqrt(left @ left / max(len(scores) - 2, 1) / len(scores)))
    return float(scores.mean() - slope * (control.mean() - full.mean())), error
