"""Does the view compute on this device what the untouched model computes, and the engine what the view does?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_sections.bench import Bench
from gpu_sections.made_models import batch_of, genomes_in_words, prunings
from gpu_sections.record import Record
from gpu_sections.running import applied_logits, engine_of, engine_run
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.evaluation.engine.sharing import sharing_for
from moe_evo.models.agreement import TOLERANCES, disagreement, relative_difference
from moe_evo.models.layer import LayerPlan
from moe_evo.models.self_check import self_check
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch

_PREFIX_TOKENS = 8


def correctness(bench: Bench, record: Record) -> None:
    """Every model in its own number format, and two layers of one in float32."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("olmoe", {}),
        ("olmoe, float32", {"dtype": torch.float32, "layers": 2}),
        ("qwen3", {}),
        ("deepseek_v3", {}),
    ]
    for label, options in kinds:
        if record.left_s > 0:
            _of_model(bench, record, label, options)
        else:
            record.skip(label, "the section's time is used up")


def _of_model(bench: Bench, record: Record, label: str, options: dict[str, Any]) -> None:
    model = bench.models.get(label.split(",")[0], **options)
    record.attempt(f"{label}: self-check", partial(_self_check, model))
    record.attempt(f"{label}: sharing", partial(_sharing, model))
    for prefix_tokens in (0, _PREFIX_TOKENS):
        what = f"halves, {prefix_tokens} tokens in a shared prefix" if prefix_tokens else "halves"
        record.attempt(f"{label}: {what}", partial(_halves, model, prefix_tokens))
    batch = batch_of(model, 64 if bench.is_small else 512, row=16 if bench.is_small else 64, num_scored=16)
    for number in (1, 4) if bench.is_small else (1, 4, 16):
        record.attempt(f"{label}: {genomes_in_words(number)}", partial(_engine_against_alone, model, batch, number))


@torch.inference_mode()
def _self_check(model: MoEModel) -> dict[str, Any]:
    """`self_check`, which raises where it fails, and the difference that it looks at."""
    tokens = model.random_tokens()
    shape = model.shape
    plans = [LayerPlan.reversed_identity(*sizes) for sizes in zip(shape.num_experts, shape.top_k, strict=True)]
    expected = model.language_model(input_ids=tokens, use_cache=False).logits
    budget_bytes, model.merged_cache.budget_bytes = model.merged_cache.budget_bytes, 0
    try:
        with model.installed([[plan] for plan in plans]):
            got = model.language_model(input_ids=tokens, use_cache=False).logits
    finally:
        model.merged_cache.budget_bytes = budget_bytes
    model.switched_off = ()
    self_check(model)
    return {
        "relative": relative_difference(got, expected),
        **_of_tokens(got, expected),
        "allowed": TOLERANCES[model.dtype],
        "switched_off": list(map(str, model.switched_off)),
    }


def _of_tokens(got: Tensor, expected: Tensor) -> dict[str, float]:
    """Quantiles over tokens of the largest difference of a token's logits, relative to the largest logit of all.

    In 16 bits the check looks at the median: rounding sends a few tokens to other experts.
    """
    differences = (got.float() - expected.float()).abs().amax(dim=-1).flatten() / expected.float().abs().max()
    quantiles = differences.quantile(torch.tensor([0.5, 0.9], device=differences.device)).tolist()
    return {"median": quantiles[0], "90 %": quantiles[1]}


def _sharing(model: MoEModel) -> dict[str, Any]:
    """What an evaluator would get."""
    sharing = sharing_for(model, EvaluationConfig(state_cache_gib=0.0))
    return {
        "shares_layers": sharing.engine is not None,
        "reads_shared_prefixes": sharing.engine is not None and sharing.engine.reads_shared_prefixes,
        "reads_prompts": sharing.engine is not None and sharing.engine.reads_prompts,
        "switched_off": list(map(str, sharing.switched_off)),
    }


