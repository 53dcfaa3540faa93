"""Whether one individual is better than another on the same examples, and how much of a score was luck.

Examples are taken as the random sample: the variation between seeds of a search is not covered. Each interval and
p-value is for one comparison; there is no correction for several comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_evo.config.evaluation import FitnessRule
from moe_evo.errors import TaskError
from moe_evo.genomes.population import ExampleScores

Z_95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""

_NUM_RESAMPLES = 9999
_BATCH_NUMBERS = 2**18  # drawn in one batch: arrays that fit in the CPU's cache make this several times faster

_Sample = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A difference of mean scores with its 95 % interval; num_examples: how many it was computed from."""

    value: float
    low: float
    high: float
    num_examples: int


@dataclass(frozen=True)
class McNemar:
    """The numbers of examples that only one of two individuals got right, and their exact two-sided p-value."""

    won: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class WinnersCurse:
    """How much lower the chosen individual scores on examples that were not used to choose it; positive is a loss.

    search_validation: score on search minus score on validation, the bias of choosing among all candidates.
    validation_test: the same for choosing among the finalists. search_test: both together.
    """

    search_validation: Difference
    validation_test: Difference
    search_test: Difference


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho with its 95 % interval; num_pairs: how many pairs it was computed from."""

    value: float
    low: float
    high: float
    num_pairs: int


def wilson_interval(share: float, number: float) -> tuple[float, float]:
    """The 95 % interval of a share among `number` examples (Wilson 1927); from 0 to 1 where there is no example.

    share: right ones divided by all. number: a count, or the count that a share of this variance would have.
    """
    if number <= 0:
        return (0.0, 1.0)
    squared = Z_95**2 / number
    centre = (share + squared / 2) / (1 + squared)
    margin = Z_95 / (1 + squared) * math.sqrt(share * (1 - share) / number + squared / (4 * number))
    return (max(centre - margin, 0.0), min(centre + margin, 1.0))


def share_interval(scores: ExampleScores, rule: FitnessRule) -> tuple[float, float]:
    """The 95 % interval of a fitness that is a share; scores: (N,) from 0 to 1 a task.

    Of one task, or the worst of several, it is Wilson's. For a mean over tasks the distances of their Wilson limits
    from their shares are added as independent errors are (Zou & Donner 2008, the method of variance estimates
    recovery), so that a task in which all is right still counts as uncertain.
    """
    means = [float(one.mean()) for one in scores.values()]
    limits = [wilson_interval(mean, _count(one)) for mean, one in zip(means, scores.values(), strict=True)]
    if rule == "worst":
        return limits[int(np.argmin(means))]
    below, above = (
        math.sqrt(sum((mean - limit[side]) ** 2 for mean, limit in zip(means, limits, strict=True))) / len(means)
        for side in (0, 1)
    )
    fitness = sum(means) / len(means)
    return (max(fitness - below, 0.0), min(fitness + above, 1.0))


def _count(scores: _Sample) -> float:
    """How many right or wrong answers have the variance of these (N,) scores from 0 to 1: N where they are such."""
    share, variance = float(scores.mean()), float(scores.var())
    return len(scores) * share * (1 - share) / variance if variance > 0 else len(scores)


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike, rng: np.random.Generator) -> RankCorrelation:
    """Whether two scores rank the same candidates alike: 1 the same order, 0 unrelated, -1 the reverse order.

    first, second: (N,) scores of the same candidates, ties allowed. Percentile bootstrap over candidates;
    resamples in which one score is constant have no rho and are left out. Raises ValueError for fewer than three
    candidates, or where a score is the same for all.
    """
    from scipy.stats import rankdata

    pairs = np.stack([np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)])
    number = pairs.shape[1]
    if number < 3 or not np.ptp(pairs, axis=1).all():
        raise ValueError(f"rank correlation: got {number} pairs, expected three or more that differ in both scores")

    def rho(drawn: _Sample) -> _Sample:
        """drawn: (2, R, N); Pearson's correlation of the ranks (R,)."""
        ranks = rankdata(drawn, axis=-1)
        ranks -= ranks.mean(axis=-1, keepdims=True)
        scale = np.sqrt((ranks**2).sum(axis=-1).prod(axis=0))
        found: _Sample = np.full(scale.shape, np.nan)
        np.divide(ranks.prod(axis=0).sum(axis=-1), scale, out=found, where=scale > 0)
        return found

    drawn = rho(pairs[:, rng.integers(number, size=(_NUM_RESAMPLES, number))])
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return RankCorrelation(float(rho(pairs[:, None])[0]), float(low), float(high), number)


def paired_difference(first: ExampleScores, second: ExampleScores, rng: np.random.Generator) -> Difference:
    """Mean over tasks of the mean of `first` minus `second`, example by example.

    first, second: (N,) scores a task, of the same examples in the same order. Bootstrap (BCa: Efron 1987,
    Better bootstrap confidence intervals) over examples, within each task. Assumes that a task's examples
    are independent draws. The interval is too narrow where only few examples have different scores: with fewer than
    about ten, use `exact_mcnemar`. Raises TaskError where tasks or numbers of examples differ.
    """
    differences = _differences(first, second)
    return _difference([(1 / len(differences), one) for one in differences.values()], rng)


