"""MEO (He et al. 2023, arXiv 2310.09762): each token's experts are merged, and only the merged expert runs.

No stock architecture computes this, so it can be evaluated (for the untouched model and any genome), not exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moe_evo.config.model import ExpertsMode
from moe_evo.errors import ConfigError
from moe_evo.models.families import Family
from moe_evo.models.transformers_border import ExpertsInterface, gated

MEO = "moe_evo_meo"
"""The name of this experts implementation in transformers."""

_CHUNK_ELEMENTS = 1 << 24  # of what enters the gates, 64 MiB


def check_experts(experts: ExpertsMode, family: Family, config: Any) -> None:
    """Raise ConfigError for MEO where gates are not the weights of a mean."""
    scaling = family.scaling(config)
    if experts == "meo" and scaling != 1:
        raise ConfigError(
            f"model.experts: got 'meo', but this {family.model_type} model multiplies its gates by {scaling:g}, and "
            "so each matrix of a merged expert; use 'own'"
        )


def meo_forward(experts: Any, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """The experts implementation 'moe_evo_meo': the one expert sum_j g_j W_j of each token, biases included.

    hidden: (T, H). index, gates: (T, k). Merged weights are never built: (sum_j g_j W_j) x is sum_j g_j (W_j x),
    before the gate and after it. So it costs as many products as the k experts, and one gate.
    """
    width = experts.gate_up_proj.shape[1 if not experts.is_transposed else 2]
    size = max(1, _CHUNK_ELEMENTS // width)
    outputs = []
    for first in range(0, max(len(hidden), 1), size):
        part, *routed = (one[first : first + size] for one in (hidden, index, gates))
        inner = gated(experts, _mixed(experts, "gate_up_proj", part, *routed).to(hidden.dtype))
        outputs.append(_mixed(experts, "down_proj", inner, *routed).to(hidden.dtype))
    return torch.cat(outputs)


def _mixed(experts: Any, name: str, inputs: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """sum_j g_j (W_j x + b_j), (T, out) in at least float32."""
    stacked = getattr(experts, name)
    biases = getattr(experts, f"{name}_bias") if experts.has_bias else None
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    total = torch.zeros(
        (len(inputs), stacked.shape[2 if experts.is_transposed else 1]), dtype=dtype, device=inputs.device
    )
    for expert in torch.unique(index).tolist():
        tokens, place = torch.where(index == expert)
        weight = stacked[expert].T if experts.is_transposed else stacked[expert]
        found = linear(inputs[tokens], weight, None if biases is None else biases[expert])
        total.index_add_(0, tokens, found.to(dtype) * gates[tokens, place, None].to(dtype))
    return total


ExpertsInterface.register(MEO, meo_forward)
