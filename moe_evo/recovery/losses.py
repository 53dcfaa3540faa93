"""How far a smaller model's next-token distributions are from those of the full one, and from right answers."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_evo.recovery.lessons import UNLABELLED


def divergences(logits: Tensor, ids: Tensor, log_probs: Tensor, rest: Tensor) -> Tensor:
    """(M,) KL(full || smaller) in nats, over the k stored tokens and all others as one.

    logits: (M, V) float32 of the smaller model. ids, log_probs: (M, k); rest: (M,); see `Lessons`. Where k is V
    this is the whole divergence; otherwise it is at most that (data processing inequality).
    """
    ids, log_probs, rest = ids.long(), log_probs.float(), rest.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    found = (log_probs.exp() * (log_probs - (logits.gather(-1, ids) - total))).sum(dim=-1)
    if ids.shape[1] < logits.shape[1]:
        of_rest = logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1) - total.squeeze(-1)
        found = found + rest.exp() * (rest - of_rest)
    return found


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(M,) of the right next tokens in nats; 0 where none is known. logits: (M, V); labels: (M,)."""
    return torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=UNLABELLED, reduction="none")
