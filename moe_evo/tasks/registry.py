"""The kinds of task, and how a config becomes a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_evo.errors import ModelError
from moe_evo.tasks.choice import ChoiceScorer
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.distillation import DistillationScorer
from moe_evo.tasks.generation import GenerationScorer
from moe_evo.tasks.perplexity import PerplexityScorer
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import BatchLimits
from moe_evo.tasks.task import Scorer, Task

SCORERS: dict[str, Callable[[PromptFormat], Scorer]] = {
    "choice": ChoiceScorer,
    "generation": GenerationScorer,
    "perplexity": PerplexityScorer,
    "distillation": DistillationScorer,
}


def build_task(data: TaskData, tokenizer: Any, batch_tokens: int) -> Task:
    """Make checked data ready for a model with this tokenizer; every example is tokenised here.

    Raises ModelError without a tokenizer, TaskError for an example that does not fit.
    """
    if tokenizer is None:
        raise ModelError(
            f"task {data.name}: the model comes without a tokenizer; put tokenizer.json beside its weights"
        )
    scorer = SCORERS[data.kind](PromptFormat(data.config, data, tokenizer))
    return Task(data, scorer, BatchLimits(batch_tokens, len(tokenizer)))
