"""Multiple choice by log-likelihood: the choice that the model finds most probable is its answer.

accuracy: the highest summed log-likelihood is the right one. accuracy_norm: the same after division
by the choice's length in characters without outer spaces (as lm-evaluation-harness' acc_norm).
log_likelihood: that of the right choice, in nats. probability: the softmax of the choices' log-likelihoods at the
right one, from 0 to 1; it changes smoothly where accuracy jumps. probability_norm: the same after that division.
Ties go to the first choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moe_evo.tasks.answered import Given
from moe_evo.tasks.base import IGNORED, Batch, ForwardBatch, Scores, target_log_probs
from moe_evo.tasks.batches import forward_batches
from moe_evo.tasks.examples import Example
from moe_evo.tasks.prompt import PromptFormat, Tokens
from moe_evo.tasks.rows import Row
from moe_evo.tasks.weighted_metric import parts_of


def choice_rows(number: int, context: Tokens, choices: Sequence[Tokens]) -> list[Row]:
    """The fewest rows that hold every choice after the context.

    The last token of a choice is only predicted, never read, and a causal model's earlier logits do
    not see what follows; so a choice rides on any row whose tokens begin with all it reads. Choices
    of one token each share the bare prompt.
    """
    order = sorted(range(len(choices)), key=lambda index: -len(choices[index]))  # longest first
    riders: dict[Tokens, list[int]] = {}
    for index in order:
        read = choices[index][:-1]
        carrier = next((row for row in riders if row[: len(read)] == read), read)
        riders.setdefault(carrier, []).append(index)
    return [
        Row(
            number,
            context + read,
            start=len(context) - 1,
            answers=tuple((index, choices[index]) for index in sorted(members)),
            num_prompt=len(context),
        )
        for read, members in riders.items()
    ]


@dataclass(frozen=True)
class ChoiceScorer:
    """A `Scorer` whose partial results are (B, C): the log-likelihood of each choice on each row.

    A choice that is not on the row has 0 there, so that an example's rows add up to all its choices.
    """

    format: PromptFormat
    needs_reference = False
    batches = staticmethod(forward_batches)

    def rows(self, number: int, example: Example) -> list[Row]:
        context, choices = self.format.pair_tokens(example, example.choices)
        return choice_rows(number, context, choices)

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None) -> Tensor:
        assert isinstance(batch, ForwardBatch)
        found = target_log_probs(batch, output)
        placed = found.new_zeros(len(found), int(batch.answers.max()) + 1)
        row, slot = np.nonzero(batch.answers != IGNORED)
        placed[row, batch.answers[row, slot]] = found[row, slot]
        return placed

    def combine(self, examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> dict[str, Scores]:
        likelihoods = _likelihoods(examples, partials)
        labels = np.array([example.label for example in examples])
        by_length = likelihoods / _lengths(examples)
        return {
            "accuracy": (likelihoods.argmax(axis=1) == labels).astype(np.float64),
            "accuracy_norm": (by_length.argmax(axis=1) == labels).astype(np.float64),
            "log_likelihood": likelihoods[np.arange(len(examples)), labels],
            "probability": _share_of(labels, likelihoods),
            "probability_norm": _share_of(labels, by_length),
        }

    def answers(self, examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> list[Given]:
        """The choice that counts as each example's answer, and the log-likelihoods of all of them."""
        likelihoods = _likelihoods(examples, partials)
        is_normed = parts_of(self.format.data.metric)[0][1].endswith("_norm")
        chosen = (likelihoods / _lengths(examples) if is_normed else likelihoods).argmax(axis=1)
        return [
            Given(one.choices[choice], tuple(row[: len(one.choices)].tolist()))
            for one, choice, row in zip(examples, chosen, likelihoods, strict=True)
        ]


def _likelihoods(examples: Sequence[Example], partials: Sequence[Sequence[Tensor]]) -> Scores:
    """(N, C) log-likelihoods of the examples' choices; -inf where an example has no such choice."""
    found: Scores = np.full((len(examples), max(len(one.choices) for one in examples)), -np.inf)
    for index, (example, rows) in enumerate(zip(examples, partials, strict=True)):
        found[index, : len(example.choices)] = 0.0
        for row in rows:
            found[index, : len(row)] += row.double().numpy()
    return found


def _lengths(examples: Sequence[Example]) -> Scores:
    """(N, C) characters of the choices without outer spaces; 1 where an example has no such choice."""
    lengths: Scores = np.ones((len(examples), max(len(one.choices) for one in examples)))
    for index, example in enumerate(examples):
        lengths[index, : len(example.choices)] = [len(choice.strip()) for choice in example.choices]
    return lengths


def _share_of(labels: npt.NDArray[np.int64], logarithms: Scores) -> Scores:
    """(N,) softmax of each example's (N, C) logarithms at its label; -inf stands where it has no such choice."""
    weights = np.exp(logarithms - logarithms.max(axis=1, keepdims=True))  # the largest is 1, so none overflows
    share: Scores = weights[np.arange(len(labels)), labels] / weights.sum(axis=1)
    return share
