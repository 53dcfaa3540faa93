"""What the card can do: multiplications, copies, grouped multiplications, launches, and kernels of attention."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gpu_sections.bench import Bench
from gpu_sections.record import Record
from gpu_sections.timing import kernels_of, median_s, seconds_of

BACK_ENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_LAUNCHES = 200


def ceilings(bench: Bench, record: Record) -> None:
    """The rates that nothing on this card exceeds."""
    record.attempt("matmul", partial(_matmul, bench))
    record.attempt("copy", partial(_copy, bench))
    record.attempt("launch", partial(_launch, bench))
    for name in bench.names:
        for tokens in (8, 64) if bench.is_small else (64, 512, 4096, 32768):
            record.attempt(f"grouped_mm, {name}, {tokens} tokens", partial(_grouped_mm, bench, name, tokens))


def matmul_flops(bench: Bench) -> float:
    """Operations a second; measured where `ceilings` has not run."""
    if bench.matmul_flops is None:
        _matmul(bench)
    assert bench.matmul_flops is not None
    return bench.matmul_flops


@torch.inference_mode()
def _matmul(bench: Bench) -> dict[str, Any]:
    size = 512 if bench.is_small else 8192
    first, second = (torch.randn(size, size, device=bench.device, dtype=bench.models.dtype) for _ in range(2))
    out = torch.empty_like(first)
    seconds = median_s(lambda: torch.mm(first, second, out=out), bench.device, inner=10)
    bench.matmul_flops = 2 * size**3 / seconds
    return {"size": size, "ms": seconds * 1e3, "tflops": bench.matmul_flops / 1e12}


@torch.inference_mode()
def _copy(bench: Bench) -> dict[str, Any]:
    source = torch.randn(2**22 if bench.is_small else 2**31, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = median_s(lambda: target.copy_(source), bench.device, inner=5)
    return {"gib": source.nbytes / 2**30, "ms": seconds * 1e3, "gb_per_s": 2 * source.nbytes / seconds / 1e9}


@torch.inference_mode()
def _launch(bench: Bench) -> dict[str, Any]:
    """Microseconds of an operator that has next to nothing to do, one after the other and in a CUDA graph."""
    one = torch.zeros(1, device=bench.device)

    def operators() -> None:
        for _ in range(_LAUNCHES):
            one.add_(1)

    figures = {"operator_us": median_s(operators, bench.device) / _LAUNCHES * 1e6}
    if bench.on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            operators()
        figures["in_a_graph_us"] = median_s(graph.replay, bench.device) / _LAUNCHES * 1e6
    return figures


@torch.inference_mode()
def _grouped_mm(bench: Bench, name: str, tokens: int) -> dict[str, Any]:
    """The two multiplications of a model's experts, with rows divided among them at random, as transformers calls them.

    gb_per_s: of the weights alone.
    """
    _, sizes = bench.models.shapes[name]
    experts, hidden, slots = sizes["num_experts"], sizes["hidden_size"], tokens * sizes["num_experts_per_tok"]
    width = sizes["intermediate_size"] if name == "olmoe" else sizes["moe_intermediate_size"]
    options: dict[str, Any] = {"device": bench.device, "dtype": bench.models.dtype}
    chosen = torch.randint(0, experts, (slots,), device=bench.device)
    offsets = torch.bincount(chosen, minlength=experts).cumsum(0).to(torch.int32)
    figures: dict[str, Any] = {}
    for what, inner, columns in (("up", hidden, 2 * width), ("down", width, hidden)):
        rows = torch.randn(slots, inner, **options)
        weights = torch.randn(experts, columns, inner, **options).transpose(1, 2)
        seconds = median_s(
            lambda rows=rows, weights=weights: torch.nn.functional.grouped_mm(rows, weights, offs=offsets),  # type: ignore[misc]
            bench.device,
            inner=5,
        )
        figures[f"{what}_ms"] = seconds * 1e3
        figures[f"{what}_tflops"] = 2 * slots * inner * columns / seconds / 1e12
        figures[f"{what}_gb_per_s"] = weights.nbytes / seconds / 1e9
    return figures


def attention(bench: Bench, record: Record) -> None:
    """Kernels of attention with an additive mask: what the first call with a new shape costs, and later ones.

    torch chooses as it does in an evaluation, without cuDNN.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not bench.on_gpu:
        for name in ("cuDNN", "flash", "efficient"):
            record.skip(name, "only a GPU has it")
    ways: dict[str, SDPBackend | None] = {"as chosen by torch": None, **BACK_ENDS}
    for number, (name, back_end) in enumerate(ways.items()):
        if name not in record.skipped:
            record.attempt(name, partial(_attention, bench, back_end, number))
    point = "as chosen by torch, causal without a mask"
    record.attempt(point, partial(_attention, bench, None, len(ways), masked=False))


@torch.inference_mode()
def _attention(bench: Bench, back_end: SDPBackend | None, more: int, *, masked: bool = True) -> dict[str, Any]:
    """The Qwen3 shape, about 4,096 tokens; the first width is not counted, as libraries are loaded meanwhile.

    more: rows, so that no other back end has made plans for these shapes.
    """
    _, sizes = bench.models.shapes["qwen3"]
    widths = (8, 11, 16) if bench.is_small else (48, 57, 64, 75, 96, 131, 200, 256)
    first: list[float] = []
    warm: list[float] = []
    for width in widths:
        rows = (64 if bench.is_small else 4096) // width + more
        shape = (rows, sizes["num_attention_heads"], width, sizes["head_dim"])
        query, key, value = (torch.randn(shape, device=bench.device, dtype=bench.models.dtype) for _ in range(3))
        mask = _causal_mask(rows, width, query) if masked else None
        call = partial(scaled_dot_product_attention, query, key, value, attn_mask=mask, is_causal=not masked)
        with _only(back_end):
            first.append(seconds_of(call, bench.device))
            warm.append(median_s(call, bench.device, inner=5, warm=True))
    with _only(back_end):
        kernel = kernels_of(call, bench.device, number=1).first
    return {
        "first_ms": statistics.median(first[1:]) * 1e3,
        "worst_first_ms": max(first[1:]) * 1e3,
        "warm_ms": statistics.median(warm[1:]) * 1e3,
        "widest_kernel": kernel,
        "first_ms_by_width": dict(zip(map(str, widths), (one * 1e3 for one in first), strict=True)),
        "warm_ms_by_width": dict(zip(map(str, widths), (one * 1e3 for one in warm), strict=True)),
    }


def _only(back_end: SDPBackend | None) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = nullcontext() if back_end is None else sdpa_kernel(back_end)
    return context


def _causal_mask(rows: int, width: int, like: Tensor) -> Tensor:
    """(P, 1, T, T) additive."""
    lowest = torch.full((width, width), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
    return lowest.triu(1).expand(rows, 1, width, width).contiguous()
