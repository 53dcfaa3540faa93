"""The kinds of task, and how a config becomes a task."""

from __future__ import annotations

from typing import Any

from moe_evo.config import TaskConfig
from moe_evo.errors import ModelError
from moe_evo.tasks.base import Task
from moe_evo.tasks.choice import ChoiceTask
from moe_evo.tasks.data import read_task
from moe_evo.tasks.distillation import DistillationTask
from moe_evo.tasks.generation import GenerationTask
from moe_evo.tasks.perplexity import PerplexityTask
from moe_evo.tasks.rows import BatchLimits

TASKS: dict[str, type[ChoiceTask | GenerationTask | PerplexityTask | DistillationTask]] = {
    "choice": ChoiceTask,
    "generation": GenerationTask,
    "perplexity": PerplexityTask,
    "distillation": DistillationTask,
}


def build_task(config: TaskConfig, tokenizer: Any, batch_tokens: int) -> Task:
    """Read the task's data and make it ready for a model with this tokenizer."""
    data = read_task(config)
    if tokenizer is None:
        raise ModelError(
            f"task {data.name}: the model comes without a tokenizer; put tokenizer.json beside its weights"
        )
    limits = BatchLimits(batch_tokens, len(tokenizer))
    return TASKS[data.kind](config, data, tokenizer, limits)
