"""Which computations genomes, batches and rows may share on one model; each kind is tried on random tokens first.

A kind that gives other logits is switched off, with the reason. That costs time and changes no score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.evaluation.engine.engine import Engine
from moe_evo.evaluation.engine.states import StateCache
from moe_evo.models.agreement import Part, SwitchedOff, disagreement
from moe_evo.models.forward.key_values import cache_of
from moe_evo.models.free_memory import half_of_free_gib
from moe_evo.models.transformers_border import LIBRARY_ERRORS, is_own_defect, one_line
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch

_NUM_TRIED = 8  # tokens of the beginning with which it is tried whether attention takes one


@dataclass(frozen=True)
class Sharing:
    """What works on one model.

    engine: None where genomes must be run one after the other. switched_off: the kinds of sharing that are not used.
    """

    engine: Engine | None
    switched_off: tuple[SwitchedOff, ...] = ()


def sharing_for(model: MoEModel, config: EvaluationConfig, states: StateCache | None = None) -> Sharing:
    """What the config asks for and the model allows; the same on all ranks.

    states: a cache of states to share with other engines of the model; default: a new one of the config's size.
    """
    if not config.share_layers:
        return Sharing(None)
    if model.splits_examples:  # ranks would run different numbers of layers, and wait for each other
        return Sharing(None, (SwitchedOff("shared layers", "ranks run different examples"),))
    trial = Engine(model, StateCache(0, model.device), reads_shared_prefixes=False)  # tried below; keeps no states
    switched_off: list[SwitchedOff] = []

    def holds(part: Part, why_not: Callable[[], str]) -> bool:
        reason = next(filter(None, model.ranks.gather(_tried(why_not))), "")
        if reason:
            switched_off.append(SwitchedOff(part, reason))
        return not reason

    if not holds("shared layers", lambda: _why_no_stages(trial)):
        return Sharing(None, tuple(switched_off))
    reads_shared_prefixes = holds(
        "shared prefixes", lambda: trial.why_no_shared_prefixes or _why_no_stages(trial, _NUM_TRIED)
    )
    reads_prompts = holds(
        "shared prompts", lambda: _why_no_prompts(trial) if reads_shared_prefixes else "they need shared prefixes"
    )
    if states is None:
        gib = half_of_free_gib(model.device) / 2 if config.state_cache_gib is None else config.state_cache_gib
        device = torch.device("cpu") if config.state_device == "cpu" else model.device
        states = StateCache(min(model.ranks.gather(gib)), device)
    engine = Engine(model, states, reads_shared_prefixes=reads_shared_prefixes, reads_prompts=reads_prompts)
    return Sharing(engine, tuple(switched_off))


def _tried(why_not: Callable[[], str]) -> str:
    """The reason that `why_not` returns, or the error that a library raised; a defect of our own code is raised."""
    try:
        return why_not()
    except LIBRARY_ERRORS as error:
        if is_own_defect(error):
            raise
        return f"{type(error).__name__}: {one_line(error)}"


@torch.inference_mode()
def _why_no_stages(engine: Engine, prefix_tokens: int = 0) -> str:
    """Why running layers in halves gives other logits than the model; '' where it does not.

    prefix_tokens: so many of the random tokens are put into a shared prefix.
    """
    model = engine.model
    tokens = model.random_tokens()
    tokens[:, :prefix_tokens] = tokens[:1, :prefix_tokens].clone()
    found: list[Tensor] = []
    batch = _batch(tokens, prefix_tokens)
    engine.run(batch, [model.shape.identity()], lambda _, scored: found.append(scored.logits), keep=False)
    return disagreement(found[0], _own_logits(model, tokens)[:, prefix_tokens:].flatten(0, 1), model.dtype)


@torch.inference_mode()
def _why_no_prompts(engine: Engine) -> str:
    """Why the model cannot go on from keys and values that the engine computed; '' where it can."""
    model, names = engine.model, engine.cache_names
    assert names is not None, "a model that takes no cache reads no shared prefixes"
    tokens = model.random_tokens()
    (read,) = engine.read(_batch(tokens[:, :-1]), [model.shape.identity()], keep=False)
    config = model.language_model.config.get_text_config(decoder=True)
    logits = model.language_model(
        input_ids=tokens[:, -1:],
        attention_mask=torch.ones_like(tokens),
        position_ids=torch.full_like(tokens[:, -1:], tokens.shape[1] - 1),
        **{names.of_model: cache_of(config, read, tokens.shape[1])},
    ).logits
    return disagreement(logits[:, -1], _own_logits(model, tokens)[:, -1], model.dtype)


def _own_logits(model: MoEModel, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of the untouched model, with masks as in a `ForwardBatch`."""
    nodes, ones = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), torch.ones_like(tokens)
    masks = model.attention_masks(nodes, ones * tokens.shape[1], ones)
    logits: Tensor = model.language_model(input_ids=tokens, attention_mask=masks, use_cache=False).logits
    return logits


def _batch(tokens: Tensor, prefix_tokens: int = 0) -> ForwardBatch:
    """Rows (B, T) that begin with the same `prefix_tokens` tokens; every token behind those is scored."""
    own = tokens[:, prefix_tokens:]
    node, ones = torch.arange(own.shape[1], device=tokens.device).expand_as(own), torch.ones_like(own)
    return ForwardBatch(
        own, node + prefix_tokens, ones * own.shape[1], ones, ones.bool(), ones, ones.bool(), ones[..., None],
        np.zeros(len(own), dtype=np.int64), np.zeros((len(own), 1), dtype=np.int64),
        shared_prefix=tuple(tokens[0, :prefix_tokens].tolist()),
    )  # fmt: skip
