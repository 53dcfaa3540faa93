"""How much of the right answer a generated text has in common with it: ROUGE-L, sentence BLEU and chrF, from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from moe_evo.errors import ConfigError
from moe_evo.tasks.examples import Example

_WORDS = re.compile(r"[a-z0-9]+")


def rouge_l(text: str, example: Example) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words; the best over the answers.

    Words are runs of ASCII letters and digits in lower case, without stemming, as in Google's `rouge_score`.
    """
    got = _WORDS.findall(text.lower())
    return max(_subsequence_f1(got, _WORDS.findall(answer.lower())) for answer in example.answers)


def _subsequence_f1(got: Sequence[str], right: Sequence[str]) -> float:
    common = _longest_common(got, right)
    return 2 * common / (len(got) + len(right)) if common else 0.0


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = 0  # the length without this word and without the other's word
        for place, another in enumerate(other, start=1):
            above = lengths[place]
            lengths[place] = before + 1 if word == another else max(above, lengths[place - 1])
            before = above
    return lengths[-1]


class SentenceScore:
    """A sentence score of the library sacrebleu, an extra, divided by 100. function: its name there."""

    def __init__(self, function: str) -> None:
        self._function = function

    def __call__(self, text: str, example: Example) -> float:
        score = getattr(_sacrebleu(), self._function)(text, list(example.answers)).score / 100
        return min(max(float(score), 0.0), 1.0)  # the sum of floats can be above by the last bit

    def require(self, option: str) -> None:
        """Raise ConfigError where the library is not installed. option: by which the metric was named."""
        try:
            _sacrebleu()
        except ImportError as error:
            raise ConfigError(
                f"{option}: {self._function} needs the library sacrebleu, which is not installed; "
                "pip install 'moe_evo[sacrebleu]'"
            ) from error


def _sacrebleu() -> Any:
    import sacrebleu

    return sacrebleu
