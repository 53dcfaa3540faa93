"""The one-shot criteria, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_evo.criteria import activations
from moe_evo.criteria.aimer import aimer
from moe_evo.criteria.observation import LayerObservation, Observation
from moe_evo.criteria.weights import LayerWeights

Scores = npt.NDArray[np.float64]

REAP_PAPER = "Lasby et al. 2025, arXiv 2510.13999; CerebrasResearch/reap"


@dataclass(frozen=True)
class Criterion:
    """A score for every expert, higher is kept; `pruning_by` makes a genome of them.

    description: one line for people. source: the paper or code that it is from.
    """

    name: str
    description: str
    source: str


@dataclass(frozen=True)
class ActivationCriterion(Criterion):
    """What experts do on the tasks' prompts: needs an `Observation`."""

    formula: Callable[[LayerObservation], Scores]

    def scores(self, observation: Observation) -> tuple[Scores, ...]:
        """(E,) a MoE layer."""
        return tuple(map(self.formula, observation.layers))


@dataclass(frozen=True)
class WeightCriterion(Criterion):
    """What experts are made of: needs `expert_weights` and no data."""

    formula: Callable[[LayerWeights], Scores]

    def scores(self, weights: Sequence[LayerWeights]) -> tuple[Scores, ...]:
        """(E,) a MoE layer."""
        return tuple(map(self.formula, weights))


CRITERIA: dict[str, ActivationCriterion | WeightCriterion] = {
    "frequency": ActivationCriterion("frequency", "tokens routed to the expert", REAP_PAPER, activations.frequency),
    "soft_frequency": ActivationCriterion(
        "soft_frequency", "sum of its gate weights", REAP_PAPER, activations.soft_frequency
    ),
    "ean": ActivationCriterion("ean", "sum of the norms of its outputs", REAP_PAPER, activations.ean),
    "mean_ean": ActivationCriterion("mean_ean", "mean norm of its outputs", REAP_PAPER, activations.mean_ean),
    "weighted_ean": ActivationCriterion(
        "weighted_ean", "sum of its gate weights times output norms", REAP_PAPER, activations.weighted_ean
    ),
    "reap": ActivationCriterion("reap", "mean of its gate weights times output norms", REAP_PAPER, activations.reap),
    "msan": ActivationCriterion("msan", "mean squared norm of its outputs", "arXiv 2606.15716", activations.msan),
    "aimer": WeightCriterion("aimer", "how unlike in size its weights are; needs no data", "AIMER's repository", aimer),
}
