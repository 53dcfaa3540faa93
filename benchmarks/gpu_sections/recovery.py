"""What it takes to ask the full model and to learn from it: tokens a second, memory, and whether the loss falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpu_sections.bench import Bench
from gpu_sections.made_models import ROW, prunings
from gpu_sections.memory import at_most
from gpu_sections.record import Record
from gpu_sections.timing import peak_gib, seconds_of, timed
from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import RecoverConfig
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel
from moe_evo.recovery.blocks import BlockTargets, write_blocks
from moe_evo.recovery.lessons import Lessons, Reading, batches_of, read_lessons, write_lessons
from moe_evo.recovery.masters import Masters
from moe_evo.recovery.material import Material
from moe_evo.recovery.methods import RECOVERY_METHODS
from moe_evo.recovery.parts import trained_parameters
from moe_evo.recovery.state import Learned
from moe_evo.recovery.training import Training

LAYERS = 2  # what an optimizer keeps of more would take minutes to write
PARTS = ("experts", "router", "norms")
LEARNED, VALIDATION = "learned", "validation"
TOP_K = 64
BESIDE_GIB = 0.5  # of memory beside weights and optimizer, where that is limited
_BYTES_A_WEIGHT = 4 + 4 + 8 + 2  # float32 copy, its gradient, two moments, and the gradient in bfloat16


def recovery(bench: Bench, record: Record) -> None:
    """Half of OLMoE's experts learn from all of them; answers are random tokens, as the weights are."""
    (folder := bench.folder / "recovery").mkdir()
    full = bench.models.get("olmoe", layers=LAYERS)
    name = f"olmoe, {LAYERS} layers"
    asked = [
        record.attempt(f"{name}, lessons", partial(_lessons, bench, full, folder)),
        record.attempt(f"{name}, outputs of layers", partial(_blocks, bench, full, folder)),
        record.attempt(f"{name}, a pruned checkpoint", partial(_export, bench, full, folder)),
    ]
    config = RecoverConfig(steps=2 if bench.is_small else 20, checks=1)
    methods = {
        "closed form": partial(_closed_form, bench, folder, config),
        "logits": partial(_logits, bench, folder, config),
        "logits, layers computed twice": partial(_logits, bench, folder, replace(config, gradient_checkpointing=True)),
        "the full model beside it in a plain loop": partial(_plain_loop, bench, full, folder, config),
    }
    limited = f"{name}, logits, {BESIDE_GIB} GiB beside weights and optimizer"
    for method, measure in methods.items():
        if all(asked):
            record.attempt(f"{name}, {method}", measure)
    if not bench.on_gpu:
        record.skip(limited, "only a GPU's memory can be limited")
    elif all(asked):
        record.attempt(limited, partial(_logits, bench, folder, config, BESIDE_GIB))


def _readings(model: MoEModel, number: int) -> list[Reading]:
    rng = np.random.default_rng([8, number])
    words = rng.integers(3, model.language_model.config.vocab_size, (number, ROW))
    return [Reading(tuple(row), ROW - 3) for row in words.tolist()]


def _lessons(bench: Bench, model: MoEModel, folder: Path) -> dict[str, Any]:
    number = 16 if bench.is_small else 512
    readings = {VALIDATION: _readings(model, 8), LEARNED: _readings(model, number)}

    def write(name: str) -> None:
        write_lessons(
            folder, name, readings[name], model.language_model, model.device, top_k=TOP_K, batch_tokens=32_768
        )

    write(VALIDATION)
    return {"tokens_per_s": number * ROW / seconds_of(partial(write, LEARNED), bench.device)}


def _blocks(bench: Bench, model: MoEModel, folder: Path) -> dict[str, Any]:
    lessons, most = read_lessons(folder, LEARNED), 1024 if bench.is_small else 32_768
    write = partial(write_blocks, folder, lessons, model, most_tokens=most, batch_tokens=32_768)
    return {"tokens_per_s": min(most, len(lessons) * ROW) / seconds_of(write, bench.device)}


