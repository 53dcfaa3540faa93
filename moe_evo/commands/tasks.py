"""`moe-evo tasks`: what there is to say about tasks, and examples as the model reads them, before a search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moe_evo.config.run import ScoringConfig
from moe_evo.config.task import SPLITS
from moe_evo.records.folder import with_absolute_paths
from moe_evo.records.resolution import margin, smallest_gain
from moe_evo.report.task_check import CheckedSplit, TaskCheck, TasksCheck
from moe_evo.report.task_preview import PreviewedExample, PreviewedRow, TaskPreview
from moe_evo.runs.early_warnings import split_warnings
from moe_evo.runs.open_pool import open_pool
from moe_evo.tasks.chance import chance_level
from moe_evo.tasks.data import TaskData, check_tasks, is_share, reported
from moe_evo.tasks.facts import split_facts
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when examples become tokens, not before
    from moe_evo.tasks.answered import Answered
    from moe_evo.tasks.prompt import PromptFormat
    from moe_evo.tasks.rows import Row
    from moe_evo.tasks.task import Task

_SHOWN = 3
_MOST_ALIKE = 0.8


def preview(config: ScoringConfig, tracker: Tracker, *, answers: bool) -> tuple[TaskPreview, ...]:
    """The first examples of each task's search split, as the model reads them when they are reported.

    answers: also load the model, and let it answer them. Raises TaskError, ConfigError or ModelError.
    """
    config = with_absolute_paths(config)
    data = check_tasks(config.tasks)
    from moe_evo.models.source import ModelSource
    from moe_evo.tasks.prompt import PromptFormat
    from moe_evo.tasks.registry import build_task

    source = ModelSource(config.model, needs_weights=answers)
    tasks = [build_task(one, source.tokenizer, config.evaluation.batch_tokens) for one in data]
    given: dict[tuple[str, int], Answered] = {}
    if answers:
        with open_pool(config, source, data, tracker, tasks=tasks) as pool:
            pool.listener = tracker.pool
            given = {(one.task, one.number): one for one in pool.answered(None, reported("search", data), _SHOWN)}
    return tuple(
        _preview(one, task, PromptFormat(one.config, one, source.tokenizer), given)
        for one, task in zip(data, tasks, strict=True)
    )


def check(config: ScoringConfig) -> TasksCheck:
    """How many examples the tasks' splits have, what is right how often, and what so many can tell; needs no model.

    Raises TaskError or ConfigError.
    """
    data = check_tasks(config.tasks)
    lines = [*split_warnings(data, config.evaluation.fitness), *(line for one in data for line in _odd(one))]
    return TasksCheck(tuple(map(_checked, data)), tuple(lines))


def _checked(data: TaskData) -> TaskCheck:
    splits = {}
    for split in SPLITS:
        facts = split_facts(data.splits[split], data.dropped[split])
        is_exact = is_share([data])
        splits[split] = CheckedSplit(
            facts,
            margin(facts.examples) if is_exact else None,
            smallest_gain(facts.examples) if is_exact else None,
            chance_level(data.metric, data.splits[split]),
        )
    return TaskCheck(data.name, data.kind, data.metric, data.search_metric, data.hash, splits)


def _odd(data: TaskData) -> Iterator[str]:
    """Lines on what is probably a mistake in a task's labels."""
    facts = split_facts([one for part in data.splits.values() for one in part])
    never = [place for place, number in enumerate(facts.labels) if number == 0]
    if facts.labels and never:
        places = ", ".join(map(str, never))
        first = " (do labels count from 1?)" if never[0] == 0 else ""
        yield f"warning: no example of {data.name} has the label {places}, of 0 to {len(facts.labels) - 1}{first}"
    if facts.answer is not None and facts.answer[1] > _MOST_ALIKE:
        text, share = facts.answer
        yield f"warning: {text[:40]!r} is right in {share:.0%} of {data.name}, which a model scores that says only this"


def _preview(data: TaskData, task: Task, format: PromptFormat, given: dict[tuple[str, int], Answered]) -> TaskPreview:
    examples = data.splits["search"]
    shown = []
    for number, example in enumerate(examples[:_SHOWN]):
        rows = [part for row in task.scorer.rows(number, example) for part in _rows(row, format)]
        answered = given.get((data.name, number))
        text = example.text or format.prompt(example)
        right = example.answers if example.label is None else (example.choices[example.label],)
        told = None if answered is None or answered.given is None else answered.given.text
        score = None if answered is None else answered.score
        shown.append(PreviewedExample(example.where, text, tuple(rows), right, told, score))
    return TaskPreview(data.name, data.kind, data.metric, len(examples), tuple(shown), task.notes)


def _rows(row: Row, format: PromptFormat) -> Sequence[PreviewedRow]:
    """A row once for each of its answers: what is read, and what is scored after it."""
    if not row.answers:
        return [PreviewedRow(_texts(row.tokens, format))]
    read = row.tokens[: row.start + 1]
    return [PreviewedRow(_texts(read, format), _texts(tokens, format)) for _, tokens in row.answers]


def _texts(tokens: Sequence[int], format: PromptFormat) -> tuple[str, ...]:
    return tuple(format.token_text(token) for token in tokens)
