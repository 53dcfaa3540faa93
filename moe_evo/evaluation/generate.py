"""Greedy generation for a batch of prompts with stock `generate`, watched for broken logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from moe_evo.tasks.base import GenerateBatch


class NonFiniteLogits(ArithmeticError):
    """The model's logits hold NaN or infinity while it generates."""


class _Watch:
    """A stopping criterion: a row is done when its new text holds the stop text.

    It also looks at the logits, as greedy decoding makes words of NaN without complaint.
    """

    def __init__(self, tokenizer: Any, batch: GenerateBatch) -> None:
        self._tokenizer = tokenizer
        self._stop = batch.stop
        self._prompt_length = batch.input_ids.shape[1]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self._prompt_length :]
        if not self._stop:
            return torch.zeros(len(new), dtype=torch.bool, device=new.device)
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor([self._stop in text for text in texts], device=new.device)


def _refuse_non_finite(input_ids: Tensor, scores: Tensor) -> Tensor:
    # a row of which one logit is finite has a greatest one; masked vocabulary at -inf is legitimate
    if not scores.max(dim=-1).values.isfinite().all():
        raise NonFiniteLogits("logits are not finite during generation")
    return scores


def generate_greedily(language_model: Any, tokenizer: Any, batch: GenerateBatch) -> Tensor:
    """New tokens (B, at most max_new_tokens), each row padded after its end.

    Raises NonFiniteLogits.
    """
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=batch.max_new_tokens,
        pad_token_id=_padding(tokenizer),
    )
    sequences: Tensor = language_model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        generation_config=config,
        stopping_criteria=[_Watch(tokenizer, batch)],
        logits_processor=[_refuse_non_finite],
    )
    return sequences[:, batch.input_ids.shape[1] :]


def _padding(tokenizer: Any) -> int:
    """A token that ended rows are filled with; decoding skips it where it is a special one."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
