"""Asking an evaluator of this process, as one-shot methods do."""

from __future__ import annotations

from moe_evo.criteria.observer import Observer
from moe_evo.criteria.questions import Routed
from moe_evo.criteria.sums import LayerObservation, Observation
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool


def observer_of(evaluator: Evaluator, **options) -> Observer:
    return Observer(LocalPool(evaluator).ask, {task.name: task.name for task in evaluator.tasks}, "model", **options)


def observed(evaluator: Evaluator) -> Observation[LayerObservation]:
    """What the experts do on all tasks together."""
    return observer_of(evaluator).about(Routed())
