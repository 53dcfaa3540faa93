"""Try which experts a layer can do without: how its output would change if only some of them were left.

All experts compute every token once. A trial is then another routing of the same logits, and its error a quadratic
form in the inner products of the experts' outputs. So many trials cost little more than one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_evo.criteria.questions import Trials
from moe_evo.criteria.routed import Observed, counting, observe
from moe_evo.criteria.subsets import all_but_one, check_spares_one, subsets
from moe_evo.criteria.sums import LayerTrials, Observation
from moe_evo.genomes.space import ModelShape
from moe_evo.models.experts.all_outputs import ExpertOutputs, observed_all_outputs, observed_logits
from moe_evo.models.view import MoEModel

_ROUTED = 2**20  # logits of all trials that are routed at once


def observe_trials(evaluator: Observed, question: Trials) -> Observation[LayerTrials]:
    """The error of each trial; all ranks of a gang call this together and get the same. Raises OutOfMemory."""
    return observe(evaluator, question, partial(_Trials, question))


class _Trials:
    """kept: (N, E) a layer, the trials. errors: (N,) a layer."""

    def __init__(self, question: Trials, moe: MoEModel) -> None:
        self._choices = [torch.from_numpy(one) for one in _choices(question, moe.shape)]
        self._routers = moe.layers
        self._usual_top_k = moe.shape.top_k
        self._top_k = question.top_k or moe.shape.top_k
        self._errors = [torch.zeros(len(one), dtype=torch.float64, device=moe.device) for one in self._choices]
        self._num_tokens = [0] * moe.shape.num_layers
        self._logits: dict[int, Tensor] = {}
        self.times = torch.zeros(0)

    @contextmanager
    def watching(self, moe: MoEModel, only: int | None) -> Iterator[None]:
        with observed_logits(moe, self._logits.__setitem__, only), observed_all_outputs(moe, self._see, only):
            yield

    def layers(self) -> list[LayerTrials]:
        found = zip(self._num_tokens, self._errors, strict=True)
        return [LayerTrials(np.array(number), errors.cpu().numpy()) for number, errors in found]

    def _see(self, layer: int, hidden: Tensor, all_outputs: ExpertOutputs) -> None:
        """hidden: (T, H)."""
        counted, times = counting(self.times, hidden)
        logits = self._logits[layer][counted]
        self._num_tokens[layer] += int(times.sum())
        first = 0
        for outputs in all_outputs(hidden[counted]):  # (n, E, H)
            wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
            products = (wide @ wide.mT).to(self._errors[layer])
            some = slice(first, first := first + len(outputs))
            errors = self._errors_of(layer, logits[some], products)
            self._errors[layer] += errors @ times[some].to(errors)

    def _errors_of(self, layer: int, logits: Tensor, products: Tensor) -> Tensor:
        """||y - y^S||^2 of each trial and token, (N, n); logits: (n, E); products: (n, E, E) of all outputs."""
        num_tokens, num_experts = logits.shape
        everyone = torch.ones_like(logits, dtype=torch.bool)
        usual = self._gates(layer, logits, everyone, self._usual_top_k[layer])
        found = []
        choices = self._choices[layer].to(logits.device)
        for kept in choices.tensor_split(math.ceil(choices.numel() * num_tokens / _ROUTED)):
            masks = kept[:, None].expand(-1, num_tokens, -1).reshape(-1, num_experts)
            gates = self._gates(layer, logits.repeat(len(kept), 1), masks, self._top_k[layer])
            change = (gates.view(-1, num_tokens, num_experts) - usual).transpose(0, 1).to(products)
            squares = ((change @ products) * change).sum(dim=-1)  # (n, N)
            found.append(squares.T.clamp(min=0))
        return torch.cat(found)

    def _gates(self, layer: int, logits: Tensor, kept: Tensor, top_k: int) -> Tensor:
        """The gate of every expert, (T, E), where only `kept` (T, E) may be chosen; 0 for those that are not."""
        gates, index = self._routers[layer].route_among(logits, kept, top_k)
        return torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter_(1, index, gates.double())


def _choices(question: Trials, shape: ModelShape) -> list[npt.NDArray[np.bool_]]:
    """The trials of each layer, (N, E)."""
    if question.num_kept is None:
        check_spares_one(shape)
        return [all_but_one(number) for number in shape.num_experts]
    return [
        subsets(number, num_kept, shape.num_expert_groups, question.limit, question.seed)
        for number, num_kept in zip(shape.num_experts, question.num_kept, strict=True)
    ]
