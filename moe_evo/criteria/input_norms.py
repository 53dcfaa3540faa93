"""Norms of the inputs of each expert's matrices on the prompts of the tasks, for MoE-Pruner's metric.

A token counts for the experts that the model routes it to, with the model's own gates. Padding never counts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_evo.criteria.routed import prompts
from moe_evo.errors import ModelError
from moe_evo.models.compress.compression import InputNorms
from moe_evo.models.experts.matrices import expert_matrices, observed_inputs
from moe_evo.models.view import MoEModel

if TYPE_CHECKING:
    from moe_evo.criteria.routed import Observed


def observe_input_norms(evaluator: Observed, split: str = "search") -> tuple[InputNorms, ...]:
    """||X_j g||_2 of every input channel of every expert, one a MoE layer, over the prompts of all tasks.

    For a model in one process. A prompt counts once however many answers it has. Costs about two forward
    passes. Raises OutOfMemory, and ModelError where the model's numbers overflow.
    """
    assert evaluator.model.ranks.size == 1, "input norms are of whole matrices"
    return evaluator.within_memory(partial(_observed, evaluator, split))


class _Collector:
    """Sums of squares a layer, (E, H) and (E, I), and how often each token of the current batch counts."""

    def __init__(self, moe: MoEModel) -> None:
        self.times = torch.zeros(0)
        self.layers = []
        for layer in moe.layers:
            num_experts, hidden, inner = expert_matrices(layer.experts, layer.expert_tensors())["down"].shape
            sizes = ((num_experts,), (num_experts, hidden), (num_experts, inner))
            self.layers.append([torch.zeros(size, dtype=torch.float64, device=moe.device) for size in sizes])

    def see(self, layer: int, expert: int, tokens: Tensor, gates: Tensor, hidden: Tensor, inner: Tensor) -> None:
        """tokens, gates: (n,); hidden: (n, H); inner: (n, I)."""
        times = self.times[tokens]
        counted = times > 0  # select tokens instead of multiplying with 0: padding may hold NaN
        factors = times[counted].double() * gates[counted].double().square()
        num_tokens, of_hidden, of_inner = self.layers[layer]
        num_tokens[expert] += times[counted].sum()
        of_hidden[expert] += factors @ hidden[counted].double().square()
        of_inner[expert] += factors @ inner[counted].double().square()


def _observed(evaluator: Observed, split: str) -> tuple[InputNorms, ...]:
    collector = _Collector(evaluator.model)
    with torch.inference_mode(), observed_inputs(evaluator.model, collector.see):
        for task in evaluator.tasks:
            for batch, collector.times in prompts(evaluator, task.name, split):
                evaluator.forward(batch)
    for layer, (_, hidden, inner) in enumerate(collector.layers):
        if not (hidden.isfinite().all() and inner.isfinite().all()):
            raise ModelError(
                f"MoE layer {layer}: what enters its experts is not finite; load the model in bfloat16 or float32, or "
                "use other prompts"
            )
    return tuple(InputNorms(tokens, hidden.sqrt(), inner.sqrt()) for tokens, hidden, inner in collector.layers)
