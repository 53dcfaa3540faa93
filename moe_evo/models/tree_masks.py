"""Attention over token trees: a node sees its ancestors and itself, whatever else stands in its row.

Rows that begin alike share those tokens. The masks are the four-dimensional ones that transformers
takes as they are; a model whose attention knows no such masks gets trees that are plain rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_evo.models.transformers_border import attention_implementation

_MASKED_ATTENTION = ("sdpa", "eager")


def takes_any_mask(config: Any) -> bool:
    """Whether the attention of a model with this config takes any mask."""
    return attention_implementation(config) in _MASKED_ATTENTION


def attention_masks(
    config: Any, position_ids: Tensor, ends: Tensor, counts: Tensor, dtype: torch.dtype, *, prefix_tokens: int = 0
) -> Any:
    """The model's `attention_mask` argument for P trees of T nodes; position_ids, ends, counts: (P, T).

    Additive (P, 1, T, prefix_tokens + T) masks, or a dict of them where the layers of a model differ. prefix_tokens:
    how many tokens stand before every root. A sliding window counts along the path from the root.
    """
    node = torch.arange(ends.shape[1], device=ends.device)
    seen = (node[None, :] <= node[:, None]) & (node[:, None] < ends[:, None, :])  # (P, observer, observed)
    seen = torch.nn.functional.pad(seen, (prefix_tokens, 0), value=True)
    window = getattr(config, "sliding_window", None)
    if not window:
        return _additive(seen, dtype)
    before = torch.arange(prefix_tokens, device=ends.device).expand(len(ends), prefix_tokens)
    observed = torch.cat([before, position_ids], dim=1)
    near = seen & (position_ids[:, :, None] - observed[:, None, :] < window)
    if getattr(config, "layer_types", None) is None:
        return _additive(near, dtype)
    return {"full_attention": _additive(seen, dtype), "sliding_attention": _additive(near, dtype)}


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
