"""Observe the outputs and the weights of single experts while the model runs unchanged.

Experts are computed through the experts' hook, within which weights are available even where they are offloaded or
sharded. It calls the implementation that is in force, not a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_evo.models.experts_hook import Compute, Hook, hooks_in_force
from moe_evo.models.layer import MoELayer
from moe_evo.models.view import MoEModel

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The experts of a layer: hidden (T, H), index (T, k) and gates (T, k) to outputs (T, H)."""


@contextmanager
def observed_experts(
    moe: MoEModel, see: Callable[[int, Tensor, Tensor, Tensor], None], only: int | None = None
) -> Iterator[None]:
    """Call `see(layer, index, gates, outputs)` whenever an MoE layer has run, until the block is left.

    only: the number of the one MoE layer that is observed; None is all.

    index, gates: (T, k), the chosen experts and their weights as the model itself uses them. outputs:
    (T, k, H), each one's output before it is multiplied with its gate. Every chosen expert is computed once, and the
    layer's output is the weighted sum of these, so that observing costs one forward (but not under MEO, which
    computes its own output).
    """
    # a rank of a tensor parallel model computes its part of the sum
    is_partial = moe.ranks.size > 1 and not moe.splits_examples

    def forward(layer: MoELayer, experts: Experts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        if only not in (None, layer.number):
            return experts(hidden, index, gates)
        outputs = single_outputs(experts, hidden, index, gates)
        weighed = experts(hidden, index, gates) if moe.computes_meo else _weighed(outputs, gates, hidden.dtype)
        if is_partial:
            dist.all_reduce(outputs)
        see(layer.number, index, gates, outputs)
        return weighed

    with experts_computed_by(moe, forward):
        yield


def _weighed(outputs: Tensor, gates: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, H) the sum of outputs (T, k, H) times gates (T, k)."""
    return (outputs * gates[..., None]).sum(dim=1).to(dtype)


@contextmanager
def residual_streams(moe: MoEModel, only: int | None = None) -> Iterator[dict[int, Tensor]]:
    """By number of MoE layer the residual stream (T, H) to which the layer's output is added next.

    only: as for `observed_experts`. The caller may take streams out, as they are large.
    """
    streams: dict[int, Tensor] = {}

    def keep(number: int, _norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        streams[number] = inputs[0].reshape(-1, inputs[0].shape[-1])

    decoder_layers = moe.language_model.get_decoder().layers
    with ExitStack() as stack:
        for number, position in enumerate(moe.shape.decoder_layers):
            if only in (None, number):
                norm = decoder_layers[position].get_submodule(moe.family.norm)
                stack.callback(norm.register_forward_pre_hook(partial(keep, number)).remove)
        yield streams


def see_expert_weights(moe: MoEModel, see: Callable[[int, Mapping[str, Tensor]], None]) -> None:
    """Call `see(layer, weights)` once for each MoE layer; weights: (E, ...) by name, this rank's slices, no biases.

    All ranks call this together: it runs a few random tokens, because offloaded and ZeRO-3 weights can be
    read in a forward only.
    """

    def forward(layer: MoELayer, experts: Experts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        see(layer.number, {name: one for name, one in layer.expert_tensors().items() if one.ndim == 3})
        return experts(hidden, index, gates)

    with torch.inference_mode(), experts_computed_by(moe, forward):
        moe.language_model(input_ids=moe.random_tokens(), use_cache=False)


def single_outputs(experts: Experts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """f_j(x) of every chosen expert, (T, k, H): each token once for each of its experts, with the weight 1."""
    num_tokens, top_k = index.shape
    each = hidden.repeat_interleave(top_k, dim=0)
    outputs = experts(each, index.reshape(-1, 1), torch.ones_like(gates).reshape(-1, 1))
    return outputs.view(num_tokens, top_k, -1)


@contextmanager
def experts_computed_by(
    moe: MoEModel, forward: Callable[[MoELayer, Experts, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Let `forward` compute the experts of every MoE layer, given what would have; also around or in `applied`."""

    def of_layer(layer: MoELayer, compute: Compute, experts: Any, *routed: Tensor) -> Tensor:
        return forward(layer, partial(compute, experts), *routed)

    with hooks_in_force(moe.language_model, (layer.experts for layer in moe.layers)), ExitStack() as stack:
        for layer in moe.layers:
            stack.callback(Hook(layer.experts, partial(of_layer, layer)).remove)
        yield