def _export(bench: Bench, model: MoEModel, folder: Path) -> dict[str, Any]:
    (genome,) = prunings(model, 1)
    write = partial(export_checkpoint, model, genome, folder / "student", provenance={})
    return {"s": seconds_of(write, bench.device)}


def _student(bench: Bench, folder: Path) -> tuple[MoEModel, dict[str, nn.Parameter]]:
    config = ModelConfig(path=str(folder / "student"), self_check=False, device=str(bench.device))
    model = load_model(ModelSource(config))
    return model, trained_parameters(model, PARTS)


def _closed_form(bench: Bench, folder: Path, config: RecoverConfig) -> dict[str, Any]:
    model, _ = _student(bench, folder)
    material = Material(read_lessons(folder, LEARNED), read_lessons(folder, VALIDATION), BlockTargets.load(folder))
    method = RECOVERY_METHODS.get("closed_form")
    recover = partial(method.recover, model, material, config, folder / "closed_form.safetensors", lambda learned: None)
    with peak_gib(bench.device) as peak:
        _, learned = timed(recover, bench.device)
    return {"s_a_layer": learned.duration_s / max(learned.steps, 1), **_losses(learned), **peak}


def _logits(bench: Bench, folder: Path, config: RecoverConfig, most_gib: float | None = None) -> dict[str, Any]:
    """most_gib: memory beside what weights and optimizer take; None is all that there is."""
    model, parameters = _student(bench, folder)
    material = Material(read_lessons(folder, LEARNED), read_lessons(folder, VALIDATION))
    file = folder / f"logits-{config.gradient_checkpointing}-{most_gib}.safetensors"

    def learn() -> Learned:
        return Training(model.language_model, parameters, material, config, 0.0, file).run()

    with peak_gib(bench.device) as peak:
        if most_gib is None:
            learned = learn()
        else:
            weights = sum(one.numel() for one in parameters.values()) * _BYTES_A_WEIGHT
            with at_most(bench.device, weights / 2**30 + most_gib):
                learned = learn()
    file.unlink()
    return {"tokens_per_s": learned.tokens / learned.duration_s, **_losses(learned), **peak}


def _losses(learned: Learned) -> dict[str, float]:
    return {"loss_before": learned.checks[0].validation, "loss_after": learned.checks[-1].validation}


def _plain_loop(bench: Bench, full: MoEModel, folder: Path, config: RecoverConfig) -> dict[str, Any]:
    """The same steps as distillation is mostly written: the full model is asked in every one of them."""
    model, parameters = _student(bench, folder)
    lessons = read_lessons(folder, LEARNED)
    for one in parameters.values():
        one.requires_grad_(True)
    numbers = list(range(min(config.batch_size, len(lessons))))
    rate = config.rate(model.language_model.config.hidden_size)
    with peak_gib(bench.device) as peak:
        masters = Masters(parameters)
        optimizer = torch.optim.AdamW(masters.weights.values(), lr=rate, weight_decay=0.0, fused=True)

        def step() -> None:
            for batch in batches_of([ROW] * len(lessons), numbers, config.batch_tokens, _vocabulary(model)):
                _divergence(full, model, lessons, batch).backward()  # type: ignore[no-untyped-call]
            masters.take_gradients()
            torch.nn.utils.clip_grad_norm_(masters.weights.values(), 1.0)
            optimizer.step()
            masters.put()
            masters.drop_gradients()

        seconds = seconds_of(step, bench.device, inner=config.steps)
    return {"tokens_per_s": len(numbers) * ROW / seconds, **peak}


def _vocabulary(model: MoEModel) -> int:
    return int(model.language_model.config.vocab_size)


def _divergence(full: MoEModel, model: MoEModel, lessons: Lessons, numbers: Sequence[int]) -> Tensor:
    """Over the whole vocabulary."""
    ids = torch.stack(lessons.rows(numbers)).long().to(model.device)
    with torch.no_grad():
        wanted = full.language_model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    got = model.language_model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    divergence: Tensor = (wanted.exp() * (wanted - got)).sum() / ids.numel()
    return divergence
