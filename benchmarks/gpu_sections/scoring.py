"""Tokens a second through the engine and through stock transformers, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_sections.bench import Bench
from gpu_sections.hardware import matmul_flops
from gpu_sections.made_models import batch_of, genomes_in_words, needed_flops, prunings
from gpu_sections.record import Record
from gpu_sections.running import applied_logits, engine_of, engine_run, experts_of, stock_logits
from gpu_sections.timing import host_syncs, kernels_of, median_s
from moe_evo.evaluation.engine.engine import Engine
from moe_evo.models.free_memory import free_bytes
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch

TOKENS = (8192, 1024, 4096, 256, 32768)  # of a genome; what tells most comes first
GENOMES = (1, 4, 16)
MOST_TOGETHER = 32768  # tokens of all genomes that go through a layer together
MOST_TOKENS = 131072  # of all genomes: more would only repeat what fewer tell
PROFILED = ((8192, 1), (1024, 4), (1024, 16))
_REPEATS = 5


def scoring(bench: Bench, record: Record) -> None:
    """Both models, in turn; the second one has what the first one leaves of the time, and at least half."""
    matmul_flops(bench)
    for number, name in enumerate(bench.names):
        record.may_use((number + 1) / len(bench.names))
        _of_model(bench, record, name)


def _of_model(bench: Bench, record: Record, name: str) -> None:
    model = bench.models.get(name)
    engine = engine_of(model)
    pace = _Pace()
    first, others = ((64,), (128,)) if bench.is_small else (TOKENS[:2], TOKENS[2:])
    for num_tokens in first:
        _throughput(bench, record, name, engine, num_tokens, pace)
    for num_tokens, number in ((64, 1), (32, 4)) if bench.is_small else PROFILED:
        batch = batch_of(model, num_tokens)
        calls = {genomes_in_words(number): _engine_call(engine, batch, number)}
        if number == 1:
            calls["stock"] = partial(stock_logits, model, batch)
        for way, call in calls.items():
            record.attempt(f"{name}, {num_tokens} tokens, {way}: kernels", partial(_kernels, bench, model, call))
    for num_tokens in others:
        _throughput(bench, record, name, engine, num_tokens, pace)


def _throughput(bench: Bench, record: Record, name: str, engine: Engine, num_tokens: int, pace: _Pace) -> None:
    """All ways with so many tokens a genome."""
    model = engine.model
    batch = batch_of(model, num_tokens)
    for way, call in _stock_ways(model, batch).items():
        point = f"{name}, {num_tokens} tokens, {way}"
        if way == "stock batched_mm" and not _fits_batched_mm(model, num_tokens):
            record.skip(point, "the copies of the experts' weights would not fit in memory")
        else:
            record.attempt(point, partial(_measured, bench, model, batch, 1, call, pace), pace.needed_s(num_tokens))
    for number in GENOMES[:2] if bench.is_small else GENOMES:
        point = f"{name}, {num_tokens} tokens, {genomes_in_words(number)}"
        if num_tokens * number > MOST_TOKENS:
            record.skip(point, f"more than {MOST_TOKENS} tokens go through layers in several parts all the same")
        else:
            call = _engine_call(engine, batch, number)
            measure = partial(_measured, bench, model, batch, number, call, pace)
            record.attempt(point, measure, pace.needed_s(num_tokens * number))


class _Pace:
    """Seconds a token of what was measured last, from which those of the next point are guessed."""

    def __init__(self) -> None:
        self.seconds_a_token = 0.0

    def needed_s(self, num_tokens: int) -> float:
        """For one call that warms up and one that is measured."""
        return 2 * self.seconds_a_token * num_tokens


def _stock_ways(model: MoEModel, batch: ForwardBatch) -> dict[str, Callable[[], object]]:
    """What is run for one genome without the engine."""
    (genome,) = prunings(model, 1)

    def batched() -> None:
        with experts_of(model, "batched_mm"):
            stock_logits(model, batch)

    return {
        "stock": partial(stock_logits, model, batch),
        "stock batched_mm": batched,
        "genome applied": partial(applied_logits, model, batch, genome),
    }


def _engine_call(engine: Engine, batch: ForwardBatch, number: int) -> Callable[[], object]:
    """So many prunings, of which as many go together as `MOST_TOGETHER` allows."""
    genomes = prunings(engine.model, number)
    copies = min(number, max(MOST_TOGETHER // batch.num_tokens, 1))
    return partial(engine_run, engine, batch, genomes, copies, lambda _, logits: None)


def _fits_batched_mm(model: MoEModel, num_tokens: int) -> bool:
    """Whether there is room for one copy of the larger expert matrix a token and expert, and as much again."""
    expert = max(tensor[0].nbytes for tensor in model.layers[0].expert_tensors().values())
    free = free_bytes(model.device)
    return free is None or 2 * num_tokens * model.shape.top_k[0] * expert < free


def _measured(
    bench: Bench, model: MoEModel, batch: ForwardBatch, number: int, call: Callable[[], object], pace: _Pace
) -> dict[str, Any]:
    """mfu: operations that are needed, over what the largest multiplication would do in the same time."""
    seconds = median_s(call, bench.device, repeats=_REPEATS)
    num_tokens = number * batch.num_tokens
    pace.seconds_a_token = seconds / num_tokens
    flops = needed_flops(model, batch, prunings(model, number))
    return {
        "ms": seconds * 1e3,
        "tokens_per_s": num_tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / matmul_flops(bench),
    }


def _kernels(bench: Bench, model: MoEModel, call: Callable[[], object]) -> dict[str, Any]:
    """launches_a_layer: kernels and copies over decoder layers. busy: share of the time in which a kernel runs."""
    seconds = median_s(call, bench.device, repeats=3)
    syncs = host_syncs(call) if bench.on_gpu else None
    found = kernels_of(call, bench.device)
    layers = len(model.language_model.get_decoder().layers)
    figures: dict[str, Any] = {
        "launches": found.launches,
        "launches_a_layer": found.launches / layers,
        "ms": seconds * 1e3,
        "kernels_ms": found.seconds * 1e3,
        "busy": found.seconds / seconds,
        "longest": found.first,
        "kernels": found.longest,
    }
    if syncs is not None:
        figures |= {"host_syncs": syncs.total(), "host_sync_places": dict(syncs.most_common(8))}
    return figures
