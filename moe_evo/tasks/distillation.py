"""Likeness to the full model, without labels: minus the KL divergence of the next-token distributions.

The score of an example is -KL(full model || candidate) in nats, averaged over its positions, in
float32. The full model's log-probabilities are kept on the CPU: positions x vocabulary x 4 bytes (300
texts of 50 tokens and a vocabulary of 32,000 are 1.9 GB), so use num_search and max_length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_evo.errors import TaskError
from moe_evo.tasks.base import Batch, ForwardBatch, Scores, scored_log_probs
from moe_evo.tasks.batches import forward_batches
from moe_evo.tasks.examples import Example
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import Row


@dataclass(frozen=True)
class DistillationScorer:
    """A `Scorer` whose partial results are (B, 1): the mean of -KL over each row's positions.

    Every position of a text or prompt counts, the last one too: it speaks about the answer.
    """

    format: PromptFormat
    needs_reference = True
    batches = staticmethod(forward_batches)

    def rows(self, number: int, example: Example) -> list[Row]:
        tokens = self.format.text_tokens(example) if example.text else self.format.prompt_tokens(example)
        if not tokens:
            raise TaskError(f"{example.where}: got no tokens, expected at least 1")
        return [Row(number, tokens, 0)]

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None) -> Tensor:
        assert isinstance(batch, ForwardBatch) and reference is not None
        full = reference.to(output.device)
        divergence = torch.zeros(batch.scored.shape, device=output.device)
        # a token that the full model rules out (log 0) adds nothing: 0 * (-inf) would be NaN
        ratio = torch.where(full == -torch.inf, 0.0, full - scored_log_probs(batch, output))
        divergence[batch.scored] = (full.exp() * ratio).sum(dim=-1)
        return -(divergence.sum(dim=1, keepdim=True) / batch.scored.sum(dim=1, keepdim=True))

    def combine(self, examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> dict[str, Scores]:
        return {"negative_kl": torch.cat([row for (row,) in partials]).double().numpy()}
