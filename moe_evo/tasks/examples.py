"""One row of a task's data as a frozen value, and the checks that a row must pass.

A parser takes the row, the metric that counts, and `file:line`. Every complaint names the file and line, what was
got and what was expected. No torch here, so that all data are checked before a model is loaded.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from moe_evo.errors import TaskError
from moe_evo.shown import shown

_NUMBER = re.compile(
    r"(?:(?<!\w)[-\u2212])?"  # a sign, also the typographic one; behind a word or number it is a dash
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"  # with commas every three digits, or none
    r"(?:[eE][+-]?\d+(?!\w))?"
)


Turn = tuple[str, str]
"""Who speaks in a chat, and what: (role, text)."""

_ROLES = ("system", "user", "assistant")
_LETTER = re.compile(r"[A-Z]")


@dataclass(frozen=True)
class Example:
    """One example; fields that its kind of task does not use are empty.

    label: index of the right choice. answers: all right answers. where: `file:line`. prompt: of a chat the last turn.
    turns: of a chat the turns before it, each (role, text). system: of a chat the system's text.
    """

    where: str
    prompt: str = ""
    choices: tuple[str, ...] = ()
    label: int | None = None
    answers: tuple[str, ...] = ()
    text: str = ""
    turns: tuple[Turn, ...] = ()
    system: str = ""

    @property
    def input(self) -> str:
        """All that is asked: the prompt or text, behind what was said before it."""
        before = [self.system, *(content for _, content in self.turns)]
        return "\n".join([*filter(None, before), self.prompt or self.text])

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """The input itself: equal for two rows that ask the same with the same choices in any order."""
        return (self.input.strip(), tuple(sorted(choice.strip() for choice in self.choices)))

    @property
    def digest(self) -> str:
        """sha256 of the input, blind to case, width and spacing."""
        folded = unicodedata.normalize("NFKC", self.input).casefold()
        return hashlib.sha256(" ".join(folded.split()).encode()).hexdigest()


def numbers_in(text: str) -> list[float]:
    """The numbers written in a text; a comma is part of one only where it separates thousands."""
    return [float(found.replace(",", "").replace("\u2212", "-")) for found in _NUMBER.findall(text)]


def kind_of(row: dict[str, Any], where: str) -> str:
    """The kind of task that a row's fields speak of."""
    if "choices" in row and ("label" in row or "answers" not in row):
        return "choice"
    if "answers" in row or "messages" in row:
        return "generation"
    if "text" in row:
        return "perplexity"
    raise TaskError(
        f"{where}: got the fields {shown(sorted(row))}, expected 'prompt' with 'choices' and 'label', "
        "'prompt' with 'answers', 'messages', or 'text'; name them so, map them with fields, or set the task's kind"
    )


def parse_choice(row: Any, metric: str, where: str) -> Example:
    """A prompt with choices, and which of them is right."""
    row = _object(row, where)
    choices = _choices(row, where)
    return replace(_asked(row, where), choices=choices, label=_label(row, choices, where))


def parse_text(row: Any, metric: str, where: str) -> Example:
    """A text."""
    return Example(where, text=_string(_object(row, where), "text", where))


def parse_input(row: Any, metric: str, where: str) -> Example:
    """A text, or a prompt whose answer nobody needs to know."""
    row = _object(row, where)
    return parse_text(row, metric, where) if "text" in row else _asked(row, where)


def parse_answers(row: Any, metric: str, where: str) -> Example:
    """A prompt with its right answers, and choices where the metric is about them."""
    row = _object(row, where)
    asked = _asked(row, where)
    choices = _choices(row, where) if "choices" in row or metric == "first_option" else ()
    if "answers" not in row and choices and "label" in row:
        answers: tuple[str, ...] = (choices[_label(row, choices, where)],)
    elif "answers" not in row and "messages" in row:
        answers = (_last_answer(row, where),)
    else:
        answers = _answers(row, where)
    if metric == "number_match" and not any(map(numbers_in, answers)):
        _refuse(where, "answers", list(answers), "a number in them, as the metric is number_match")
    if metric == "first_option" and not {a.strip() for a in answers} & {c.strip() for c in choices}:
        _refuse(where, "answers", list(answers), "one of the choices, as the metric is first_option")
    return replace(asked, choices=choices, answers=answers)


def _asked(row: dict[str, Any], where: str) -> Example:
    """The question: a prompt, or a chat up to the last turn of the user."""
    system = _string(row, "system", where) if row.get("system") else ""
    if "messages" not in row:
        return Example(where, _string(row, "prompt", where), system=system)
    if "prompt" in row:
        _refuse(where, "messages", row["messages"], "no messages beside a prompt")
    turns = _turns(row, where)
    if turns[0][0] == "system":
        if system:
            _refuse(where, "system", system, "none, as the messages begin with a system turn")
        (_, system), *turns = turns
    if turns and turns[-1][0] == "assistant":
        turns = turns[:-1]  # the answer
    if not turns or turns[-1][0] != "user":
        _refuse(where, "messages", row["messages"], "a user's turn at the end, or before the assistant's last one")
    return Example(where, turns[-1][1], turns=tuple(turns[:-1]), system=system)


def _turns(row: dict[str, Any], where: str) -> list[Turn]:
    value = _field(row, "messages", where)
    turns = []
    for number, one in enumerate(value if isinstance(value, list) else []):
        role, content = (one.get("role"), one.get("content")) if isinstance(one, dict) else (None, None)
        if role not in _ROLES or not isinstance(content, str) or not content.strip():
            _refuse(where, f"messages[{number}]", one, "a 'role' (system, user or assistant) and a 'content' of text")
        if role == "system" and number:
            _refuse(where, f"messages[{number}]", one, "a system turn only at the beginning")
        turns.append((role, content))
    if not turns:
        _refuse(where, "messages", value, "a list of at least 1 turn, each with 'role' and 'content'")
    return turns


def _last_answer(row: dict[str, Any], where: str) -> str:
    """What the assistant says at the end of a chat."""
    role, content = _turns(row, where)[-1]
    if role != "assistant":
        _refuse(where, "messages", row["messages"], "a turn of the assistant at the end, which is the answer")
    return content


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


def _label(row: dict[str, Any], choices: tuple[str, ...], where: str) -> int:
    """The index of the right choice, which is told by its index from 0, its text or its letter, A for the first."""
    value, last = _field(row, "label", where), len(choices) - 1
    # a bool is an int to Python, but true is no index
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= last:
        return value
    if isinstance(value, str):
        alike = [index for index, choice in enumerate(choices) if choice.strip() == value.strip()]
        if len(alike) == 1:
            return alike[0]
        if _LETTER.fullmatch(value.strip()) and not alike and ord(value.strip()) - ord("A") <= last:
            return ord(value.strip()) - ord("A")
    _refuse(
        where, "label", value,
        f"an integer from 0 to {last}, the index of the right choice, or its letter or text",
    )  # fmt: skip


def _answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = _field(row, "answers", where)
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        _refuse(where, "answers", value, "a string or a list of at least 1 string, none blank")
    return tuple(answers)
