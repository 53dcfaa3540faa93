"""A metric of generated answers."""

from __future__ import annotations

from moe_evo.tasks.answer_metrics import normalised
from moe_evo.tasks.examples import Example


def starts_with(text: str, example: Example) -> float:
    """The text begins with an answer, up to case and spacing: 'yes, because ...' is right where 'yes' is."""
    return float(normalised(text).startswith(tuple(map(normalised, example.answers))))
