"""Greedy generation for a batch of prompts with stock `generate`, watched for broken logits.

Where an engine can, it reads the prompts: what genomes have in common once, and what all prompts begin
with once a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from moe_evo.evaluation.engine.engine import Engine
from moe_evo.evaluation.engine.packing import Packing
from moe_evo.genomes.genome import Genome
from moe_evo.models.forward.key_values import KeyValues, beside_each_other, cache_of, padded_on_the_left
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import GenerateBatch


class _Watch:
    """A stopping criterion: a row is done when its new text holds the stop text.

    As a logits processor it looks for logits that are not finite, of which greedy decoding makes words
    without complaint; after the first, the row is done.
    """

    def __init__(self, tokenizer: Any, batch: GenerateBatch) -> None:
        self._tokenizer = tokenizer
        self._stop = batch.stop
        self._prompt_length = batch.input_ids.shape[1]
        self.is_finite = torch.ones(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)

    def look(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # a row of which one logit is finite has a greatest one; masked vocabulary at -inf is legitimate
        self.is_finite &= scores.max(dim=-1).values.isfinite()
        return scores

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self._stop:
            return ~self.is_finite
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_length :], skip_special_tokens=True)
        return ~self.is_finite | torch.tensor([self._stop in text for text in texts], device=input_ids.device)


def generate_together(
    model: MoEModel,
    engine: Engine | None,
    batch: GenerateBatch,
    genomes: Sequence[Genome],
    keep: bool,
    packing: Packing,
) -> list[tuple[Tensor, Tensor]]:
    """For each genome what `generate_greedily` finds; all have the same top_k. keep, packing: see `Engine.run`."""
    copies = len(genomes)
    cache_argument: dict[str, Cache] = {}
    if engine is not None and engine.reads_prompts and engine.cache_names is not None and batch.prompt is not None:
        config = model.language_model.config.get_text_config(decoder=True)
        found = engine.read(batch.prompt, genomes, copies=copies, keep=keep, packing=packing)
        cache = _cache(config, batch.repeated(copies), beside_each_other(found, rows=len(batch.examples)))
        cache_argument = {engine.cache_names.of_model: cache}
        del found  # the cache holds a copy
    with model.applied_together(genomes) as language_model:
        new, is_finite = generate_greedily(
            language_model, model.tokenizer, batch.repeated(copies), cache_argument, in_lockstep=model.ranks.size > 1
        )
    return list(zip(new.chunk(copies), is_finite.chunk(copies), strict=True))


def generate_greedily(
    language_model: Any,
    tokenizer: Any,
    batch: GenerateBatch,
    cache_argument: Mapping[str, Cache] | None = None,
    *,
    in_lockstep: bool = False,
) -> tuple[Tensor, Tensor]:
    """New tokens (B, at most max_new_tokens), each row padded after its end, and which rows' logits were finite (B,).

    cache_argument: a cache by the name that the model has for it, which has read all but the last token of the rows
    and has
    room for the others; without it `generate` reads them. in_lockstep: other ranks of the process group generate
    too, and all run as many forward passes as the one that needs most. That is also why logits that are not finite
    raise nothing.
    """
    watch = _Watch(tokenizer, batch)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=batch.max_new_tokens,
        disable_compile=True,  # every genome would be compiled anew
        pad_token_id=_padding(tokenizer),
    )
    sequences: Tensor = language_model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        generation_config=config,
        stopping_criteria=[watch],
        logits_processor=[watch.look],
        synced_gpus=in_lockstep,
        **(cache_argument or {}),
    )
    return sequences[:, batch.input_ids.shape[1] :], watch.is_finite


def _cache(config: Any, batch: GenerateBatch, read: Sequence[KeyValues]) -> Cache:
    """read: what each decoder layer has read of the prompts, (B, heads, T - 1, size) padded on the right."""
    pads = batch.attention_mask.shape[1] - batch.attention_mask.sum(dim=1)
    length = read[0][0].shape[2] + 1 + batch.max_new_tokens
    return cache_of(config, (padded_on_the_left(layer, pads) for layer in read), length)


def _padding(tokenizer: Any) -> int:
    """A token that ended rows are filled with; decoding skips it where it is a special one."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
