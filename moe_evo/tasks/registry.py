"""How a config and its data become a task."""

from __future__ import annotations

from typing import Any

from moe_evo.errors import ConfigError, ModelError
from moe_evo.plugins import lacking
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.kinds import KINDS
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import BatchLimits
from moe_evo.tasks.task import Task

_MEMBERS = ("needs_reference", "rows", "batches", "score", "combine")


def build_task(data: TaskData, tokenizer: Any, batch_tokens: int) -> Task:
    """Make checked data ready for a model with this tokenizer; every example is tokenised here.

    Raises ModelError without a tokenizer, TaskError for an example that does not fit.
    """
    if tokenizer is None:
        raise ModelError(
            f"task {data.name}: the model comes without a tokenizer; put tokenizer.json beside its weights"
        )
    option = f"tasks ({data.name}).kind"
    format = PromptFormat(data.config, data, tokenizer)
    scorers = KINDS.get(data.kind, option).build_scorers([data.metric, data.search_metric], format)
    for scorer in scorers.values():
        problem = lacking(scorer, _MEMBERS, "moe_evo.tasks.task.Scorer")
        if problem is not None:
            raise ConfigError(f"{option}: {data.kind!r} makes no scorer: {problem}")
    return Task(data, scorers, BatchLimits(batch_tokens, len(tokenizer)), format)
