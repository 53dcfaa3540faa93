"""`moe-evo tasks preview`: examples as the model reads them, before a search spends its time on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_evo.config.run import ScoringConfig
from moe_evo.records.folder import with_absolute_paths
from moe_evo.report.task_preview import PreviewedExample, PreviewedRow, TaskPreview
from moe_evo.runs.open_pool import open_pool
from moe_evo.tasks.data import TaskData, check_tasks, reported
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when examples become tokens, not before
    from moe_evo.tasks.answered import Answered
    from moe_evo.tasks.prompt import PromptFormat
    from moe_evo.tasks.rows import Row
    from moe_evo.tasks.task import Task

_SHOWN = 3


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
