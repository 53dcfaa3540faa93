"""What it takes to mix experts, and to score a genome that merges all layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from gpu_sections.bench import Bench
from gpu_sections.made_models import batch_of, dense_matrix, dense_merge, prunings
from gpu_sections.record import Record
from gpu_sections.running import engine_of, engine_run
from gpu_sections.timing import kernels_of, median_s, seconds_of
from moe_evo.genomes.genome import Genome, Matrix
from moe_evo.models.layer import MoELayer
from moe_evo.models.view import MoEModel

TOKENS = (1024, 8192)


def merging(bench: Bench, record: Record) -> None:
    """Both models; half of the experts stay, and every one of them mixes all."""
    for number, name in enumerate(bench.names):
        record.may_use((number + 1) / len(bench.names))
        _of_model(bench, record, name)


def _of_model(bench: Bench, record: Record, name: str) -> None:
    model = bench.models.get(name)
    record.attempt(f"{name}, mix one layer", partial(_mix, bench, model, 1))
    record.attempt(f"{name}, mix all layers", partial(_mix, bench, model, len(model.layers)))
    (pruning,) = prunings(model, 1)
    merged = dense_merge(model)
    layers = zip(model.layers, merged.layers, strict=True)
    needed = sum(layer.merged_bytes(gene.expert_merging) for layer, gene in layers)
    previous = model.merged_cache.budget_bytes
    for num_tokens in (64,) if bench.is_small else TOKENS:
        point = f"{name}, {num_tokens} tokens"
        record.attempt(f"{point}, a pruning", partial(_score, bench, model, num_tokens, pruning, 0))
        record.attempt(f"{point}, merged, all layers kept", partial(_score, bench, model, num_tokens, merged, needed))
        record.attempt(f"{point}, merged, half kept", partial(_score, bench, model, num_tokens, merged, needed // 2))
        record.attempt(f"{point}, merged, none kept", partial(_score, bench, model, num_tokens, merged, 0))
    model.merged_cache.budget_bytes = previous
    model.merged_cache.clear()


def _mix(bench: Bench, model: MoEModel, number: int) -> dict[str, Any]:
    """gb_per_s: of experts that are read and slots that are written, each once; launches: of the first layer."""
    rng = np.random.default_rng(9)
    layers = model.layers[:number]
    matrices = [dense_matrix(layer.num_experts // 2, layer.num_experts, rng) for layer in layers]
    read = sum(tensor.nbytes for layer in layers for tensor in layer.expert_tensors().values())
    written = sum(layer.merged_bytes(matrix) for layer, matrix in zip(layers, matrices, strict=True))

    def mix() -> None:
        for layer, matrix in zip(layers, matrices, strict=True):
            layer.merged_tensors(matrix)

    seconds = median_s(mix, bench.device, repeats=3)
    return {
        "ms": seconds * 1e3,
        "gb_per_s": (read + written) / seconds / 1e9,
        "worst_error": _worst_error(layers[0], matrices[0]),
        "launches": kernels_of(lambda: layers[0].merged_tensors(matrices[0]), bench.device).launches,
    }


def _worst_error(layer: MoELayer, matrix: Matrix) -> float:
    """Of the first slots against a sum in float64, relative to the largest number, in steps of the number format."""
    weights = torch.from_numpy(matrix[:2]).to(layer.router_tensors()["weight"].device, torch.float64)
    worst = 0.0
    for name, mixed in layer.merged_tensors(matrix).items():
        stacked = layer.expert_tensors()[name][:, :64].double()
        expected = torch.tensordot(weights, stacked, dims=1)
        step = torch.finfo(mixed.dtype).eps * float(expected.abs().max())
        worst = max(worst, float((mixed[:2, :64].double() - expected).abs().max()) / step)
    return worst


def _score(bench: Bench, model: MoEModel, num_tokens: int, genome: Genome, budget_bytes: int) -> dict[str, Any]:
    """A genome through the engine, with so much memory for merged layers: at first, and again."""
    model.merged_cache.clear()
    model.merged_cache.budget_bytes = budget_bytes
    run = partial(engine_run, engine_of(model), batch_of(model, num_tokens), [genome], 1, lambda _, logits: None)
    first_s = seconds_of(run, bench.device)
    seconds = median_s(run, bench.device, repeats=3, warm=True)
    return {
        "first_ms": first_s * 1e3,
        "ms": seconds * 1e3,
        "tokens_per_s": num_tokens / seconds,
        "kept_gib": model.merged_cache.size_bytes / 2**30,
    }
