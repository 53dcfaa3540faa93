"""Results: intervals of the final table, and the file of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from moe_evo.errors import RunError
from moe_evo.evaluation.fitness import evaluation_of
from moe_evo.genomes.population import Evaluation
from moe_evo.records.folder import RunFolder
from moe_evo.records.result import Score
from moe_evo.tasks.base import TaskScores


def share_of(right: int, number: int) -> Evaluation:
    """As an evaluator makes it of right and wrong answers."""
    scores = TaskScores(np.arange(number), np.repeat([1.0, 0.0], [right, number - right]), None, {})
    return evaluation_of({"task": scores}, "mean", is_complete=True, duration_s=0.0)


@pytest.mark.parametrize(("right", "number"), [(0, 20), (1, 20), (8, 16), (1, 2), (15, 20), (20, 20), (300, 400)])
def test_the_interval_of_a_share_is_wilsons_and_stays_within_zero_and_one(right: int, number: int) -> None:
    score = Score.of(share_of(right, number), is_share=True)
    oracle = binomtest(right, number).proportion_ci(method="wilson")
    assert (score.low, score.high) == pytest.approx((oracle.low, oracle.high), abs=1e-9)
    assert 0 <= score.low < score.high <= 1


def test_the_interval_of_an_unbounded_metric_is_normal() -> None:
    score = Score.of(Evaluation(-2.5, standard_error=0.1, num_examples=50), is_share=False)
    assert (score.low, score.high) == pytest.approx((-2.696, -2.304), abs=1e-3)


def test_a_mean_over_tasks_has_an_interval_as_wide_as_its_standard_error_says() -> None:
    score = Score.of(Evaluation(0.6, standard_error=0.02, num_examples=900), is_share=True)
    assert (score.high - score.low) / 2 == pytest.approx(1.96 * 0.02, rel=0.02)


def test_a_damaged_result_says_what_to_do(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.result.write_text("{")
    with pytest.raises(RunError, match=r"is not JSON .*delete it and run the same search again"):
        folder.read_result()
    folder.result.write_text('{"version": 99}')
    with pytest.raises(RunError, match="version 99, expected 1"):
        folder.read_result()
