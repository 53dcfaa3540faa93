"""What so many examples can tell: how exactly a share of right answers, and which gain is not taken for chance."""

from __future__ import annotations

import math

from moe_evo.records.statistics import Z_95

DISAGREEMENT = 0.2
"""The share of examples that two models are taken to answer differently, one right and one wrong."""

_Z_POWER = 0.8416212335729143  # the 80 % point of the normal distribution


def margin(number: int) -> float:
    """Half of the 95 % interval of a share of 0.5 over so many examples, which is the widest."""
    return Z_95 / 2 / math.sqrt(number)


def smallest_gain(number: int, disagreement: float = DISAGREEMENT) -> float:
    """The gain in the share of right answers that 4 of 5 comparisons of two models on the same examples find.

    A comparison finds it where the 95 % interval of the difference excludes 0. The difference has the variance
    (disagreement - gain^2) / number, from which the gain follows; it is never more than the disagreement, so that few
    examples need models that disagree more often.
    """
    square = (Z_95 + _Z_POWER) ** 2
    share = square / (number + square)
    return max(math.sqrt(share * disagreement), share)
