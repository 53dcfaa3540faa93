"""What can be said of a task's examples without a model: how many, how many twice, and what is right how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moe_evo.tasks.examples import Example


@dataclass(frozen=True)
class SplitFacts:
    """Facts of one split's examples.

    examples: how many. repeated: how many repeat the input of another one of the split. dropped: how many were left out
    as they stand in another split, too (`TaskConfig.drop_repeated`). labels: of choices, how often each place is the
    right one. answer: the right answer that is most frequent, and its share; None where there is none.
    """

    examples: int
    repeated: int
    dropped: int
    labels: tuple[int, ...]
    answer: tuple[str, float] | None


def split_facts(examples: Sequence[Example], dropped: int = 0) -> SplitFacts:
    """The facts of a split."""
    places = Counter(one.label for one in examples if one.label is not None)
    most = max((len(one.choices) for one in examples if one.label is not None), default=0)
    rights = Counter(
        (one.choices[one.label] if one.label is not None else one.answers[0]).strip()
        for one in examples
        if one.label is not None or one.answers
    )
    ((text, times),) = rights.most_common(1) or [("", 0)]
    return SplitFacts(
        examples=len(examples),
        repeated=len(examples) - len({one.key for one in examples}),
        dropped=dropped,
        labels=tuple(places[place] for place in range(most)),
        answer=(text, times / len(examples)) if times else None,
    )
