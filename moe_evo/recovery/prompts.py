"""What a smaller model learns from: the prompts of the tasks' search splits, and those of a file.

Nothing that the result is chosen or scored by may be among them. No torch here, so that all is checked before a model
is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_evo.errors import TaskError
from moe_evo.files.tables import is_table
from moe_evo.tasks.data import TaskData, read_task
from moe_evo.tasks.examples import Example, parse_input
from moe_evo.tasks.prompt import PromptFormat, Tokens
from moe_evo.tasks.sources import Source, read_source, text_rows

_HELD_OUT = ("validation", "test")


@dataclass(frozen=True)
class Prompt:
    """Tokens to read, (T,).

    answer: tokens of a right answer behind them; () where none is known, or none is learned. is_text: a whole text,
    behind which no answer comes. stop: text before which an answer ends.
    """

    tokens: Tokens
    answer: Tokens = ()
    is_text: bool = False
    stop: str = "\n"

    @property
    def lacks_answer(self) -> bool:
        """Whether the full model is to write one."""
        return not self.is_text and not self.answer


@dataclass(frozen=True)
class FilePrompts:
    """The checked lines of a file, each with the number of the task whose prompts look so; None for a whole text."""

    lines: tuple[tuple[int | None, Example], ...]
    hash: str


def read_prompts(path: str, tasks: Sequence[TaskData], option: str = "recover.prompts") -> FilePrompts:
    """Read a file of prompts; raises TaskError for what is no prompt, or is held out.

    path: a file of rows by its ending, such as .jsonl, or plain text. tasks: whose validation and test splits are held
    out. option: by which the file was given.
    """
    local = Path(path).expanduser()
    if not local.is_file():
        raise TaskError(f"{option}: got {path!r}, expected a file with one prompt or text a line")
    file = read_source(local, path)
    lines = tuple(_rows(file, tasks) if is_table(path) else _text_lines(file))
    if not lines:
        raise TaskError(f"{path}: is empty, expected one prompt or text a line")
    # whole splits, also where this run is judged by some of their examples
    whole = [read_task(replace(task.config, num_validation=0, num_test=0)) for task in tasks]
    held_out = {
        example.digest: f"the {split} split of task {task.name}"
        for task in whole
        for split in _HELD_OUT
        for example in task.splits[split]
    }
    for _, example in lines:
        if example.digest in held_out:
            raise TaskError(
                f"{example.where}: is in {held_out[example.digest]}, by which the result is judged; leave it out"
            )
    return FilePrompts(lines, hashlib.sha256(file.content or b"").hexdigest())


def _rows(file: Source, tasks: Sequence[TaskData]) -> Iterator[tuple[int | None, Example]]:
    names = [task.name for task in tasks]
    for where, row in file.rows():
        example = parse_input(row, "", where)
        yield None if example.text else _task_number(row, names, where), example


def _text_lines(file: Source) -> Iterator[tuple[None, Example]]:
    assert file.content is not None, "it is a file"
    for where, text in text_rows(file.shown, file.content):
        yield None, Example(where, text=text)


def _task_number(row: Mapping[str, Any], names: Sequence[str], where: str) -> int:
    """Of the task whose prefix, few-shot examples and chat template go with a prompt."""
    if "task" not in row and len(names) == 1:
        return 0
    if row.get("task") not in names:
        raise TaskError(
            f"{where}: task: got {row.get('task')!r}, expected one of {', '.join(names)}, as whose prompts this one "
            "is formatted"
        )
    return names.index(row["task"])


def split_prompts(
    tasks: Sequence[TaskData], formats: Sequence[PromptFormat], split: str, answer_tokens: int, *, labelled: bool
) -> list[Prompt]:
    """The prompts of a split of all tasks; labelled: with right answers where there are any."""
    return [
        _prompt(format, example, answer_tokens, labelled=labelled)
        for task, format in zip(tasks, formats, strict=True)
        for example in task.splits[split]
    ]


def file_prompts(found: FilePrompts, formats: Sequence[PromptFormat], answer_tokens: int) -> list[Prompt]:
    """The lines of a file as prompts; whole texts are cut as those of the first task."""
    return [
        _prompt(formats[0 if number is None else number], example, answer_tokens, labelled=False)
        for number, example in found.lines
    ]


def _prompt(format: PromptFormat, example: Example, answer_tokens: int, *, labelled: bool) -> Prompt:
    """answer_tokens: most tokens of an answer that has yet to be written."""
    if example.text:
        tokens = format.text_tokens(example)
        if len(tokens) < 2:
            raise TaskError(f"{example.where}: got a text of {len(tokens)} tokens, expected at least 2")
        return Prompt(tokens, is_text=True)
    if labelled and (example.label is not None or example.answers):
        context, (answer,) = format.pair_tokens(example, (format.following_answer(example),))
        return Prompt(context, answer)
    return Prompt(format.bare_tokens(example, answer_tokens), stop=format.config.stop)
