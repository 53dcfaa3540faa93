"""What a user should know before the search spends its time: small splits, and a full model that cannot do the task."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_evo.config.evaluation import FitnessRule
from moe_evo.config.task import SPLITS
from moe_evo.evaluation.pool import Pool
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.records.resolution import margin, smallest_gain
from moe_evo.records.result import Score
from moe_evo.records.statistics import Z_95
from moe_evo.tasks.chance import chance_level
from moe_evo.tasks.data import TaskData, is_share
from moe_evo.tasks.kinds import KINDS, SHARE

_FEW = 100
_MARGIN = 0.05
_SHOWN = 3

_MEANS = {
    "search": "a search learns so few by heart, and its winner does worse on others",
    "validation": "they choose the winner, so that luck has a large part in it",
    "test": "they are all that the final scores rest on",
}


def split_warnings(data: Sequence[TaskData], rule: FitnessRule) -> list[str]:
    """A line for each split that has few examples: of all tasks, or of the smallest where the worst task counts."""
    lines = []
    for split in SPLITS:
        number = (min if rule == "worst" else sum)(len(task.splits[split]) for task in data)
        if number < _FEW:
            each = "a task " if rule == "worst" and len(data) > 1 else ""
            exactly = _margin(number) if split == "test" and is_share(data) else ""
            lines.append(
                f"warning: only {number} {split} examples {each}({_MEANS[split]}){exactly}; give {_FEW} or more"
            )
    return lines


def split_lines(data: Sequence[TaskData]) -> list[str]:
    """A line for each task: how many examples its splits have, and what its test split can tell."""
    return [f"task {task.name}: {sizes_of(task)} examples{resolution_of(task)}" for task in data]


def sizes_of(task: TaskData) -> str:
    """How many examples each split of a task has, in words."""
    return ", ".join(f"{len(task.splits[split])} {split}" for split in SPLITS)


def resolution_of(task: TaskData) -> str:
    """In words, what the test split of a task can tell; '' where its scores are no shares."""
    if not is_share([task]):
        return ""
    number = len(task.splits["test"])
    return f"; a test score is told to ±{margin(number):.3f}, a gain of {smallest_gain(number):.3f} from chance"


def _margin(number: int) -> str:
    """How exactly so many answers tell a share of right ones, at worst."""
    enough = math.ceil((Z_95 / 2 / _MARGIN) ** 2 / 10) * 10
    return f": they tell a score to ±{margin(number):.2f}, {enough} tell it to ±{_MARGIN:g}"


def full_model_warnings(data: Sequence[TaskData], full: Evaluation, genome: Genome, pool: Pool) -> list[str]:
    """Lines about each task on which the full model scores 0 or is no better than guessing, with some of its answers.

    full: its scores on the search split. genome: the full model's.
    """
    found = {task.name: told for task in data if (told := _weakness(task, full)) is not None}
    if not found:
        return []
    answered = pool.answered(genome, "search", _SHOWN)
    lines = []
    for name, told in found.items():
        lines.append(
            f"warning: {told}; pruned models can hardly do better. Is the prompt as the model expects it? "
            "moe-evo tasks preview shows it"
        )
        lines += [f"  it answered: {one}" for one in answered if one.task == name and one.given is not None]
    return lines


def _weakness(task: TaskData, full: Evaluation) -> str | None:
    """In words why the full model cannot do a task, as far as its search examples tell; None where it can."""
    metric = next((one for one in (task.metric, task.search_metric) if f"{task.name}/{one}" in full.metrics), None)
    if metric is None or KINDS[task.kind].unit(metric) != SHARE:
        return None
    value, examples = full.metrics[f"{task.name}/{metric}"], task.splits["search"]
    where = f"of {task.name}, on {len(examples)} search examples"
    if value == 0:
        return f"the full model scores 0 by {metric} {where}"
    chance, score = chance_level(metric, examples), Score.of_share(min(max(value, 0.0), 1.0), len(examples))
    if chance is None or score.low > chance:
        return None
    return f"the full model is not told from guessing, which scores {chance:.3f}: {metric} {score} {where}"
