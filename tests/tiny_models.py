"""Tiny random models of every supported family and of what configs of a family differ in; oracles for them."""

from __future__ import annotations

from typing import Any

from moe_evo.models.tiny import CONFIGS, tiny_model
from moe_evo.testing.stock_models import (
    EXPERT_FIELDS,
    combined,
    largest_difference,
    logits,
    mixed,
    random_kept,
    random_merge,
    random_pruning,
    stock_model,
    tokens,
)

__all__ = [
    "CONFIGS",
    "EXPERT_FIELDS",
    "VARIANTS",
    "combined",
    "largest_difference",
    "logits",
    "mixed",
    "random_kept",
    "random_merge",
    "random_pruning",
    "stock_model",
    "tiny_model",
    "tokens",
    "variant",
]

VARIANTS: dict[str, dict[str, Any]] = {
    **{model_type: {} for model_type in sorted(CONFIGS)},
    "mixtral, sliding": {"sliding_window": 6},
    "qwen2_moe, sliding": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 9},
    "gpt_oss, one window": {"sliding_window": 6},
    "qwen3_moe, dense end": {"mlp_only_layers": [2]},
}
"""Every family, and what configs of a family differ in beside experts."""


def variant(name: str) -> Any:
    """One of `VARIANTS`."""
    return tiny_model(name.split(",")[0], **VARIANTS[name])
