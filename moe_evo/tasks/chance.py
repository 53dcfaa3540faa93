"""What guessing scores. No torch here, so that a run can be warned of it before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from moe_evo.tasks.examples import Example
from moe_evo.tasks.weighted_metric import parts_of

_GUESSED = frozenset({"accuracy", "accuracy_norm", "probability", "probability_norm", "first_option"})
"""Metrics of answers that are one of the example's choices."""


def chance_level(metric: str, examples: Sequence[Example]) -> float | None:
    """The mean score of taking one of each example's choices at random; None where that means nothing."""
    is_guessed = all(name in _GUESSED for _, name in parts_of(metric))
    if not is_guessed or not examples or not all(example.choices for example in examples):
        return None
    return sum(1 / len(example.choices) for example in examples) / len(examples)