def exact_mcnemar(first: ExampleScores, second: ExampleScores) -> McNemar | None:
    """Test whether, among the examples that only one of two gets right, each of the two has half.

    first, second: (N,) scores a task, of the same examples in the same order; those of all tasks are counted
    together, so that large tasks weigh more than in `paired_difference`. Binomial, two-sided, without an
    approximation (McNemar 1947); assumes that examples are independent draws. None where a score is neither
    0 nor 1. Raises TaskError where tasks or numbers of examples differ.
    """
    differences = _differences(first, second)
    scores = np.concatenate([*first.values(), *second.values()])
    if not np.isin(scores, (0.0, 1.0)).all():
        return None
    every = np.concatenate(list(differences.values()))
    won, lost = int((every > 0).sum()), int((every < 0).sum())
    if won == lost:  # both may be 0, for which there is no binomial test
        return McNemar(won, lost, 1.0)
    from scipy.stats import binomtest

    return McNemar(won, lost, float(binomtest(won, won + lost).pvalue))


def winners_curse(
    winner: Mapping[str, ExampleScores],
    rng: np.random.Generator,
    reference: Mapping[str, ExampleScores] | None = None,
) -> WinnersCurse:
    """How much lower an individual scores on later splits than on the one by which it was chosen.

    winner, reference: by split, `search`, `validation` and `test`, (N,) scores a task. Splits hold different
    examples, so they are resampled independently, and a split that is harder than the one before counts as a loss.
    With a `reference` that was not chosen by its scores, such as the full model, each split's score is the winner's
    minus the reference's, in pairs, and the difficulty of a split cancels.

    If an interval does not contain 0, chance alone would rarely make two splits differ so much. The interval cannot
    be used to correct the score on the search split, as the choice was made on these very examples. Raises TaskError
    where tasks differ, or where winner and reference were scored on different numbers of examples.
    """
    splits = ("search", "validation", "test")
    scores = {
        split: dict(winner[split]) if reference is None else _differences(winner[split], reference[split])
        for split in splits
    }
    for split in splits[1:]:
        _check_tasks(scores["search"], scores[split])
    return WinnersCurse(
        search_validation=_unpaired(scores["search"], scores["validation"], rng),
        validation_test=_unpaired(scores["validation"], scores["test"], rng),
        search_test=_unpaired(scores["search"], scores["test"], rng),
    )


def _unpaired(first: ExampleScores, second: ExampleScores, rng: np.random.Generator) -> Difference:
    share = 1 / len(first)
    samples = [(share, one) for one in first.values()] + [(-share, second[name]) for name in first]
    return _difference(samples, rng)


def _differences(first: ExampleScores, second: ExampleScores) -> dict[str, _Sample]:
    """(N,) first minus second by task, sorted by name, as two runs may have their tasks in different orders."""
    _check_tasks(first, second)
    for name in first:
        sizes = len(first[name]), len(second[name])
        if sizes[0] != sizes[1]:
            raise TaskError(f"scores of task {name}: got {sizes[0]} and {sizes[1]} examples, expected the same ones")
    return {name: first[name] - second[name] for name in sorted(first)}


def _check_tasks(first: ExampleScores, second: ExampleScores) -> None:
    if set(first) != set(second):
        names = " and ".join(", ".join(sorted(one)) or "none" for one in (first, second))
        raise TaskError(f"scores: got those of tasks {names}, expected the same tasks twice")
    empty = [name for scores in (first, second) for name in scores if not len(scores[name])]
    if empty or not first:
        raise TaskError(f"scores of task {empty[0]}: got none, expected some" if empty else "scores: got no task")


def _difference(samples: Sequence[tuple[float, _Sample]], rng: np.random.Generator) -> Difference:
    """Sum of weight times mean, with its BCa interval; samples: (weight, (N,)), each resampled independently."""
    num_examples = sum(len(one) for _, one in samples)
    fixed = sum(weight * float(one[0]) for weight, one in samples if not np.ptp(one))
    varied = [(weight, one) for weight, one in samples if np.ptp(one)]

    def total(*resampled: npt.NDArray[np.float64], axis: int = -1) -> Any:
        means = (one.mean(axis=axis) for one in resampled)
        return fixed + sum(weight * mean for (weight, _), mean in zip(varied, means, strict=True))

    drawn = [one for _, one in varied]
    value = float(total(*drawn))
    if not varied:
        return Difference(value, value, value, num_examples)
    from scipy.stats import bootstrap

    found = bootstrap(
        drawn,
        total,
        vectorized=True,
        axis=-1,
        n_resamples=_NUM_RESAMPLES,
        batch=max(_BATCH_NUMBERS // num_examples, 1),
        random_state=rng,  # SciPy calls it so in all versions from 1.12 on
    ).confidence_interval
    return Difference(value, float(found.low), float(found.high), num_examples)
