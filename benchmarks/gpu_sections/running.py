"""The ways in which a batch goes through a model: stock, with a genome applied, or by the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_evo.evaluation.engine.engine import Engine
from moe_evo.evaluation.engine.states import StateCache
from moe_evo.genomes.genome import Genome
from moe_evo.models.placement import GROUPED_MM
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch


def engine_of(model: MoEModel) -> Engine:
    """One that keeps no states."""
    return Engine(model, StateCache(0, model.device))


@torch.inference_mode()
def stock_logits(model: MoEModel, batch: ForwardBatch) -> Tensor:
    """(P, 1, V) of the last token of each row, as transformers computes them without a mask."""
    logits: Tensor = model.language_model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=1).logits
    return logits


@torch.inference_mode()
def masked_logits(model: MoEModel, batch: ForwardBatch) -> Tensor:
    """(M, V) of whatever function the model computes at the moment, as the evaluator asks for them."""
    logits: Tensor = model.language_model(
        input_ids=batch.input_ids,
        attention_mask=model.attention_masks(batch.position_ids, batch.ends, batch.counts),
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.kept,
    ).logits
    return logits


def applied_logits(model: MoEModel, batch: ForwardBatch, genome: Genome) -> Tensor:
    """(M, V) of a genome that goes through the model alone."""
    with model.applied(genome):
        return masked_logits(model, batch)


@torch.inference_mode()
def engine_run(
    engine: Engine, batch: ForwardBatch, genomes: Sequence[Genome], copies: int, emit: Callable[[int, Tensor], None]
) -> None:
    """All genomes through the engine, `copies` of them at a time, with nothing kept."""
    engine.run(batch, genomes, lambda number, scored: emit(number, scored.logits), copies=copies, keep=False)


@contextmanager
def experts_of(model: MoEModel, implementation: str) -> Iterator[None]:
    """Let the experts be computed so until the block is left."""
    previous = model.language_model.get_experts_implementation()
    model.language_model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.language_model.set_experts_implementation(previous)


@contextmanager
def counted_experts() -> Iterator[dict[str, int]]:
    """How often each implementation of experts is called in the block, by its name."""
    counts: dict[str, int] = {}
    functions = {
        name: ALL_EXPERTS_FUNCTIONS[name]
        for name in ("grouped_mm", "batched_mm", GROUPED_MM)
        if name in ALL_EXPERTS_FUNCTIONS
    }

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*arguments)

        return count

    for name, function in functions.items():
        ALL_EXPERTS_FUNCTIONS[name] = counting(name, function)  # for the process, until it is deleted again
    try:
        yield counts
    finally:
        for name in functions:
            ALL_EXPERTS_FUNCTIONS.pop(name)
