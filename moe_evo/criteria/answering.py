"""`answer`: computes the observation that a `Question` asks for, in the process that holds the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_evo.criteria.likeness import observe_all_outputs, observe_logits
from moe_evo.criteria.questions import (
    AllOutputs,
    Answers,
    GateRatios,
    Outputs,
    Question,
    Routed,
    RouterLogits,
    Routers,
    Trials,
    Weights,
)
from moe_evo.criteria.routed import Observed, observe_gate_ratios, observe_outputs, observe_routed
from moe_evo.criteria.subset_trials import observe_trials
from moe_evo.criteria.sums import LayerRouters, LayerWeights, Observation
from moe_evo.criteria.weights import expert_weights
from moe_evo.models.router_rows import router_lengths
from moe_evo.models.source import ModelSource
from moe_evo.tasks.answered import Answered


def answer(question: Question, evaluator: Observed) -> Any:
    """The `Observation`, or for `Answers` the examples with their answers.

    All ranks of a gang call this together and get the same. Raises OutOfMemory.
    """
    return _ANSWERS[type(question)](evaluator, question)


def _answered(evaluator: Observed, question: Answers) -> tuple[Answered, ...]:
    return evaluator.answered(question.genome, question.split, question.first)


def _weights(evaluator: Observed, question: Weights) -> Observation[LayerWeights]:
    return expert_weights(evaluator.model)


def _routers(evaluator: Observed, question: Routers) -> Observation[LayerRouters]:
    assert question.tuned is not None and question.base is not None, "asked without the checkpoints to compare"
    tuned, base = (router_lengths(ModelSource(one)) for one in (question.tuned, question.base))
    layers = zip(tuned, base, strict=True)
    return Observation(tuple(LayerRouters(*lengths) for lengths in layers))


_ANSWERS: dict[type[Question], Callable[[Observed, Any], Any]] = {
    Routed: observe_routed,
    Outputs: observe_outputs,
    GateRatios: observe_gate_ratios,
    RouterLogits: observe_logits,
    AllOutputs: observe_all_outputs,
    Trials: observe_trials,
    Routers: _routers,
    Weights: _weights,
    Answers: _answered,
}
