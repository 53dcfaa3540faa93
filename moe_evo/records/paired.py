"""One model against another on the same examples: the difference of their scores, and whether it can be told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moe_evo.genomes.population import ExampleScores
from moe_evo.records.statistics import Z_95, Difference, McNemar, exact_mcnemar, paired_difference

_Z_POWER_80 = 0.8416212335729143
_FEW_DIFFERENT = 10  # with fewer the bootstrap's interval is too narrow, see `paired_difference`


@dataclass(frozen=True)
class Paired:
    """The scores of one model minus those of another, on the same examples.

    difference: mean over tasks, with its 95 % interval. mcnemar: where every score is 0 or 1.
    """

    difference: Difference
    mcnemar: McNemar | None = None

    @property
    def sign(self) -> int:
        """1 or -1 where the first model is better or worse, 0 where no difference can be told.

        The interval has to lie on one side of 0. Where fewer than ten examples were answered differently, McNemar's
        exact test has to agree.
        """
        side = int(self.difference.low > 0) - int(self.difference.high < 0)
        few = self.mcnemar is not None and self.mcnemar.won + self.mcnemar.lost < _FEW_DIFFERENT
        return 0 if few and self.mcnemar is not None and self.mcnemar.p_value >= 0.05 else side

    @property
    def is_equal(self) -> bool:
        """Whether the interval is a point at 0: both models have the same score on every example."""
        return self.difference.low == self.difference.value == self.difference.high == 0

    def examples_to_tell(self, difference: float) -> int | None:
        """About how many examples would tell a true difference of this size, four times in five; None if unknown.

        n = ((z_0.975 + z_0.8) s / d)^2 (a paired test's sample size, Cohen 1988), with s, the deviation of an example's
        difference, as the interval shows it. Rounded up to two digits.
        """
        now = self.difference
        deviation = (now.high - now.low) / (2 * Z_95) * math.sqrt(now.num_examples)
        number = ((Z_95 + _Z_POWER_80) * deviation / difference) ** 2
        return _rounded_up(number) if number > 0 else None


def _rounded_up(number: float) -> int:
    step = 10.0 ** max(math.ceil(math.log10(number)) - 2, 0)
    return round(math.ceil(number / step) * step)


@dataclass(frozen=True)
class PairedByTask:
    """The same for all tasks together and for each of them by its name."""

    overall: Paired
    tasks: Mapping[str, Paired] = field(default_factory=dict, hash=False)


def paired(first: ExampleScores, second: ExampleScores) -> Paired:
    """The first model's scores minus the second's; the bootstrap is seeded, so that numbers are the same every time.

    first, second: (N,) scores a task, of the same examples. Raises TaskError where tasks or numbers of examples differ.
    """
    difference = paired_difference(first, second, np.random.default_rng(0))
    return Paired(difference, exact_mcnemar(first, second))


def paired_by_task(first: ExampleScores, second: ExampleScores) -> PairedByTask:
    """As `paired`, of all tasks and of each; of a single task only the former."""
    overall = paired(first, second)
    if len(first) == 1:
        return PairedByTask(overall, {name: overall for name in first})
    return PairedByTask(overall, {name: paired({name: first[name]}, {name: second[name]}) for name in first})
