"""How similar experts are on the prompts of a task, in their router logits and in their outputs.

Every token counts for every expert, wherever it is routed. Padding never counts. Sums add across batches, ranks and
tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from moe_evo.criteria.questions import AllOutputs, OfPrompts, RouterLogits
from moe_evo.criteria.routed import Observed, counting, observe
from moe_evo.criteria.sums import LayerAllOutputs, LayerLogits, Observation, Sums
from moe_evo.models.experts.all_outputs import ExpertOutputs, observed_all_outputs, observed_logits
from moe_evo.models.view import MoEModel


def observe_logits(evaluator: Observed, question: RouterLogits) -> Observation[LayerLogits]:
    """Products of the router's logits; all ranks of a gang call this together and get the same. Raises OutOfMemory."""
    _require_untouched(question)
    return observe(evaluator, question, _Logits)


def observe_all_outputs(evaluator: Observed, question: AllOutputs) -> Observation[LayerAllOutputs]:
    """Sums and cosines of all experts' outputs; called as `observe_logits`."""
    _require_untouched(question)
    return observe(evaluator, question, _AllOutputs)


def _require_untouched(question: OfPrompts) -> None:
    genome = question.genome
    if genome is not None:
        observed = genome.layers if question.layer is None else [genome.layers[question.layer]]
        assert all(layer.is_identity for layer in observed), "a layer that is observed is changed"


class _Logits:
    """Sums () and (E, E) a layer."""

    def __init__(self, moe: MoEModel) -> None:
        self._sums = [[np.zeros(()), np.zeros((number, number))] for number in moe.shape.num_experts]
        self.times = torch.zeros(0)

    def watching(self, moe: MoEModel, only: int | None) -> AbstractContextManager[object]:
        return observed_logits(moe, self._see, only)

    def layers(self) -> list[LayerLogits]:
        return [LayerLogits(*sums) for sums in self._sums]

    def _see(self, layer: int, logits: Tensor) -> None:
        """logits: (T, E)."""
        counted, times = counting(self.times, logits)
        wide = logits[counted].double()
        _add(self._sums[layer], (times.sum(), (wide * times[:, None]).T @ wide))


class _AllOutputs:
    """Sums (), (E, H) and (E, E) a layer."""

    def __init__(self, moe: MoEModel) -> None:
        width = moe.language_model.config.hidden_size
        self._sums = [
            [np.zeros(()), np.zeros((number, width)), np.zeros((number, number))] for number in moe.shape.num_experts
        ]
        self.times = torch.zeros(0)

    def watching(self, moe: MoEModel, only: int | None) -> AbstractContextManager[object]:
        return observed_all_outputs(moe, self._see, only)

    def layers(self) -> list[LayerAllOutputs]:
        return [LayerAllOutputs(*sums) for sums in self._sums]

    def _see(self, layer: int, hidden: Tensor, all_outputs: ExpertOutputs) -> None:
        """hidden: (T, H)."""
        counted, times = counting(self.times, hidden)
        for outputs in all_outputs(hidden[counted]):
            weights, times = times[: len(outputs), None, None], times[len(outputs) :]
            wide = outputs.double()
            lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            units = torch.where(lengths > 0, wide / lengths, 0.0)
            flat, weighed = (one.transpose(0, 1).flatten(1) for one in (units, units * weights))
            _add(self._sums[layer], (weights.sum(), (wide * weights).sum(dim=0), weighed @ flat.T))


def _add(sums: Iterable[Sums], values: Iterable[Tensor]) -> None:
    for one, value in zip(sums, values, strict=True):
        one += value.cpu().numpy()
