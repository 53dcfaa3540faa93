"""Two models on the same examples: when a difference is told, and how many examples would tell one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from moe_evo.errors import TaskError
from moe_evo.records.paired import Paired, paired, paired_by_task
from moe_evo.records.statistics import Difference, McNemar


def answers(right: int, number: int) -> np.ndarray:
    return (np.arange(number) < right).astype(np.float64)


@pytest.mark.parametrize(
    ("low", "high", "sign"), [(0.01, 0.3, 1), (-0.3, -0.01, -1), (-0.1, 0.2, 0), (0.0, 0.2, 0), (-0.2, 0.0, 0)]
)
def test_a_difference_is_told_where_its_interval_lies_on_one_side_of_zero(low: float, high: float, sign: int) -> None:
    assert Paired(Difference((low + high) / 2, low, high, 50)).sign == sign


@pytest.mark.parametrize("won", range(1, 10))
def test_with_few_different_answers_the_exact_test_has_to_agree(won: int) -> None:
    first, second = answers(won, 200), np.zeros(200)
    found = paired({"t": first}, {"t": second})
    assert found.mcnemar is not None and (found.mcnemar.won, found.mcnemar.lost) == (won, 0)
    assert found.sign == int(binomtest(won, won).pvalue < 0.05) == -paired({"t": second}, {"t": first}).sign


def test_the_same_answers_are_equal_and_not_merely_unclear() -> None:
    scores = {"t": answers(30, 50)}
    found = paired(scores, scores)
    assert found.is_equal and found.sign == 0
    assert found.examples_to_tell(0.05) is None
    assert not Paired(Difference(0.0, -0.1, 0.1, 50)).is_equal


def test_as_many_examples_as_are_named_tell_the_difference_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    truth = 0.05  # of the examples that are answered differently, this many more are won than lost

    def sample(number: int) -> np.ndarray:
        return rng.choice([1.0, -1.0, 0.0], size=number, p=[0.15, 0.15 - truth, 0.7 + truth])

    pilot = sample(400)
    won, lost = (pilot > 0).astype(np.float64), (pilot < 0).astype(np.float64)
    number = paired({"t": won}, {"t": lost}).examples_to_tell(truth)
    assert number is not None
    deviation = math.sqrt(0.3 - truth - truth**2)
    assert number == pytest.approx((2.8016 * deviation / truth) ** 2, rel=0.2)
    told = 0
    for _ in range(400):  # a paired z test, whose interval is what the bootstrap's comes to
        drawn = sample(number)
        told += abs(drawn.mean()) > 1.96 * drawn.std(ddof=1) / math.sqrt(number)
    assert told / 400 == pytest.approx(0.8, abs=0.1)


def test_numbers_of_examples_are_rounded_up_to_two_digits() -> None:
    now = Paired(Difference(0.0, -0.1, 0.1, 56))
    exact = ((1.959964 + 0.841621) * (0.2 / (2 * 1.959964) * math.sqrt(56)) / 0.05) ** 2
    assert exact == pytest.approx(457.8, abs=0.5)
    assert now.examples_to_tell(0.05) == 460
    assert now.examples_to_tell(0.5) == 5


def test_every_task_is_compared_by_itself_and_all_together() -> None:
    first = {"a": answers(40, 50), "b": answers(10, 30)}
    second = {"a": answers(20, 50), "b": answers(25, 30)}
    found = paired_by_task(first, second)
    assert set(found.tasks) == {"a", "b"}
    assert (found.tasks["a"].sign, found.tasks["b"].sign) == (1, -1)
    assert found.overall.difference.value == pytest.approx((20 / 50 - 15 / 30) / 2)
    assert found.overall.mcnemar == McNemar(20, 15, binomtest(20, 35).pvalue)
    alone = paired_by_task({"a": first["a"]}, {"a": second["a"]})
    assert alone.tasks["a"] == alone.overall == found.tasks["a"]


def test_other_examples_cannot_be_paired() -> None:
    with pytest.raises(TaskError, match="got 3 and 4 examples, expected the same ones"):
        paired({"t": np.zeros(3)}, {"t": np.zeros(4)})
