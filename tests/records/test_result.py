"""Results: intervals of the final table, and the file of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from moe_evo.config.evaluation import FitnessRule
from moe_evo.errors import RunError
from moe_evo.evaluation.fitness import evaluation_of
from moe_evo.genomes.population import Evaluation
from moe_evo.records.folder import RunFolder
from moe_evo.records.result import Score
from moe_evo.tasks.base import TaskScores


def answered(*counts: tuple[int, int], rule: FitnessRule = "mean") -> Evaluation:
    """As an evaluator makes it of right and wrong answers; counts: right ones and all, a task each."""
    scores = {
        f"task {n}": TaskScores(np.arange(number), np.repeat([1.0, 0.0], [right, number - right]), None, {})
        for n, (right, number) in enumerate(counts)
    }
    return evaluation_of(scores, rule, is_complete=True, duration_s=0.0)


def interval(*counts: tuple[int, int], rule: FitnessRule = "mean") -> tuple[float, float]:
    score = Score.of(answered(*counts, rule=rule), is_share=True, rule=rule)
    return score.low, score.high


@pytest.mark.parametrize("rule", ["mean", "worst"])
@pytest.mark.parametrize(("right", "number"), [(0, 20), (1, 20), (8, 16), (1, 2), (15, 20), (20, 20), (300, 400)])
def test_the_interval_of_a_share_is_wilsons_of_its_counts(right: int, number: int, rule: FitnessRule) -> None:
    oracle = binomtest(right, number).proportion_ci(method="wilson")
    assert interval((right, number), rule=rule) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_eight_of_sixteen() -> None:
    assert interval((8, 16)) == pytest.approx((0.280, 0.720), abs=5e-4)


def test_the_worst_task_has_the_interval_of_its_own_counts_alone() -> None:
    for worst in ((0, 20), (3, 20)):
        oracle = binomtest(*worst).proportion_ci(method="wilson")
        found = interval((900, 1000), worst, (500, 500), rule="worst")
        assert found == pytest.approx((oracle.low, oracle.high), abs=1e-12)


@pytest.mark.parametrize(
    "shares", [(0.5, 0.5), (0.9, 0.6), (0.97, 0.5), (0.99, 0.99), (1.0, 0.5), (0.05, 0.3)], ids=str
)
def test_the_interval_of_a_mean_over_tasks_contains_the_truth_nineteen_times_of_twenty(
    shares: tuple[float, float],
) -> None:
    """Every pair of counts, weighted by its probability."""
    numbers = (16, 40)
    chances = [binom.pmf(np.arange(number + 1), number, share) for number, share in zip(numbers, shares, strict=True)]
    covered = 0.0
    for first, second in np.ndindex(numbers[0] + 1, numbers[1] + 1):
        low, high = interval((first, numbers[0]), (second, numbers[1]))
        covered += chances[0][first] * chances[1][second] * (low <= np.mean(shares) <= high)
    assert 0.93 < covered < 0.995


def test_a_task_in_which_all_is_right_still_counts_as_uncertain() -> None:
    low, high = interval((20, 20), (10, 20))
    certain = binomtest(10, 20).proportion_ci(method="wilson")
    assert low < (1 + certain.low) / 2 and high >= (1 + certain.high) / 2


def test_scores_between_right_and_wrong_have_a_narrower_interval_about_as_wide_as_the_normal_one() -> None:
    values = np.random.default_rng(0).beta(6, 4, 400)
    found = evaluation_of({"f1": TaskScores(np.arange(400), values, None, {})}, "mean", is_complete=True, duration_s=0)
    score = Score.of(found, is_share=True, rule="mean")
    margin = 1.96 * values.std(ddof=1) / 20
    assert (score.low, score.high) == pytest.approx((values.mean() - margin, values.mean() + margin), abs=0.02 * margin)


def test_the_interval_of_an_unbounded_metric_is_normal() -> None:
    score = Score.of(Evaluation(-2.5, standard_error=0.1, num_examples=50), is_share=False, rule="mean")
    assert (score.low, score.high) == pytest.approx((-2.696, -2.304), abs=1e-3)


def test_a_damaged_result_says_what_to_do(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.result.write_text("{")
    with pytest.raises(RunError, match=r"is not JSON: .*delete it and run the same search again"):
        folder.read_result()
    folder.result.write_text('{"version": 99}')
    with pytest.raises(RunError, match="version 99, expected 1"):
        folder.read_result()
