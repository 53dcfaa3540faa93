"""How a generated text is compared with the right answers: pure functions of strings, 0.0 to 1.0."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from moe_evo.plugins import Registry
from moe_evo.tasks.examples import Example, numbers_in
from moe_evo.tasks.overlap_metrics import SentenceScore, rouge_l

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_ENGLISH_WORD = (
    r"(?!['’]| (?!(?:is|was|are|and|or|but|not|because|since|as|for|in|on|with|would|could|should|can|will|has|does|"
    r"seems|looks|fits|matches|means)\b)[a-z])"
)
"""Behind a choice "A" or "I": neither an apostrophe nor a word that the article or the pronoun belongs to."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.casefold().split())


def exact_match(text: str, example: Example) -> float:
    """The text is an answer, up to case and spacing."""
    return float(normalised(text) in set(map(normalised, example.answers)))


def contains(text: str, example: Example) -> float:
    """An answer stands somewhere in the text, up to case and spacing."""
    return float(any(normalised(answer) in normalised(text) for answer in example.answers))


def f1(text: str, example: Example) -> float:
    """Best F1 of shared words over the answers, without punctuation and articles (as SQuAD's)."""
    return max(_word_f1(_words(text), _words(answer)) for answer in example.answers)


def first_option(text: str, example: Example) -> float:
    """The choice that stands first in the text, as whole words, is an answer.

    A capital of a choice must be one in the text, so that "us" does not name the choice "US"; only where no choice is
    found so, capitals are ignored. The English words "a" and "I" in front of what they belong to name no choice.
    """
    choices, answers = ([" ".join(one.split()) for one in some] for some in (example.choices, example.answers))
    named = _first_named(text, choices, ignore_case=False) or _first_named(text, choices, ignore_case=True)
    if set(choices) & set(answers):
        return float(named in answers)
    return float(named is not None and normalised(named) in set(map(normalised, answers)))


def number_match(text: str, example: Example) -> float:
    """The last number in the text equals the last number of an answer."""
    numbers = numbers_in(text)
    rights = {found[-1] for found in map(numbers_in, example.answers) if found}
    return float(bool(numbers) and numbers[-1] in rights)


AnswerMetric = Callable[[str, Example], float]
"""From what the model wrote and the example with its right answers to a share from 0 to 1."""


def _problem(metric: Any) -> str | None:
    try:
        signature(metric).bind("text", "example")
    except (TypeError, ValueError):
        return f"got {metric!r}, expected a function of (text, example)"
    return None


ANSWER_METRICS: Registry[AnswerMetric] = Registry(
    "metric",
    ["moe_evo.metrics"],
    {
        "exact_match": exact_match,
        "contains": contains,
        "f1": f1,
        "first_option": first_option,
        "number_match": number_match,
        "rouge_l": rouge_l,
        "sentence_bleu": SentenceScore("sentence_bleu"),
        "sentence_chrf": SentenceScore("sentence_chrf"),
    },
    _problem,
)

BESIDE = ("exact_match", "contains", "f1", "first_option", "number_match")
"""The metrics that are told beside the one that counts, wherever they mean something."""


def _first_named(text: str, choices: Sequence[str], *, ignore_case: bool) -> str | None:
    """The choice that the text names first, the longer one of two that begin at the same place; None where none is."""
    spaced = " ".join(text.split())
    found = [
        (match.start(), -len(choice), choice)
        for choice in choices
        if (match := re.search(_pattern(choice, ignore_case=ignore_case), spaced))
    ]
    return min(found)[2] if found else None


def _pattern(choice: str, *, ignore_case: bool) -> str:
    letters = "".join(
        re.escape(letter) if letter.isupper() and not ignore_case else f"(?i:{re.escape(letter)})" for letter in choice
    )
    behind = _NO_ENGLISH_WORD if choice.casefold() in ("a", "i") else ""
    return rf"(?<!\w){letters}(?!\w){behind}"


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _word_f1(got: Sequence[str], right: Sequence[str]) -> float:
    if not got or not right:
        return float(list(got) == list(right))
    shared = sum((Counter(got) & Counter(right)).values())
    return 2 * shared / (len(got) + len(right))
