"""What the one-shot criteria keep of the embedded model, without a search, on all its tasks.

    python experiments/embedded/one_shot.py

Each criterion observes 200 examples of a task's search split, prunes for that task alone, and is scored on the
test split. Nothing is random. Prints the Markdown table of the README.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console

from moe_evo import evaluators
from moe_evo.config import EvaluationConfig, ModelConfig, TaskConfig
from moe_evo.criteria.observation import observe, together
from moe_evo.criteria.pruning import pruning_by
from moe_evo.criteria.registry import CRITERIA, WeightCriterion
from moe_evo.criteria.weights import expert_weights
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genome import Genome
from moe_evo.population import Evaluation
from moe_evo.space import SearchSpace
from moe_evo.tasks.data import check_tasks, embedded_task_names
from moe_evo.tracking.terminal import TerminalTracker

NUM_KEPT = (4, 2)


def prunings(evaluator: Evaluator) -> dict[tuple[str, int], Genome]:
    """By criterion and number of experts kept."""
    observation, weights = together(list(observe(evaluator).values())), expert_weights(evaluator.model)
    spaces = {num_kept: SearchSpace.build(evaluator.model.shape, num_kept=num_kept) for num_kept in NUM_KEPT}
    return {
        (name, num_kept): pruning_by(
            one.scores(weights) if isinstance(one, WeightCriterion) else one.scores(observation), space
        )
        for name, one in CRITERIA.items()
        for num_kept, space in spaces.items()
    }


def main() -> int:
    tasks = sorted(embedded_task_names())
    scores: dict[tuple[str, int], list[float]] = {}
    full: list[float] = []
    tracker = TerminalTracker(Console(stderr=True))
    for task in tasks:
        data = check_tasks([TaskConfig(data=task, num_search=200)])
        evaluator = evaluators.load_evaluator(ModelConfig(self_check=False), data, EvaluationConfig(), tracker)
        found = prunings(evaluator)
        outcomes = evaluator.evaluate([None, *found.values()], "test")
        fitness = [one.fitness for one in outcomes if isinstance(one, Evaluation)]
        assert len(fitness) == len(outcomes), "the embedded model has a score for every pruning"
        full.append(fitness[0])
        for key, one in zip(found, fitness[1:], strict=True):
            scores.setdefault(key, []).append(one)
    print(f"| criterion | kept | mean | {' | '.join(tasks)} |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(tasks)}")
    print(_row("full model", 8, full))
    for (name, num_kept), of_tasks in sorted(scores.items(), key=lambda item: (-item[0][1], -np.mean(item[1]))):
        print(_row(name, num_kept, of_tasks))
    return 0


def _row(name: str, num_kept: int, of_tasks: list[float]) -> str:
    return f"| {name} | {num_kept} | {np.mean(of_tasks):.3f} | {' | '.join(f'{one:.3f}' for one in of_tasks)} |"


if __name__ == "__main__":
    sys.exit(main())
