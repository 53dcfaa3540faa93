"""Asking an evaluator of this process, as one-shot methods do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny_tasks as tiny
import torch
from tiny_models import tiny_model

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.task import TaskConfig
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.questions import Routed
from moe_evo.criteria.sums import LayerObservation, Observation
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.evaluation.local_pool import LocalPool
from moe_evo.models.load import load_model
from moe_evo.models.ranks import Ranks
from moe_evo.models.source import ModelSource
from moe_evo.tasks.data import read_task
from moe_evo.tasks.registry import build_task

GANG_FAMILIES = ("mixtral", "gpt_oss")


def observer_of(evaluator: Evaluator, **options) -> Observer:
    return Observer(LocalPool(evaluator).ask, {task.name: task.name for task in evaluator.tasks}, "model", **options)


def observed(evaluator: Evaluator) -> Observation[LayerObservation]:
    """What the experts do on all tasks together."""
    return observer_of(evaluator).about(Routed())


def write_gang_files(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Two models, and the tasks 'equal' and 'unequal', of which two ranks get batches of very different length."""
    for family in GANG_FAMILIES:
        tiny_model(family, vocab_size=350).save_pretrained(folder / family)
        tiny.tiny_tokenizer(bos=True).save_pretrained(folder / family)
    tiny.write_splits(folder / "equal", rows)
    prompts = [f"{n} {'good bad maybe yes no ' * 2}" if n % 2 == 0 else "one" for n in range(9)]
    tiny.write_splits(folder / "unequal", [{**rows[0], "prompt": prompt} for prompt in prompts])


def gang_evaluators(ranks: Ranks, folder: str, sharding: Any) -> Iterator[Evaluator]:
    """One for each model of `write_gang_files`."""
    for family in GANG_FAMILIES:
        moe = load_model(ModelSource(ModelConfig(path=f"{folder}/{family}", device="cpu", sharding=sharding)), ranks)
        configs = [TaskConfig(data=f"{folder}/{name}", name=name) for name in ("equal", "unequal")]
        yield Evaluator(moe, [build_task(read_task(one), moe.tokenizer, 64) for one in configs], EvaluationConfig())


@contextmanager
def spoilt_padding(evaluator: Evaluator) -> Iterator[None]:
    """Let what enters the last MoE block hold NaN where a batch holds padding, which is to be somewhere."""
    padding, num_spoilt = torch.tensor(False), 0
    forward = evaluator.forward

    def forward_noting(batch):
        nonlocal padding
        padding = batch.counts == 0
        return forward(batch)

    def spoil(_module, _inputs, output):
        nonlocal num_spoilt
        num_spoilt += int(padding.sum())
        return torch.where(padding.reshape(*output.shape[:-1], 1), torch.nan, output)

    model = evaluator.model
    # of the last block, so that nothing else reads it
    norm = model.language_model.get_decoder().layers[model.shape.decoder_layers[-1]].post_attention_layernorm
    handle = norm.register_forward_hook(spoil)
    evaluator.forward = forward_noting
    try:
        yield
    finally:
        evaluator.forward = forward
        handle.remove()
    assert num_spoilt
