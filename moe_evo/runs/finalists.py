"""Which candidates are looked at on the validation split, and what each can be expected to score on new examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from moe_evo.config.evaluation import FitnessRule
from moe_evo.evaluation.fitness import over_tasks
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, ExampleScores, Individual, Population

_FEWEST_SWAPS = 2

Numbers = npt.NDArray[np.float64]


def finalists(population: Population, expected: Mapping[int, float], number: int) -> list[Individual]:
    """Up to `number` individuals, those of which most is expected first.

    expected: score by candidate number. Of two prunings that differ by a single exchange of one expert, only the better
    is taken, so that all are not mistaken in the same way. Where some individuals merge experts and others only prune,
    each kind has half of the places.
    """
    ranked = sorted(population.complete.ranked, key=lambda one: -expected[one.number])  # stable: ties stay as they were
    prunings: list[Individual] = []
    for one in ranked:
        if len(prunings) == number:
            break
        if one.genome.is_pruning and all(are_apart(one.genome, other.genome) for other in prunings):
            prunings.append(one)
    merged = [one for one in ranked if not one.genome.is_pruning]
    in_turn = [one for pair in zip_longest(merged, prunings) for one in pair if one is not None]
    return in_turn[:number]


def are_apart(one: Genome, other: Genome) -> bool:
    """Whether two prunings differ by more than the exchange of one kept expert, or in the active experts."""
    if one.top_k != other.top_k or one.num_kept != other.num_kept:
        return True
    swaps = sum(len(set(kept) - set(others)) for kept, others in zip(one.kept, other.kept, strict=True))
    return swaps >= _FEWEST_SWAPS


def better_half(ranked: Sequence[Individual], fewest: int = 1) -> list[Individual]:
    """The first half, `fewest` at least, and, where it has none that only prunes, the best that does."""
    half = list(ranked[: max((len(ranked) + 1) // 2, fewest)])
    prunings = [one for one in ranked if one.genome.is_pruning]
    return half if any(one.genome.is_pruning for one in half) else half + prunings[:1]


@dataclass(frozen=True)
class Judged:
    """A finalist with what it can be expected to score on new examples of the validation split's kind."""

    individual: Individual
    score: float


def judge(
    individuals: Sequence[Individual], expected: Sequence[float], scores: Sequence[ExampleScores], rule: FitnessRule
) -> list[Judged]:
    """Finalists, best first.

    expected: what the search expects of each. scores: of the validation examples that all of them have seen.

    The best of several scores is partly luck. So each is drawn towards the line that best predicts validation scores
    from expected ones, the more the noisier the scores are (empirical Bayes: Fay and Herriot 1979, Estimates of income
    for small places). Noise is that of differences on the same examples.
    """
    means = np.array(
        [over_tasks([float(part.mean()) for part in one.values()], [0.0] * len(one), rule)[0] for one in scores]
    )
    shrunk = _shrunk(means, np.asarray(expected), _noise(scores, rule))
    order = np.argsort(-shrunk, kind="stable")
    return [Judged(individuals[place], float(shrunk[place])) for place in order]


def _noise(scores: Sequence[ExampleScores], rule: FitnessRule) -> float:
    """The variance of a finalist's score less that of all finalists, on the average."""
    total, tasks = 0.0, len(scores[0])
    for task in scores[0]:
        of_task = np.stack([one[task] for one in scores])
        apart = of_task - of_task.mean(axis=0)
        total += float(apart.var(axis=1, ddof=1).mean()) / of_task.shape[1]
    return total / (tasks if rule == "worst" else tasks**2)  # the worst score is that of a single task


def _shrunk(means: Numbers, expected: Numbers, noise: float) -> Numbers:
    """(N,) scores drawn towards a line through them."""
    if len(means) < 3:
        return means
    x, y = expected - expected.mean(), means - means.mean()
    spread = float(x @ x)
    # a slope of 0 is taken for as likely as two more points would make it
    slope = max(float(x @ y), 0.0) / (spread * (1 + 2 / len(x))) if spread > 1e-18 else 0.0
    line = slope * x
    beyond = max(float(((y - line) ** 2).sum()) / (len(y) - 2) - noise, 0.0)
    trust = beyond / (beyond + noise) if beyond + noise > 0 else 1.0
    drawn: Numbers = means.mean() + line + trust * (y - line)
    return drawn


def put_together(outcomes: Sequence[Evaluation]) -> ExampleScores:
    """The scores (N,) a task of one genome on several parts of a split, put together."""
    found = [one.scores for one in outcomes]
    assert all(found), "a part of a split is scored to its end"
    return {task: np.concatenate([one[task] for one in found if one]) for task in found[0] or ()}
