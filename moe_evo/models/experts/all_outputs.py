"""Observe router logits, and the outputs of all experts for all tokens, while the model runs unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_evo.models.experts.outputs import Experts, experts_computed_by, single_outputs
from moe_evo.models.layer import MoELayer
from moe_evo.models.view import MoEModel

_CHUNK_ELEMENTS = 1 << 23  # outputs of 32 MiB in float32, and some copies of them

ExpertOutputs = Callable[[Tensor], Iterator[Tensor]]
"""Called with hidden states (n, H); yields the outputs of all E experts for a few tokens at a time, (m, E, H)."""


@contextmanager
def observed_logits(moe: MoEModel, see: Callable[[int, Tensor], None], only: int | None = None) -> Iterator[None]:
    """Call `see(layer, logits)` with the router's logits (T, E) whenever an MoE layer has run.

    only: the number of the one MoE layer that is observed; None is all.
    """

    def hook(layer: int, _router: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        see(layer, output[0])

    handles = [
        layer.router.register_forward_hook(partial(hook, layer.number))
        for layer in moe.layers
        if only in (None, layer.number)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observed_all_outputs(
    moe: MoEModel, see: Callable[[int, Tensor, ExpertOutputs], None], only: int | None = None
) -> Iterator[None]:
    """Call `see(layer, hidden, all_outputs)` whenever an MoE layer runs; hidden: (T, H), what enters its experts.

    only: as for `observed_logits`. Ranks of a tensor parallel model must ask for the same outputs.
    """
    # a rank of a tensor parallel model computes its part of the sum
    is_partial = moe.ranks.size > 1 and not moe.splits_examples

    def forward(layer: MoELayer, experts: Experts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        if only in (None, layer.number):
            # not layer.num_experts: ZeRO-3 would gather the router, whose weights tell it, for the experts from now on
            see(layer.number, hidden, partial(outputs_of, moe.shape.num_experts[layer.number], experts, gates.dtype))
        return experts(hidden, index, gates)

    def outputs_of(num_experts: int, experts: Experts, dtype: torch.dtype, hidden: Tensor) -> Iterator[Tensor]:
        size = max(1, _CHUNK_ELEMENTS // (num_experts * hidden.shape[1]))
        for first in range(0, len(hidden), size):
            part = hidden[first : first + size]
            index = torch.arange(num_experts, device=part.device).expand(len(part), num_experts)
            outputs = single_outputs(experts, part, index, torch.ones(index.shape, dtype=dtype, device=part.device))
            if is_partial:
                dist.all_reduce(outputs)
            yield outputs

    with experts_computed_by(moe, forward):
        yield