@torch.inference_mode()
def _halves(model: MoEModel, prefix_tokens: int) -> dict[str, Any]:
    """The steps by which `sharing_for` tries halves and shared prefixes, with the differences that it bounds.

    relative: halves of layers, masked, against the stock forward without a mask. against_masked: against the stock
    forward with that mask, as the check has it. masked_against_stock: what the mask alone makes of the stock forward.
    """
    tokens = model.random_tokens()
    tokens[:, :prefix_tokens] = tokens[:1, :prefix_tokens].clone()
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    ones = torch.ones_like(tokens)
    masks = model.attention_masks(place, ones * tokens.shape[1], ones)
    options: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    stock = model.language_model(**options).logits[:, prefix_tokens:].flatten(0, 1)
    masked = model.language_model(**options, attention_mask=masks, position_ids=place).logits[:, prefix_tokens:]
    masked = masked.flatten(0, 1)
    found: list[Tensor] = []
    batch = _behind_shared_prefix(tokens, prefix_tokens)
    engine_run(engine_of(model), batch, [model.shape.identity()], 1, lambda _, logits: found.append(logits))
    return {
        "relative": relative_difference(found[0], stock),
        "against_masked": relative_difference(found[0], masked),
        "masked_against_stock": relative_difference(masked, stock),
        **_of_tokens(found[0], masked),
        "allowed": TOLERANCES[model.dtype],
        "differs": disagreement(found[0], masked, model.dtype),
    }


def _behind_shared_prefix(tokens: Tensor, prefix_tokens: int) -> ForwardBatch:
    """All tokens (B, T) scored, the first so many of them in a shared prefix."""
    own = tokens[:, prefix_tokens:]
    node = torch.arange(own.shape[1], device=tokens.device).expand_as(own)
    ones = torch.ones_like(own)
    return ForwardBatch(
        own, node + prefix_tokens, ones * own.shape[1], ones, ones.bool(), ones, ones.bool(), ones[..., None],
        np.zeros(len(own), dtype=np.int64), np.zeros((len(own), 1), dtype=np.int64),
        shared_prefix=tuple(tokens[0, :prefix_tokens].tolist()),
    )  # fmt: skip


def _engine_against_alone(model: MoEModel, batch: ForwardBatch, number: int) -> dict[str, Any]:
    """Prunings together against each of them alone; flips: of the most probable token, among all that are scored.

    likelihood: largest difference of the log-probability of a token that is expected there. alone_half: the same
    genomes alone, with half of the batch's rows, against alone with all of them: what is noise on this device.
    """
    genomes = prunings(model, number)
    together: dict[int, Tensor] = {}
    engine_run(engine_of(model), batch, genomes, number, together.__setitem__)
    half = _first_rows(batch, len(batch.input_ids) // 2)
    rows: list[tuple[float, float, float, float, float]] = []
    for place, genome in enumerate(genomes):
        alone = applied_logits(model, batch, genome)
        fewer = applied_logits(model, half, genome)
        noise = alone[: len(fewer)]
        rows.append(
            (
                relative_difference(together[place], alone), _flips(together[place], alone),
                _likelihood_difference(together[place], alone),
                relative_difference(fewer, noise), _flips(fewer, noise),
            )
        )  # fmt: skip
    relative, flips, likelihood, noise_relative, noise_flips = (list(column) for column in zip(*rows, strict=True))
    return {
        "relative": max(relative),
        "flips": float(np.mean(flips)),
        "likelihood": max(likelihood),
        "alone_half": max(noise_relative),
        "alone_half_flips": float(np.mean(noise_flips)),
    }


def _first_rows(batch: ForwardBatch, number: int) -> ForwardBatch:
    """The first rows of a batch whose rows all score equally many tokens."""
    first = {name: part[:number] for name, part in vars(batch).items() if name != "shared_prefix"}
    return replace(batch, **first)


def _flips(got: Tensor, expected: Tensor) -> float:
    """Share of tokens (M, V) whose most probable next token is another one."""
    return float((got.argmax(-1) != expected.argmax(-1)).double().mean())


def _likelihood_difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference of the log-probability of the same arbitrary token after each (M, V)."""
    token = torch.arange(len(got), device=got.device)[:, None]
    first, second = (one.float().log_softmax(-1).gather(1, token) for one in (got, expected))
    return float((first - second).abs().max())
