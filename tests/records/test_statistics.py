"""Paired differences, McNemar's test and the winner's curse against brute force, closed forms and simulation."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import spearmanr

from moe_evo.errors import TaskError
from moe_evo.genomes.population import ExampleScores
from moe_evo.records.statistics import (
    Difference,
    McNemar,
    exact_mcnemar,
    paired_difference,
    rank_correlation,
    winners_curse,
)

Array = npt.NDArray[np.float64]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def zeros_and_ones(shares: dict[str, float], number: int, seed: int) -> ExampleScores:
    generator = rng(seed)
    return {name: (generator.random(number) < share).astype(np.float64) for name, share in shares.items()}


def pair_of(
    draws: np.random.Generator, number: int, only_first: float, only_second: float
) -> tuple[ExampleScores, ExampleScores]:
    """Right and wrong answers of two models; an example is the one's alone with these probabilities, else a coin's."""
    kind = draws.choice(3, number, p=(only_first, only_second, 1 - only_first - only_second))
    both = (draws.random(number) < 0.5).astype(np.float64)
    return {"a": np.where(kind == 2, both, kind == 0)}, {"a": np.where(kind == 2, both, kind == 1)}


def covers(found: Difference, truth: float) -> bool:
    return found.low - 1e-12 <= truth <= found.high + 1e-12


def all_means(sample: Array) -> Counter[float]:
    """The mean of every resample there is, with how many resamples have it."""
    return Counter(float(np.mean(one)) for one in itertools.product(sample, repeat=len(sample)))


def bca_by_brute_force(samples: list[Array]) -> tuple[float, float]:
    """BCa interval (Efron 1987) of the mean of the samples' means from all their resamples, without randomness."""
    totals: Counter[float] = Counter()
    for several in itertools.product(*(all_means(sample).items() for sample in samples)):
        mean = round(sum(value for value, _ in several) / len(samples), 12)
        totals[mean] += math.prod(count for _, count in several)
    estimate = round(sum(float(one.mean()) for one in samples) / len(samples), 12)
    whole = sum(totals.values())
    below = (sum(n for v, n in totals.items() if v < estimate) + sum(n for v, n in totals.items() if v <= estimate)) / 2
    influence = [(one - one.mean()) / len(one) for one in samples]
    a = sum((one**3).sum() for one in influence) / sum((one**2).sum() for one in influence) ** 1.5 / 6
    z0 = ndtri(below / whole)
    values = sorted(totals)
    cumulative = np.cumsum([totals[value] for value in values]) / whole
    ends = []
    for z in (ndtri(0.025), ndtri(0.975)):
        level = ndtr(z0 + (z0 + z) / (1 - a * (z0 + z)))
        ends.append(values[int(np.searchsorted(cumulative, level))])
    return ends[0], ends[1]


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to count over hundreds of pairs how often an interval covers the truth."""
    monkeypatch.setattr("moe_evo.records.statistics._NUM_RESAMPLES", 999)


def test_the_difference_is_the_mean_over_tasks_and_not_over_examples() -> None:
    first = {"small": np.array([1.0, 0.0]), "large": np.zeros(10)}
    second = {"large": np.zeros(10), "small": np.zeros(2)}
    found = paired_difference(first, second, rng())
    assert found.value == pytest.approx(0.25)
    assert found.num_examples == 12


def test_the_interval_is_that_of_all_resamples_of_each_task() -> None:
    draws = rng(3)
    for _ in range(4):
        samples = [np.round(draws.gamma(1.0, 1.0, 6), 3), np.round(draws.normal(0.3, 1.0, 4), 3)]
        first = {"a": samples[0], "b": samples[1]}
        second = {"a": np.zeros(6), "b": np.zeros(4)}
        found = paired_difference(first, second, rng(1))
        spread = found.high - found.low
        assert (found.low, found.high) == pytest.approx(bca_by_brute_force(samples), abs=0.03 * spread)


def test_the_interval_of_many_examples_is_the_normal_one() -> None:
    draws = rng(5)
    first, second = {"a": draws.normal(1, 1, 4000)}, {"a": draws.normal(0, 2, 4000)}
    found = paired_difference(first, second, rng())
    margin = 1.96 * float(np.std(first["a"] - second["a"], ddof=1)) / math.sqrt(4000)
    assert (found.value - found.low, found.high - found.value) == pytest.approx((margin, margin), rel=0.05)


def test_scores_that_move_together_have_a_narrower_interval_than_the_two_apart() -> None:
    difficulty = rng(1).random(300)
    first, second = {"a": difficulty + rng(2).normal(0, 0.05, 300)}, {"a": difficulty + rng(3).normal(0, 0.05, 300)}
    found = paired_difference(first, second, rng())
    assert found.high - found.low < 0.5 * 2 * 1.96 * math.sqrt(2 / 12 / 300)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("number", "only_first", "only_second"), [(200, 0.15, 0.10), (200, 0.10, 0.10), (500, 0.06, 0.02)]
)
def test_the_interval_covers_the_true_difference_of_right_and_wrong_answers(
    number: int, only_first: float, only_second: float
) -> None:
    draws, truth = rng(11), only_first - only_second
    pairs = [pair_of(draws, number, only_first, only_second) for _ in range(300)]
    covered = np.mean([covers(paired_difference(*pair, rng(n)), truth) for n, pair in enumerate(pairs)])
    assert 0.90 <= covered <= 0.98


@pytest.mark.usefixtures("few_resamples")
def test_the_interval_covers_the_true_difference_of_skewed_scores_over_two_tasks() -> None:
    draws, covered = rng(12), []
    for n in range(300):
        first = {"a": draws.gamma(1.0, 1.0, 60), "b": draws.normal(0, 2, 100)}
        second = {"a": draws.gamma(1.0, 0.5, 60), "b": draws.normal(1, 1, 100)}
        covered.append(covers(paired_difference(first, second, rng(n)), (0.5 - 1.0) / 2))
    assert 0.90 <= np.mean(covered) <= 0.98


def test_two_individuals_the_other_way_round_are_the_same_with_the_other_sign() -> None:
    first, second = (zeros_and_ones({"a": share, "b": 0.5}, 80, seed) for seed, share in ((1, 0.8), (2, 0.6)))
    forth, back = paired_difference(first, second, rng()), paired_difference(second, first, rng())
    assert (back.value, back.low, back.high) == pytest.approx((-forth.value, -forth.high, -forth.low))
    won, lost = exact_mcnemar(first, second), exact_mcnemar(second, first)
    assert won is not None and lost is not None
    assert (won.won, won.lost, won.p_value) == (lost.lost, lost.won, lost.p_value)


def test_equal_scores_differ_by_exactly_nothing() -> None:
    scores = {"a": rng().normal(size=50), "b": rng(1).normal(size=1)}
    found = paired_difference(scores, dict(scores), rng())
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert math.copysign(1.0, paired_difference(scores, scores, rng()).value) == 1.0


def test_a_task_in_which_all_examples_differ_alike_adds_a_constant() -> None:
    first = {"a": rng(1).random(40), "b": np.full(1, 0.75)}
    second = {"a": np.zeros(40), "b": np.full(1, 0.25)}
    alone = paired_difference({"a": first["a"]}, {"a": second["a"]}, rng())
    both = paired_difference(first, second, rng())
    assert both.value == pytest.approx((alone.value + 0.5) / 2)
    assert both.high - both.low == pytest.approx((alone.high - alone.low) / 2, rel=0.05)


def test_the_same_seed_gives_the_same_interval_whatever_the_order_of_tasks() -> None:
    first, second = (zeros_and_ones({"a": share, "b": 0.5}, 60, seed) for seed, share in ((1, 0.8), (2, 0.6)))
    turned = {name: first[name] for name in ("b", "a")}
    assert paired_difference(first, second, rng(4)) == paired_difference(turned, second, rng(4))


@pytest.mark.parametrize("won", range(8))
def test_mcnemar_is_the_binomial_test_of_the_examples_that_tell_the_two_apart(won: int) -> None:
    lost = 7 - won
    first = {"a": np.array([1.0] * won + [0.0] * lost + [1.0, 1.0, 0.0])}
    second = {"a": np.array([0.0] * won + [1.0] * lost + [1.0, 1.0, 0.0])}
    by_hand = min(1.0, 2 * sum(math.comb(7, n) for n in range(min(won, lost) + 1)) / 2**7)
    assert exact_mcnemar(first, second) == McNemar(won, lost, pytest.approx(by_hand))


def test_mcnemar_counts_the_examples_of_all_tasks() -> None:
    first = {"a": np.array([1.0, 1.0, 0.0]), "b": np.array([1.0, 1.0])}
    second = {"b": np.array([0.0, 0.0]), "a": np.array([0.0, 0.0, 1.0])}
    assert exact_mcnemar(first, second) == McNemar(4, 1, pytest.approx(12 / 32))


def test_mcnemar_of_two_that_never_differ_has_nothing_to_say() -> None:
    scores = {"a": np.array([1.0, 0.0])}
    assert exact_mcnemar(scores, scores) == McNemar(0, 0, 1.0)


@pytest.mark.parametrize("score", [0.5, -1.0, 2.0])
def test_scores_that_are_neither_0_nor_1_have_no_mcnemar_test(score: float) -> None:
    right = {"a": np.array([1.0, 0.0])}
    assert exact_mcnemar(right, {"a": np.array([1.0, score])}) is None
    assert exact_mcnemar({"a": np.array([1.0, score])}, right) is None


def test_mcnemar_rejects_equal_individuals_at_most_as_often_as_it_says() -> None:
    draws, p_values = rng(13), []
    for _ in range(300):
        found = exact_mcnemar(*pair_of(draws, 200, 0.1, 0.1))
        assert found is not None
        p_values.append(found.p_value)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.06


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"b": np.ones(3)}, "scores: got those of tasks a and b, expected the same tasks twice"),
        ({"a": np.ones(3), "b": np.ones(3)}, "scores: got those of tasks a and a, b, expected the same tasks twice"),
        ({}, "scores: got those of tasks a and none, expected the same tasks twice"),
        ({"a": np.ones(2)}, "scores of task a: got 3 and 2 examples, expected the same ones"),
    ],
)
def test_other_tasks_or_numbers_of_examples_are_refused_in_one_line(second: ExampleScores, message: str) -> None:
    first = {"a": np.ones(3)}
    with pytest.raises(TaskError) as caught:
        paired_difference(first, second, rng())
    assert str(caught.value) == message
    with pytest.raises(TaskError) as caught:
        exact_mcnemar(first, second)
    assert str(caught.value) == message


def test_no_task_and_no_example_are_refused() -> None:
    with pytest.raises(TaskError, match="scores: got no task"):
        paired_difference({}, {}, rng())
    with pytest.raises(TaskError, match="scores of task a: got none, expected some"):
        paired_difference({"a": np.ones(0)}, {"a": np.ones(0)}, rng())


def test_the_curse_is_the_gap_between_splits_of_different_size() -> None:
    winner = {"search": {"a": np.array([1.0, 1.0, 1.0, 0.0])}, "validation": {"a": np.array([1.0, 0.0])},
              "test": {"a": np.array([1.0, 0.0, 0.0, 0.0, 0.0])}}  # fmt: skip
    found = winners_curse(winner, rng())
    values = [one.value for one in (found.search_validation, found.validation_test, found.search_test)]
    assert values == pytest.approx([0.25, 0.3, 0.55])
    assert [found.search_test.num_examples, found.validation_test.num_examples] == [9, 7]


@pytest.mark.usefixtures("few_resamples")
def test_the_curse_of_one_who_was_not_chosen_is_covered_by_its_interval() -> None:
    draws, covered = rng(14), []
    for n in range(300):
        sizes = {"search": 100, "validation": 60, "test": 200}
        winner = {split: {"a": (draws.random(size) < 0.7).astype(np.float64)} for split, size in sizes.items()}
        covered.append(covers(winners_curse(winner, rng(n)).search_test, 0.0))
    assert 0.90 <= np.mean(covered) <= 0.98


def test_the_best_of_many_equal_individuals_is_found_cursed() -> None:
    draws = rng(15)
    right = {split: (draws.random((400, 100)) < 0.7).astype(np.float64) for split in ("search", "validation", "test")}
    best = int(right["search"].mean(axis=1).argmax())
    found = winners_curse({split: {"a": scores[best]} for split, scores in right.items()}, rng())
    assert found.search_test.low > 0
    assert covers(found.validation_test, 0.0)


def test_a_reference_takes_out_that_one_split_is_harder() -> None:
    draws, winner, reference = rng(16), {}, {}
    for split, share in (("search", 0.9), ("validation", 0.6), ("test", 0.3)):
        right = draws.random(300) < share
        reference[split] = {"a": right.astype(np.float64)}
        winner[split] = {"a": (right & (draws.random(300) < 0.95)).astype(np.float64)}
    assert winners_curse(winner, rng()).search_test.low > 0.4
    found = winners_curse(winner, rng(), reference).search_test
    assert abs(found.value) < 0.06 and found.high - found.low < 0.1
    own = {split: paired_difference(winner[split], reference[split], rng()).value for split in winner}
    assert found.value == pytest.approx(own["search"] - own["test"])


def test_a_curse_over_other_tasks_or_another_references_examples_is_refused() -> None:
    winner = {"search": {"a": np.ones(3)}, "validation": {"b": np.ones(3)}, "test": {"a": np.ones(3)}}
    with pytest.raises(TaskError, match="got those of tasks a and b"):
        winners_curse(winner, rng())
    scores = {split: {"a": np.ones(3)} for split in winner}
    with pytest.raises(TaskError, match="got 3 and 2 examples"):
        winners_curse(scores, rng(), {**scores, "test": {"a": np.ones(2)}})


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation_is_spearmans(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 6, 40)  # ties
    second = first + rng.normal(0, 2, 40)
    found = rank_correlation(first, second, rng)
    assert found.value == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    assert found.low < found.value < found.high and found.num_pairs == 40


def test_equal_orders_correlate_perfectly_and_opposite_ones_inversely() -> None:
    rng = np.random.default_rng(0)
    scores = np.arange(10.0)
    up, down = rank_correlation(scores, scores**3, rng), rank_correlation(scores, -scores, rng)
    assert (up.value, up.low, up.high) == pytest.approx((1, 1, 1))
    assert (down.value, down.low, down.high) == pytest.approx((-1, -1, -1))


def test_the_interval_of_a_rank_correlation_covers_luck() -> None:
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = rank_correlation(rng.normal(size=30), rng.normal(size=30), rng)
        covered += found.low <= 0 <= found.high
    assert covered >= 34, "95 % intervals of scores that have nothing to do with each other"


@pytest.mark.parametrize("scores", [[1.0, 2.0], [1.0, 1.0, 1.0]])
def test_a_rank_correlation_needs_three_that_differ(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="expected three or more"):
        rank_correlation(scores, scores, np.random.default_rng(0))
