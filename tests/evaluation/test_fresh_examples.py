"""Scores on changing samples of the search split, corrected by how hard the sample is for the full model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.errors import ConfigError
from moe_evo.evaluation.fresh_examples import CANDIDATES_A_SAMPLE, FreshExamples
from moe_evo.genomes.population import Evaluation, EvaluationFailure
from moe_evo.tasks.examples import Example
from moe_evo.tasks.samples import Sample

EXAMPLES = {name: [Example(f"{name}:{n}", f"{n}", label=n % 2) for n in range(400)] for name in ("one", "two")}
RNG = np.random.default_rng(0)
HARDNESS = {name: RNG.normal(size=400) for name in EXAMPLES}
FULL = {name: (one < 0.7).astype(float) for name, one in HARDNESS.items()}
GENOME = {name: (one + 0.5 * RNG.normal(size=400) < 0.2).astype(float) for name, one in HARDNESS.items()}
FRESH = FreshExamples(50, "mean", EXAMPLES, FULL)


def on(sample: Sample, scores: dict[str, np.ndarray] = GENOME) -> Evaluation:
    """What an evaluator returns for the sample."""
    seen = {task: one[sample.of(EXAMPLES[task])] for task, one in scores.items()}
    fitness = float(np.mean([one.mean() for one in seen.values()]))
    return Evaluation(fitness, num_examples=100, scores=seen, sample=sample.number)


def corrected(sample: Sample, scores: dict[str, np.ndarray] = GENOME, rule: str = "mean") -> Evaluation:
    found = replace(FRESH, rule=rule).corrected(on(sample, scores), sample)
    assert isinstance(found, Evaluation)
    return found


def test_ten_candidates_have_a_sample_and_the_next_ten_another() -> None:
    assert {FRESH.sample(number) for number in range(CANDIDATES_A_SAMPLE)} == {Sample("search", 50, 0)}
    assert FRESH.sample(CANDIDATES_A_SAMPLE) == Sample("search", 50, 1)


def test_corrected_scores_are_right_on_the_average_and_vary_less() -> None:
    samples = [Sample("search", 50, number) for number in range(400)]
    truth = np.mean([one.mean() for one in GENOME.values()])
    raw, found = (np.array([one.fitness for one in some]) for some in (map(on, samples), map(corrected, samples)))
    assert found.mean() == pytest.approx(truth, abs=0.003)
    assert ((found - truth) ** 2).mean() < 0.8 * ((raw - truth) ** 2).mean()


def test_the_full_model_scores_the_same_on_every_sample() -> None:
    whole = np.mean([one.mean() for one in FULL.values()])
    for number in range(20):
        assert corrected(Sample("search", 50, number), FULL).fitness == pytest.approx(whole)


def test_the_correction_is_the_regression_on_the_full_models_scores() -> None:
    sample = Sample("search", 50, 3)
    means = []
    for task in EXAMPLES:
        numbers = sample.of(EXAMPLES[task])
        slope, start = np.polyfit(FULL[task][numbers], GENOME[task][numbers], 1)
        means.append(start + slope * FULL[task].mean())
    assert corrected(sample).fitness == pytest.approx(np.mean(means))
    assert corrected(sample, rule="worst").fitness == pytest.approx(min(means))


def test_the_standard_error_is_that_of_what_the_full_model_does_not_explain() -> None:
    """Against the spread over samples of an endless split."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        hard = rng.normal(size=5000)
        full, scores = (hard < 0.7).astype(float), (hard + 0.5 * rng.normal(size=5000) < 0.2).astype(float)
        examples = {"one": [Example(str(n), str(n)) for n in range(5000)]}
        sample = Sample("search", 50, 0)
        raw = Evaluation(0.0, scores={"one": scores[sample.of(examples["one"])]})
        one = FreshExamples(50, "mean", examples, {"one": full}).corrected(raw, sample)
        assert isinstance(one, Evaluation)
        found.append((one.fitness, one.standard_error))
    fitness, errors = np.array(found).T
    assert errors.mean() == pytest.approx(fitness.std(), rel=0.15)


def test_a_sample_that_the_full_model_gets_all_right_is_left_as_it_is() -> None:
    right = {task: np.ones(400) for task in EXAMPLES}
    sample = Sample("search", 50, 0)
    assert replace(FRESH, full=right).corrected(on(sample), sample).fitness == pytest.approx(on(sample).fitness)


def test_a_failure_stays_one() -> None:
    failed = EvaluationFailure("non_finite", "logits")
    assert FRESH.corrected(failed, Sample("search", 50, 0)) is failed


def test_racing_and_fresh_examples_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.race: got 0.95, expected none, as .* is 'fresh'"):
        EvaluationConfig(race=0.95, examples="fresh")
    with pytest.raises(ConfigError, match=r"evaluation.sample_size: got 4, expected 16 or more"):
        EvaluationConfig(sample_size=4)
