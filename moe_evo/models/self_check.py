"""The self-check at load: what moe_evo relies on in a model's layers is tried on random tokens.

A release of transformers may change any of it. Where scores would be wrong, the model is refused. Where only work
would be repeated, that kind of sharing is switched off, with a line that says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_evo.errors import ModelError
from moe_evo.models.agreement import SwitchedOff, disagreement
from moe_evo.models.layer import LayerPlan
from moe_evo.models.transformers_border import (
    LIBRARY_ERRORS,
    attention_implementation,
    is_own_defect,
    one_line,
    transformers,
)
from moe_evo.models.view import MoEModel
from moe_evo.versions import ADVICE

_PREFIX, _BRANCH = 6, 15  # tokens of the token tree that is tried; enough of a branch for a median


@torch.inference_mode()
def self_check(model: MoEModel) -> None:
    """Raise ModelError where the hooks do not compute the untouched model; switch token trees off where they fail.

    All ranks of a model call this together and get the same result.
    """
    _check_hooks(model)
    reason = _why_no_trees(model)
    if reason:
        model.reads_trees = False
        model.switched_off = (*model.switched_off, SwitchedOff("token trees", reason))


def _check_hooks(model: MoEModel) -> None:
    """Compare the logits with both hooks, which compute the untouched layers, with those without hooks."""
    tokens = model.random_tokens()
    plans = [
        [LayerPlan.reversed_identity(num_experts, top_k)]
        for num_experts, top_k in zip(model.shape.num_experts, model.shape.top_k, strict=True)
    ]
    where = f"self-check of {model.family.model_type} with transformers {transformers.__version__}"
    budget_bytes, model.merged_cache.budget_bytes = model.merged_cache.budget_bytes, 0  # one layer at a time
    expected = _logits(model, tokens)
    if not all(model.ranks.gather(bool(expected.isfinite().all()))):
        raise ModelError(f"{where}: its own logits are not finite; weights or config.json are damaged")
    try:
        with model.installed(plans):
            got = _logits(model, tokens)
    except LIBRARY_ERRORS as error:
        raise ModelError(
            f"{where}: {type(error).__name__}: {one_line(error)}; the library's MoE layers have changed: {ADVICE}"
        ) from error
    finally:
        model.merged_cache.budget_bytes = budget_bytes
    found = [reason for reason in model.ranks.gather(disagreement(got, expected, model.dtype)) if reason]
    if found:
        raise ModelError(f"{where}: the view computes something else than the untouched model ({found[0]}); {ADVICE}")


def _why_no_trees(model: MoEModel) -> str:
    """Why two rows that share a prefix have other logits in one token tree than alone; '' where they do not."""
    if not model.reads_trees:
        name = attention_implementation(model.language_model.config)
        return f"attention {name!r} takes no masks of our own"
    rows = model.random_tokens(length=_PREFIX + _BRANCH)
    rows[1, :_PREFIX] = rows[0, :_PREFIX]
    tree = torch.cat([rows[0], rows[1, _PREFIX:]])[None]
    nodes = torch.arange(tree.shape[1], device=tree.device)[None]
    first_end = _PREFIX + _BRANCH
    positions = torch.where(nodes < first_end, nodes, nodes - _BRANCH)
    ends = torch.where((nodes >= _PREFIX) & (nodes < first_end), first_end, tree.shape[1])
    try:
        masks = model.attention_masks(positions, ends, torch.ones_like(tree))
        of_tree = _logits(model, tree, attention_mask=masks, position_ids=positions)[0]
        alone = _logits(model, rows)[:, _PREFIX:]
        branches = torch.stack([of_tree[_PREFIX:first_end], of_tree[first_end:]])
        # each branch by itself: under a plain causal mask only the second one is wrong
        reasons = (disagreement(*pair, model.dtype) for pair in zip(branches, alone, strict=True))
        reason = next(filter(None, reasons), "")
    except LIBRARY_ERRORS as error:
        if is_own_defect(error):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
    return next(filter(None, model.ranks.gather(reason)), "")


def _logits(model: MoEModel, tokens: Tensor, **arguments: object) -> Tensor:
    logits: Tensor = model.language_model(input_ids=tokens, use_cache=False, **arguments).logits
    return logits
