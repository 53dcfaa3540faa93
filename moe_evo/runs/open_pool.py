"""Makes the pool that evaluates genomes: one model in this process, or gangs (groups of ranks) on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.run import ScoringConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import gaussian_mutation, random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.runs.checks import check_model
from moe_evo.tasks.data import TaskData
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.evaluation.pool import Pool
    from moe_evo.models.source import ModelSource
    from moe_evo.models.view import MoEModel
    from moe_evo.tasks.task import Task


@contextmanager
def open_pool(
    config: ScoringConfig,
    source: ModelSource,
    data: Sequence[TaskData],
    tracker: Tracker,
    space: SearchSpace | None = None,
    model: MoEModel | None = None,
    tasks: Sequence[Task] | None = None,
) -> Iterator[Pool]:
    """The pool that a config asks for: in this process, or of gangs on a cluster.

    source: of `config.model`. space: the search space; with it, the tracker can warn that its genomes will be slow.
    model: for evaluation in this process, where it is loaded already. tasks: the tokenised tasks of `data`, where
    they are made already.
    """
    if config.cluster.address is None:
        from moe_evo.evaluation.local_pool import LocalPool

        if model is None:
            evaluator = load_evaluator(source, data, config.evaluation, tracker, tasks)
        else:
            built = _built(data, model.tokenizer, config.evaluation) if tasks is None else tasks
            evaluator = _evaluator(model, built, config.evaluation, tracker)
        if space is not None and not evaluator.model.merged_fits(_fully_merged(space)):
            tracker.message(
                "the merged layers of one genome do not fit in memory: what does not is merged anew in every forward "
                "pass; keep fewer experts, set model.merged_cache_gib, or only prune"
            )
        yield LocalPool(evaluator)
    else:
        from moe_evo.gangs.ray_pool import ray_pool

        check_model(config, source)
        built = _built(data, source.tokenizer, config.evaluation) if tasks is None else tasks  # invalid ones fail here
        tracker.message(f"connecting to Ray ({config.cluster.address})")
        tokens = {task.name: task.digest for task in built}
        with ray_pool(config, data, source.shape, source.hash, tokens=tokens) as pool:
            yield pool


def _fully_merged(space: SearchSpace) -> Genome:
    """A genome of the space that merges in every layer, so that none needs more memory."""
    rng = np.random.default_rng(0)
    return gaussian_mutation(random_pruning(space, rng), space, rng, layer_rate=1.0, entry_rate=1.0, sigma=0.1)


def load_evaluator(
    source: ModelSource,
    data: Sequence[TaskData],
    evaluation: EvaluationConfig,
    tracker: Tracker,
    tasks: Sequence[Task] | None = None,
) -> Evaluator:
    """The model and the tasks, ready to score genomes; every example is tokenised before weights are read."""
    from moe_evo.models.load import load_model

    if tasks is None:
        tasks = _built(data, source.tokenizer, evaluation)
    tracker.message(f"loading {source.config.path}")
    return _evaluator(load_model(source), tasks, evaluation, tracker)


def check_examples(config: ScoringConfig, source: ModelSource, data: Sequence[TaskData]) -> None:
    """Tokenise every example, without weights; raises TaskError or ModelError."""
    _built(data, source.tokenizer, config.evaluation)


def _built(data: Sequence[TaskData], tokenizer: Any, evaluation: EvaluationConfig) -> list[Task]:
    from moe_evo.tasks.registry import build_task

    return [build_task(one, tokenizer, evaluation.batch_tokens) for one in data]


def _evaluator(model: MoEModel, tasks: Sequence[Task], evaluation: EvaluationConfig, tracker: Tracker) -> Evaluator:
    from moe_evo.evaluation.evaluator import Evaluator

    evaluator = Evaluator(model, tasks, evaluation)
    for note in evaluator.notes:
        tracker.message(note)
    return evaluator
