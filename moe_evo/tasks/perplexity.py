"""Language modelling: how probable the model finds the examples' texts.

The score of an example is its mean log-likelihood per token, in nats (minus the stock loss of the
model); the first token is not predicted. Metrics: log_likelihood, the mean of the scores, and
perplexity, exp of the mean negative log-likelihood over all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_evo.errors import TaskError
from moe_evo.tasks.base import Batch, ForwardBatch, Scores, target_log_probs
from moe_evo.tasks.batches import forward_batches
from moe_evo.tasks.examples import Example
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import Row


@dataclass(frozen=True)
class PerplexityScorer:
    """A `Scorer` whose partial results are (B, 2): summed log-likelihood and number of tokens."""

    format: PromptFormat
    needs_reference = False
    batches = staticmethod(forward_batches)

    def rows(self, number: int, example: Example) -> list[Row]:
        tokens = self.format.text_tokens(example)
        if len(tokens) < 2:
            raise TaskError(f"{example.where}: text: got {len(tokens)} tokens, expected at least 2")
        return [Row(number, tokens[:-1], 0, ((0, tokens[1:]),))]

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None) -> Tensor:
        assert isinstance(batch, ForwardBatch)
        return torch.cat([target_log_probs(batch, output), batch.scored.sum(dim=1, keepdim=True)], dim=1)

    def combine(self, examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> dict[str, Scores]:
        sums, tokens = torch.stack([row for (row,) in partials]).double().numpy().T
        return {"log_likelihood": sums / tokens, "perplexity": np.exp(-sums.sum() / tokens.sum())}
