"""The fitness of a genome, made of the scores of its examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moe_evo.config.evaluation import FitnessRule
from moe_evo.genomes.population import Evaluation
from moe_evo.tasks.base import TaskScores


def evaluation_of(
    examined: Mapping[str, TaskScores],
    rule: FitnessRule,
    *,
    is_complete: bool,
    duration_s: float,
    sample: int | None = None,
) -> Evaluation:
    """The outcome of a genome whose examples were scored.

    examined: by task name. is_complete: whether all examples were seen, so that single scores are worth keeping.
    sample: see `Evaluation`.
    """
    scores = list(examined.values())
    means = [float(one.score.mean()) for one in scores]
    errors = [_standard_error(one) for one in scores]
    fitness, standard_error = over_tasks(means, errors, rule)
    likelihoods = [0.0 if one.log_likelihood is None else float(one.log_likelihood.mean()) for one in scores]
    return Evaluation(
        fitness=fitness,
        tie_break=sum(likelihoods) / len(likelihoods),
        standard_error=standard_error,
        num_examples=sum(len(one.score) for one in scores),
        duration_s=duration_s,
        metrics={f"{name}/{metric}": value for name, one in examined.items() for metric, value in one.metrics.items()},
        scores={name: one.score for name, one in examined.items()} if is_complete else None,
        sample=sample,
    )


def over_tasks(means: Sequence[float], errors: Sequence[float], rule: FitnessRule) -> tuple[float, float]:
    """The fitness and its standard error, from the mean score of every task and its standard error."""
    if rule == "worst":
        worst = int(np.argmin(means))
        return means[worst], errors[worst]
    return sum(means) / len(means), math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _standard_error(scores: TaskScores) -> float:
    """Of the mean score over examples; 0 where one example tells nothing of the spread."""
    number = len(scores.score)
    return float(scores.score.std(ddof=1) / math.sqrt(number)) if number > 1 else 0.0
