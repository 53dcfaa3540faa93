"""One row of a task's data as a frozen value, and the checks that a row must pass.

A parser takes the row, the metric that counts, and `file:line`. Every complaint names the file and line, what was
got and what was expected. No torch here, so that all data are checked before a model is loaded.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, NoReturn

from moe_evo.errors import TaskError
from moe_evo.shown import shown

_NUMBER = re.compile(
    r"(?:(?<!\w)[-\u2212])?"  # a sign, also the typographic one; behind a word or number it is a dash
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"  # with commas every three digits, or none
    r"(?:[eE][+-]?\d+(?!\w))?"
)


@dataclass(frozen=True)
class Example:
    """One example; fields that its kind of task does not use are empty.

    label: index of the right choice. answers: all right answers. where: `file:line`.
    """

    where: str
    prompt: str = ""
    choices: tuple[str, ...] = ()
    label: int | None = None
    answers: tuple[str, ...] = ()
    text: str = ""

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """The input itself: equal for two rows that ask the same with the same choices in any order."""
        return ((self.prompt or self.text).strip(), tuple(sorted(choice.strip() for choice in self.choices)))

    @property
    def digest(self) -> str:
        """sha256 of the prompt (or text), blind to case, width and spacing."""
        folded = unicodedata.normalize("NFKC", self.prompt or self.text).casefold()
        return hashlib.sha256(" ".join(folded.split()).encode()).hexdigest()


def numbers_in(text: str) -> list[float]:
    """The numbers written in a text; a comma is part of one only where it separates thousands."""
    return [float(found.replace(",", "").replace("\u2212", "-")) for found in _NUMBER.findall(text)]


def kind_of(row: dict[str, Any], where: str) -> str:
    """The kind of task that a row's fields speak of."""
    if "choices" in row and ("label" in row or "answers" not in row):
        return "choice"
    if "answers" in row:
        return "generation"
    if "text" in row:
        return "perplexity"
    raise TaskError(
        f"{where}: got the fields {shown(sorted(row))}, expected 'prompt' with 'choices' and 'label', "
        "'prompt' with 'answers', or 'text'; name them so, or set the task's kind"
    )


def parse_choice(row: Any, metric: str, where: str) -> Example:
    """A prompt with choices, and the index of the right one."""
    row = _object(row, where)
    choices = _choices(row, where)
    return Example(where, _string(row, "prompt", where), choices, _label(row, len(choices), where))


def parse_text(row: Any, metric: str, where: str) -> Example:
    """A text."""
    return Example(where, text=_string(_object(row, where), "text", where))


def parse_input(row: Any, metric: str, where: str) -> Example:
    """A text, or a prompt whose answer nobody needs to know."""
    row = _object(row, where)
    return parse_text(row, metric, where) if "text" in row else Example(where, _string(row, "prompt", where))


def parse_answers(row: Any, metric: str, where: str) -> Example:
    """A prompt with its right answers, and choices where the metric is about them."""
    row = _object(row, where)
    prompt = _string(row, "prompt", where)
    choices = _choices(row, where) if "choices" in row or metric == "first_option" else ()
    if "answers" not in row and choices and "label" in row:
        answers: tuple[str, ...] = (choices[_label(row, len(choices), where)],)
    else:
        answers = _answers(row, where)
    if metric == "number_match" and not any(map(numbers_in, answers)):
        _refuse(where, "answers", list(answers), "a number in them, as the metric is number_match")
    if metric == "first_option" and not {a.strip() for a in answers} & {c.strip() for c in choices}:
        _refuse(where, "answers", list(answers), "one of the choices, as the metric is first_option")
    return Example(where, prompt, choices, answers=answers)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise TaskError(f"{where}: got {_shown(row)}, expected a JSON object")
    return row


def _refuse(where: str, name: str, got: object, expected: str) -> NoReturn:
    raise TaskError(f"{where}: {name}: got {_shown(got)}, expected {expected}")


def _shown(value: object) -> str:
    return shown(value, 80)


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise TaskError(f"{where}: has no {name!r}; got the fields {shown(sorted(row))}")
    return row[name]


def _string(row: dict[str, Any], name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str) or not value.strip():
        _refuse(where, name, value, "a string that is not blank")
    return value


def _choices(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = _field(row, "choices", where)
    strings = isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)
    if not strings or len(value) < 2 or len(set(value)) < len(value):
        _refuse(where, "choices", value, "a list of at least 2 distinct strings")
    return tuple(value)


def _label(row: dict[str, Any], num_choices: int, where: str) -> int:
    value = _field(row, "label", where)
    # a bool is an int to Python, but true is no index
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < num_choices:
        _refuse(where, "label", value, f"an integer from 0 to {num_choices - 1}, the index of the right choice")
    return value


def _answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = _field(row, "answers", where)
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        _refuse(where, "answers", value, "a string or a list of at least 1 string, none blank")
    return tuple(answers)
