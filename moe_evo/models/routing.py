"""Routing among K slots: by the family's own router code on mapped rows ('exported'), or by EEP's mapping ('eep').

'exported' copies no routing rule. The family's own forward runs on a router with K rows, so it computes what a stock
checkpoint with K experts computes, with groups and biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

RouterOutput = tuple[Tensor, Tensor, Tensor]
"""Logits (T, E), weights (T, top_k) and indices (T, top_k), as transformers >= 5.21 returns them."""

_CORRECTION = "e_score_correction_bias"
_MIN_SHARE = 0.01  # of the sum of magnitudes; below it, positive and negative weights cancel


class Substitute:
    """A module with some attributes replaced, for one call of its class's forward."""

    def __init__(self, module: nn.Module, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def exported_route(router: nn.Module, hidden: Tensor, rows: Mapping[str, Tensor], top_k: int) -> RouterOutput:
    """The output of a router whose tensors are `rows`, each (K, ...); indices are slots 0..K-1."""
    num_kept = next(iter(rows.values())).shape[0]
    substitute = Substitute(router, num_experts=num_kept, top_k=top_k, **rows)
    output: RouterOutput = type(router).forward(substitute, hidden)
    return output


def masked_route(
    router: nn.Module, names: Iterable[str], logits: Tensor, kept: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Weights and indices (T, top_k) that a router makes of logits (T, E) where only `kept` (T, E) may be chosen.

    names: of the router's tensors with a row an expert. The family's own forward gets the logits as input and the
    identity as weights, which leaves logits as they are. Logits that are not kept get the lowest finite number (-inf
    times the identity's zeros would be NaN), so a softmax gives them 0 and none is chosen.
    """
    num_experts = logits.shape[1]
    rows = {name: logits.new_zeros(num_experts) for name in names}  # a bias is in the logits already
    rows["weight"] = torch.eye(num_experts, dtype=logits.dtype, device=logits.device)
    if _CORRECTION in rows:  # which takes part in the choice only, after the sigmoid
        rows[_CORRECTION] = getattr(router, _CORRECTION).masked_fill(~kept, -torch.inf)
    masked = logits.masked_fill(~kept, torch.finfo(logits.dtype).min)
    substitute = Substitute(router, hidden_dim=num_experts, top_k=top_k, **rows)
    _, weights, index = type(router).forward(substitute, masked)
    return weights, index


def eep_route(
    router: nn.Module, hidden: Tensor, mapping: Tensor, top_k: int, *, renormalise: bool, scaling: float
) -> RouterOutput:
    """Map the probabilities of all E experts, then choose (EEP eq. 5); indices are slots 0..K-1.

    mapping: W_RM (K, E) float32. Untied W_RM can make chosen weights negative; where their sum is not
    safely above zero they are divided by the sum of their magnitudes.
    """
    logits, native_weights, _ = type(router).forward(router, hidden)
    probabilities = torch.softmax(logits.float(), dim=-1) @ mapping.T
    weights, index = torch.topk(probabilities, top_k, dim=-1)
    if renormalise:
        weights = _divide_by_sum(weights)
    return logits, (weights * scaling).to(native_weights.dtype), index


def _divide_by_sum(weights: Tensor) -> Tensor:
    """weights (T, top_k) divided by their sum, or by the sum of magnitudes where they cancel."""
    total = weights.sum(dim=-1, keepdim=True)
    magnitude = weights.abs().sum(dim=-1, keepdim=True)
    safe = torch.where(total > _MIN_SHARE * magnitude, total, magnitude)
    return weights / safe.clamp(min=torch.finfo(weights.dtype).tiny)
