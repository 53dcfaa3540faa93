"""Racing: an individual that is surely worse than a rival is not scored to the end.

Examples come in growing parts, the same for every individual. After each part the individual is compared
with the rival on the examples that both have seen (a paired test), and stopped where it is worse with the
chosen confidence. Each comparison is a test of its own; as there are few, the chance to stop an individual that
would have won grows little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from moe_evo.tasks.base import TaskScores

PARTS = (0.2, 0.5, 1.0)
"""The share of the examples that have been scored after each part."""

_FEWEST = 16  # examples of a task below which a mean is no normal variable


def parts_of(num_examples: int) -> list[list[int]]:
    """The numbers of a task's examples, divided into parts at random, always in the same way."""
    order = np.random.default_rng(num_examples).permutation(num_examples)
    ends = [math.ceil(share * num_examples) for share in PARTS]
    return [sorted(part.tolist()) for part in np.split(order, ends[:-1])]


def is_beaten(scores: Sequence[TaskScores], rival: Sequence[npt.NDArray[np.float64]], confidence: float) -> bool:
    """Whether the mean over tasks is below the rival's with this confidence (one-sided, normal, paired).

    scores: of the examples seen so far, a task each. rival: (N,) of all examples, in the same order of tasks.
    The unseen examples are finite in number, which narrows the error of what they will add.
    """
    means, variances = [], []
    for own, full in zip(scores, rival, strict=True):
        number = len(own.examples)
        if number < min(_FEWEST, len(full)):
            return False
        differences = own.score - full[own.examples]
        means.append(float(differences.mean()))
        unseen = 1 - number / len(full)
        variances.append(float(differences.var(ddof=1)) / number * unseen if number > 1 else 0.0)
    error = math.sqrt(sum(variances)) / len(means)
    return sum(means) / len(means) + NormalDist().inv_cdf(confidence) * error < 0
