"""The kinds of task, and how a config becomes a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_evo.config import TaskConfig
from moe_evo.errors import ModelError
from moe_evo.tasks.choice import ChoiceScorer
from moe_evo.tasks.data import read_task
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


def build_task(config: TaskConfig, tokenizer: Any, batch_tokens: int) -> Task:
    """Read the task's data and make it ready for a model with this tokenizer."""
    data = read_task(config)
    if tokenizer is None:
        raise ModelError(
            f"task {data.name}: the model comes without a tokenizer; put tokenizer.json beside its weights"
        )
    scorer = SCORERS[data.kind](PromptFormat(config, data, tokenizer))
    return Task(data, scorer, BatchLimits(batch_tokens, len(tokenizer)))
