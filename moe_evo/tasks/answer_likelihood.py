"""How probable the model finds the right answer of a generation task, without generating: teacher forcing.

The score of an example is the mean log-likelihood per token of its first answer after the prompt, in nats. It
changes smoothly where a comparison of generated texts jumps, and a forward pass takes less time than generation.
The end of the answer is not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_evo.tasks.base import Batch, ForwardBatch, Scores, target_log_probs
from moe_evo.tasks.batches import forward_batches
from moe_evo.tasks.examples import Example
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import Row


@dataclass(frozen=True)
class AnswerLikelihoodScorer:
    """A `Scorer` whose partial results are (B, 2): summed log-likelihood and number of tokens of the answer."""

    format: PromptFormat
    needs_reference = False
    batches = staticmethod(forward_batches)

    def rows(self, number: int, example: Example) -> list[Row]:
        context, (answer,) = self.format.pair_tokens(example, (self.format.following_answer(example),))
        return [Row(number, context + answer[:-1], len(context) - 1, ((0, answer),), len(context))]

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None) -> Tensor:
        assert isinstance(batch, ForwardBatch)
        return torch.cat([target_log_probs(batch, output), batch.scored.sum(dim=1, keepdim=True)], dim=1)

    def combine(self, examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> dict[str, Scores]:
        sums, tokens = torch.stack([row for (row,) in partials]).double().numpy().T
        return {"log_likelihood": sums / tokens}
