"""What a model answered to single examples, to read and to keep: plain values without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_evo.plain import Plain
from moe_evo.tasks.examples import Example

_LONGEST = 60


@dataclass(frozen=True)
class Given:
    """An answer: the text, and for one of several choices the log-likelihood of each choice in nats."""

    text: str
    log_likelihoods: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answered:
    """An example of a split with what a model answered to it.

    number: of the example in its split. given: None where the kind of task has no answer to show, as perplexity.
    score: of the example by `metric`; None where it is no number.
    """

    task: str
    split: str
    number: int
    example: Example
    given: Given | None
    metric: str
    score: float | None

    @property
    def gold(self) -> tuple[str, ...]:
        """The right answers."""
        label = self.example.label
        return self.example.answers if label is None else (self.example.choices[label],)

    def to_plain(self) -> Plain:
        """The form of a line of JSONL; what the kind of task does not have is left out."""
        given = self.given or Given("")
        told: Plain = {
            "task": self.task,
            "split": self.split,
            "example": self.number,
            "source": self.example.where,
            "prompt": self.example.prompt,
            "text": self.example.text,
            "choices": list(self.example.choices),
            "log_likelihoods": [one if math.isfinite(one) else None for one in given.log_likelihoods],
        }
        told = {name: value for name, value in told.items() if value not in ("", [])}
        if self.given is not None:
            told["answer"] = given.text
        if self.gold:
            told["gold"] = list(self.gold)
        return {**told, "metric": self.metric, "score": self.score}

    def __str__(self) -> str:
        asked = _short(self.example.prompt or self.example.text, from_end=True)
        gold = " or ".join(_short(one) for one in self.gold[:2])
        return f"{asked} -> {_short(self.given.text if self.given else '')}{f', right is {gold}' if gold else ''}"


def _short(text: str, *, from_end: bool = False) -> str:
    """A text in one line of at most 60 characters, in quotes; of a prompt its end says most."""
    if len(text) > _LONGEST:
        text = f"...{text[3 - _LONGEST :]}" if from_end else f"{text[: _LONGEST - 3]}..."
    return repr(text)
