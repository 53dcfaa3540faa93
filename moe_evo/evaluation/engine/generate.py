"""Greedy generation for a batch of prompts with stock `generate`, which also tells whether logits were finite.

Where the model allows it, an engine computes the prompts' keys and values before: once for genomes whose first
layers are equal, and once a task for the shared prefix. `generate` then goes on from a cache of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from moe_evo.evaluation.engine.engine import Engine
from moe_evo.evaluation.engine.packing import Packing
from moe_evo.genomes.genome import Genome
from moe_evo.models.forward.key_values import KeyValues, cache_of, padded_on_the_left, stacked_genomes
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import GenerateBatch

NumActive = Callable[[], Tensor | None]
"""How many experts each token of the last forward pass ran, (T,); None without dynamic routing."""


class Generated(NamedTuple):
    """What was generated for B rows.

    new: (B, at most max_new_tokens) tokens, padded after each row's end. is_finite: (B,) whether the logits behind them
    were. active: (B,) how many experts the tokens ran from which the `num_new` (B,) new ones followed, over all
    MoE layers; None without dynamic routing.
    """

    new: Tensor
    is_finite: Tensor
    active: Tensor | None
    num_new: Tensor

    def chunk(self, copies: int) -> list[Generated]:
        """An equal part of the rows for each copy, in turn."""
        columns: list[Sequence[Any]] = [[None] * copies if one is None else one.chunk(copies) for one in self]
        return [Generated(*parts) for parts in zip(*columns, strict=True)]


class _Watch:
    """Ends a row when its new text contains the stop text, or when its logits are not finite; counts active experts.

    It is a stopping criterion (the call) and a logits processor (`look`). Greedy decoding alone would make words of
    logits that are not finite without an error. ends: tokens that end a row besides.
    """

    def __init__(self, tokenizer: Any, batch: GenerateBatch, num_active: NumActive, ends: Tensor) -> None:
        self._tokenizer = tokenizer
        self._stop = batch.stop
        self._prompt_length = batch.input_ids.shape[1]
        self._num_active = num_active
        self._ends = ends
        self.is_finite = torch.ones(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)
        self._goes_on = self.is_finite.clone()
        self.num_new = torch.zeros_like(self.is_finite, dtype=torch.long)
        self.active: Tensor | None = None

    def look(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # a row of which one logit is finite has a greatest one; masked vocabulary at -inf is legitimate
        self.is_finite &= scores.max(dim=-1).values.isfinite()
        self.num_new += self._goes_on
        found = self._num_active()
        if found is not None:
            last = found.reshape(len(scores), -1)[:, -1].to(scores.device) * self._goes_on
            self.active = last if self.active is None else self.active + last
        return scores

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = ~self.is_finite
        if self._stop:
            texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_length :], skip_special_tokens=True)
            ended = ended | torch.tensor([self._stop in text for text in texts], device=input_ids.device)
        self._goes_on &= ~(ended | torch.isin(input_ids[:, -1], self._ends))
        return ended


def generate_together(
    model: MoEModel,
    engine: Engine | None,
    batch: GenerateBatch,
    genomes: Sequence[Genome],
    keep: bool,
    packing: Packing,
) -> list[Generated]:
    """For each genome the result of `generate_greedily`; all genomes have the same top_k.

    keep, packing: see `Engine.run`.
    """
    copies = len(genomes)
    cache_argument: dict[str, Cache] = {}
    if engine is not None and engine.reads_prompts and engine.cache_names is not None and batch.prompt is not None:
        config = model.language_model.config.get_text_config(decoder=True)
        found = engine.read(batch.prompt, genomes, copies=copies, keep=keep, packing=packing)
        cache = _cache(config, batch.repeated(copies), stacked_genomes(found, rows=len(batch.examples)))
        cache_argument = {engine.cache_names.of_model: cache}
        del found  # the cache holds a copy
    with model.applied_together(genomes) as language_model:
        generated = generate_greedily(
            language_model,
            model.tokenizer,
            batch.repeated(copies),
            cache_argument,
            num_active=lambda: model.num_active,
            in_lockstep=model.ranks.size > 1,
        )
    return generated.chunk(copies)


def generate_greedily(
    language_model: Any,
    tokenizer: Any,
    batch: GenerateBatch,
    cache_argument: Mapping[str, Cache] | None = None,
    *,
    num_active: NumActive = lambda: None,
    in_lockstep: bool = False,
) -> Generated:
    """The most probable next token of each row, again and again until its end.

    cache_argument: the keyword argument with a cache of keys and values for all but the last token of each row, with
    space for the new tokens; by default `generate` reads whole rows. in_lockstep: other ranks generate too, and all
    run as many forward passes as the slowest. Logits that are not finite raise nothing, as other ranks would wait.
    Of the model's own generation config only the tokens that end a text have an effect.
    """
    watch = _Watch(tokenizer, batch, num_active, _ends(language_model, batch.input_ids.device))
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=batch.max_new_tokens,
        disable_compile=True,  # every genome would be compiled anew
        eos_token_id=language_model.generation_config.eos_token_id,
        pad_token_id=_padding(tokenizer),
    )
    with _without_own_settings(language_model):
        sequences: Tensor = language_model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
            stopping_criteria=[watch],
            logits_processor=[watch.look],
            synced_gpus=in_lockstep,
            **(cache_argument or {}),
        )
    return Generated(sequences[:, batch.input_ids.shape[1] :], watch.is_finite, watch.active, watch.num_new)


@contextmanager
def _without_own_settings(language_model: Any) -> Iterator[None]:
    """A block in which the model has no generation config of its own.

    `generate` fills whatever a given config leaves open from it: a checkpoint that asks for at least five new tokens,
    or for a watermark, would not answer greedily.
    """
    own = language_model.generation_config
    language_model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        language_model.generation_config = own


def _cache(config: Any, batch: GenerateBatch, read: Sequence[KeyValues]) -> Cache:
    """A cache for `generate`; read: keys and values of each decoder layer, (B, heads, T - 1, size), padded right."""
    pads = batch.attention_mask.shape[1] - batch.attention_mask.sum(dim=1)
    length = read[0][0].shape[2] + 1 + batch.max_new_tokens
    return cache_of(config, (padded_on_the_left(layer, pads) for layer in read), length)


def _ends(language_model: Any, device: torch.device) -> Tensor:
    """The tokens behind which `generate` ends a row."""
    found = language_model.generation_config.eos_token_id
    return torch.tensor([] if found is None else found, dtype=torch.long, device=device).flatten()


def _padding(tokenizer: Any) -> int:
    """The token that fills rows after their end: one that is not decoded, where the tokenizer has such a token."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids):
        if token is not None:
            return int(token)
    return 0
