"""What `moe-evo tasks preview` shows of a task: prompts as the model reads them, their tokens, where scoring starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_evo.report.screen import screen

_MOST_TOKENS = 12  # of the prompt's end; --json has all


@dataclass(frozen=True)
class PreviewedRow:
    """A sequence that the model reads, as texts of single tokens.

    read: tokens before what is scored. scored: tokens whose log-likelihood counts; () where an answer is generated.
    """

    read: tuple[str, ...]
    scored: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreviewedExample:
    """An example as the model reads it.

    where: file and line. text: all that stands before the answer, or the text. rows: what the model reads, a row for
    each choice. right: the right answers. given: what the full model answered, or None. score: of that answer.
    """

    where: str
    text: str
    rows: tuple[PreviewedRow, ...]
    right: tuple[str, ...]
    given: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class TaskPreview:
    """The first examples of a task's search split. num_examples: of that split. notes: on the task's prompts."""

    name: str
    kind: str
    metric: str
    num_examples: int
    examples: tuple[PreviewedExample, ...]
    notes: tuple[str, ...]


def print_previews(previews: Sequence[TaskPreview]) -> None:
    """Print examples with their tokens, and where scoring starts."""
    console = screen()
    for task in previews:
        for number, one in enumerate(task.examples, start=1):
            of = f"{number} of {task.num_examples} search examples"
            console.rule(f"{task.name} ({task.kind}, {task.metric}): {of}, {one.where}", align="left", characters="-")
            for line in (one.text, *_lines(one)):
                console.print(line, highlight=False, soft_wrap=True)
        for note in task.notes:
            console.print(f"note      {note}", highlight=False, soft_wrap=True)


def _lines(example: PreviewedExample) -> list[str]:
    """tokens: the end of what is read, then | and what is scored."""
    lines = [f"tokens    {_tokens(row)}" for row in example.rows]
    if example.right:
        lines.append(f"right     {' or '.join(map(repr, example.right))}")
    if example.given is not None:
        score = "" if example.score is None else f", scored {example.score:.4g}"
        lines.append(f"answered  {example.given!r}{score}")
    return lines


def _tokens(row: PreviewedRow) -> str:
    left_out = len(row.read) - _MOST_TOKENS
    end = " ".join(map(repr, row.read[max(left_out, 0) :]))
    begins = f"{left_out} more, then {end}" if left_out > 0 else end
    if not row.scored:
        return f"{begins} | generation starts"
    shown = " ".join(map(repr, row.scored[:_MOST_TOKENS]))
    more = len(row.scored) - _MOST_TOKENS
    return f"{begins} | scored: {shown}{f' and {more} more' if more > 0 else ''}".lstrip()
