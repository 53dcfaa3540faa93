"""The gate, up and down matrices of stacked experts and their inputs, in whichever layout a family stores them.

The layout and the gate's function are those that transformers' own experts modules declare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moe_evo.models.experts.outputs import Experts, experts_computed_by
from moe_evo.models.layer import MoELayer
from moe_evo.models.transformers_border import gated
from moe_evo.models.view import MoEModel

See = Callable[[int, int, Tensor, Tensor, Tensor, Tensor], None]


def expert_matrices(experts: nn.Module, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views 'gate' and 'up' (E, I, H) and 'down' (E, H, I) of `stacked`: writing to them writes to it.

    experts: the module in whose layout `stacked` holds gate_up_proj and down_proj.
    """
    layout: Any = experts
    gate_up, down = stacked["gate_up_proj"], stacked["down_proj"]
    if layout.is_transposed:
        gate_up, down = gate_up.mT, down.mT
    # two matrices of which each has its own rows and its own singular vectors
    gate, up = gate_up.chunk(2, dim=1) if layout.is_concatenated else (gate_up[:, 0::2], gate_up[:, 1::2])
    return {"gate": gate, "up": up, "down": down}


@contextmanager
def observed_inputs(moe: MoEModel, see: See) -> Iterator[None]:
    """Call `see(layer, expert, tokens, gates, hidden, inner)` for each expert that an MoE layer uses.

    tokens, gates: (n,) the numbers of the tokens routed to it and the weights that the model gives its
    outputs. hidden: (n, H), what enters gate and up. inner: (n, I), what enters down.
    """

    def forward(layer: MoELayer, experts: Experts, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        for expert in torch.bincount(index.reshape(-1)).nonzero().flatten().tolist():
            tokens, place = torch.where(index == expert)
            entering = hidden[tokens]
            inner = intermediate(layer.experts, expert, entering)
            see(layer.number, expert, tokens, gates[tokens, place], entering, inner)
        return experts(hidden, index, gates)

    with experts_computed_by(moe, forward):
        yield


def intermediate(experts: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """(n, I) what enters the down matrix of one expert for hidden (n, H), by the library's own gate."""
    module: Any = experts
    weight = module.gate_up_proj[expert]
    bias = module.gate_up_proj_bias[expert] if module.has_bias else None
    inner: Tensor = gated(module, linear(hidden, weight.T if module.is_transposed else weight, bias))
    return inner
