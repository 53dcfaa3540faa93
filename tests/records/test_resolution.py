"""What so many examples can tell, against simulated comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from moe_evo.records.resolution import margin, smallest_gain
from moe_evo.records.statistics import Z_95, wilson_interval


@pytest.mark.parametrize(("number", "disagreement"), [(200, 0.2), (700, 0.2), (2000, 0.1)])
def test_four_of_five_comparisons_find_the_smallest_gain(number: int, disagreement: float) -> None:
    gain = smallest_gain(number, disagreement)
    chances = [(disagreement + gain) / 2, 1 - disagreement, (disagreement - gain) / 2]
    won, _, lost = np.random.default_rng(0).multinomial(number, chances, size=20_000).T
    mean = (won - lost) / number
    error = np.sqrt(((won + lost) / number - mean**2) / number)
    assert np.mean(mean > Z_95 * error) == pytest.approx(0.8, abs=0.02)


def test_few_examples_need_models_that_differ_on_more_of_them() -> None:
    gains = [smallest_gain(number) for number in (2, 10, 40, 100, 1000, 10_000)]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0 and gains[0] < 1
    assert smallest_gain(10) > 0.2


def test_a_margin_is_half_of_the_widest_interval() -> None:
    low, high = wilson_interval(0.5, 700)
    assert margin(700) == pytest.approx((high - low) / 2, rel=0.01)
