"""New tokens a second with stock `generate`, and which experts it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_sections.bench import Bench
from gpu_sections.made_models import prunings
from gpu_sections.record import Record
from gpu_sections.running import counted_experts, experts_of
from gpu_sections.timing import peak_gib, timed
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.evaluation.engine.engine import Engine
from moe_evo.evaluation.engine.generate import generate_greedily, generate_together
from moe_evo.evaluation.engine.packing import ALL
from moe_evo.evaluation.engine.sharing import sharing_for
from moe_evo.models.placement import GROUPED_MM
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import GenerateBatch
from moe_evo.tasks.batches import generate_batches
from moe_evo.tasks.rows import BatchLimits, Row

ROWS = (32, 8, 128)  # what tells most comes first
PROMPT, NEW_TOKENS = 64, 64

Generate = Callable[[GenerateBatch], Tensor]
"""New tokens (B, at most max_new_tokens) of prompts."""


def decode(bench: Bench, record: Record) -> None:
    """Both models, at several numbers of rows."""
    for number, name in enumerate(bench.names):
        record.may_use((number + 1) / len(bench.names))
        _of_model(bench, record, name)


def _of_model(bench: Bench, record: Record, name: str) -> None:
    model = bench.models.get(name)
    engine = _reading_engine(model)
    rows = (2, 3) if bench.is_small else ROWS
    for num_rows in rows:
        batch = prompts(model, num_rows, 16 if bench.is_small else PROMPT, 4 if bench.is_small else NEW_TOKENS)
        ways: dict[str, Generate] = {
            "stock": partial(_with_stock_experts, model),
            "no genome": partial(_generated, model),
            "a pruning": partial(_pruning, model, None),
            "a pruning, prompts read by the engine": partial(_pruning, model, engine),
        }
        for way, generate in ways.items():
            point = f"{name}, {num_rows} rows, {way}"
            if "engine" in way and engine is None:
                record.skip(point, "the engine cannot read prompts for this model")
            else:
                record.attempt(point, partial(_measured, bench, batch, generate))
        if num_rows == rows[0]:
            point = f"{name}, {num_rows} rows, stock, text watched for a stop"
            record.attempt(point, partial(_measured, bench, replace(batch, stop="\n"), ways["stock"]))


def prompts(model: MoEModel, num_rows: int, length: int, new_tokens: int) -> GenerateBatch:
    """Random tokens that have nothing in common; every row is generated to its full length."""
    words = np.random.default_rng(8).integers(3, model.language_model.config.vocab_size, (num_rows, length))
    rows = [Row(number, tuple(tokens.tolist()), length - 1) for number, tokens in enumerate(words)]
    limits = BatchLimits(num_rows * (length + new_tokens), 1, shared_prefix=())
    (batch,) = generate_batches(rows, limits, new_tokens, "")
    return batch.to(model.device)


def _reading_engine(model: MoEModel) -> Engine | None:
    """As an evaluator has it, if that can read prompts."""
    engine = sharing_for(model, EvaluationConfig(state_cache_gib=0.0)).engine
    return engine if engine is not None and engine.reads_prompts else None


def _generated(model: MoEModel, batch: GenerateBatch) -> Tensor:
    return generate_greedily(model.language_model, model.tokenizer, batch).new


def _with_stock_experts(model: MoEModel, batch: GenerateBatch) -> Tensor:
    """With transformers' own choice: batched_mm behind the prompt, unless this is a CPU."""
    with experts_of(model, "grouped_mm"):
        return _generated(model, batch)


def _pruning(model: MoEModel, engine: Engine | None, batch: GenerateBatch) -> Tensor:
    (generated,) = generate_together(model, engine, batch, prunings(model, 1), False, ALL)
    return generated.new


@torch.inference_mode()
def _measured(bench: Bench, batch: GenerateBatch, generate: Generate) -> dict[str, Any]:
    """Once as it comes, with every length new to the libraries, and once again.

    new_tokens: of each row. grouped_mm, batched_mm: calls of each in the second run (the first forward pass reads
    the prompts).
    """
    generate(replace(batch, max_new_tokens=2))  # loads what is loaded late
    first_s, _ = timed(partial(generate, batch), bench.device)
    with counted_experts() as counts, peak_gib(bench.device) as peak:
        seconds, new = timed(partial(generate, batch), bench.device)
    num_rows, new_tokens = new.shape
    return {
        "new_tokens": new_tokens,
        "tokens_per_s": num_rows * new_tokens / seconds,
        "ms_a_token": seconds / new_tokens * 1e3,
        "first_run_ms_a_token": first_s / new_tokens * 1e3,
        **peak,
        "grouped_mm": counts.get("grouped_mm", 0) + counts.get(GROUPED_MM, 0),
        "batched_mm": counts.get("batched_mm", 0),
    }
