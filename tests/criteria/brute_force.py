"""What experts do, one token and one expert after the other: loops in float64 over stock models' weights.

Nothing of `moe_evo` computes here. The stock model gives the hidden states that enter its experts; how
they are routed and what an expert answers is written out anew, family by family.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

Chosen = list[tuple[int, float]]
"""Experts and their gate weights."""
Kept = Sequence[int] | None
"""The experts that can be chosen; None is all."""
Route = Callable[..., Chosen]
"""Of config, router, a token and optionally `Kept`."""

STATISTICS = ("tokens", "gates", "norms", "gated_norms", "squared_norms", "turned_norms")


def observe(language_model: Any, sequences: Iterable[list[int]]) -> list[dict[str, np.ndarray]]:
    """The statistics (E,) of each MoE layer over all tokens of the sequences, each run by itself."""
    blocks = [block for block in map(block_of, language_model.model.layers) if block is not None]
    config = language_model.config
    found = [{name: np.zeros(len(router.weight)) for name in STATISTICS} for router, _ in blocks]
    for sequence in sequences:
        seen = zip(
            blocks, found, inputs_of(language_model, sequence), streams_of(language_model, sequence), strict=True
        )
        for (router, experts), sums, hidden, stream in seen:
            for token, before in zip(hidden, stream, strict=True):
                chosen = ROUTES[config.model_type](config, router, token)
                answers = [answer(config, experts, expert, token) for expert, _ in chosen]
                added = sum(gate * one for (_, gate), one in zip(chosen, answers, strict=True))
                after = before + added * getattr(config, "residual_multiplier", 1.0)
                turned = 1 - before @ after / math.sqrt(before @ before) / math.sqrt(after @ after)
                for (expert, gate), one in zip(chosen, answers, strict=True):
                    norm = math.sqrt(sum(value * value for value in one))
                    values = (1.0, gate, norm, gate * norm, norm * norm, gate * norm * max(turned, 0.0))
                    for name, value in zip(STATISTICS, values, strict=True):
                        sums[name][expert] += value
    return found


def mone(language_model: Any, sequences: Iterable[list[int]]) -> list[list[float]]:
    """The length of the standard deviations of an expert's answers, times the sum of its gates; by layer."""
    blocks = [block for block in map(block_of, language_model.model.layers) if block is not None]
    config = language_model.config
    seen: list[dict[int, list[tuple[float, np.ndarray]]]] = [{} for _ in blocks]
    for sequence in sequences:
        for (router, experts), of_layer, hidden in zip(blocks, seen, inputs_of(language_model, sequence), strict=True):
            for token in hidden:
                for expert, gate in ROUTES[config.model_type](config, router, token):
                    of_layer.setdefault(expert, []).append((gate, answer(config, experts, expert, token)))
    scores = []
    for (router, _), of_layer in zip(blocks, seen, strict=True):
        of_experts = [of_layer.get(expert, []) for expert in range(len(router.weight))]
        scores.append([
            math.sqrt(np.var([one for _, one in some], axis=0, ddof=1).sum()) * sum(gate for gate, _ in some)
            if len(some) > 1
            else 0.0
            for some in of_experts
        ])  # fmt: skip
    return scores


def trials(
    language_model: Any, sequences: Iterable[list[int]], choices: Sequence[Sequence[int]], top_k: int | None = None
) -> list[list[float]]:
    """For each layer and choice the squared distance of y and y^S, added over all tokens."""
    blocks = [block for block in map(block_of, language_model.model.layers) if block is not None]
    config = language_model.config
    route = ROUTES[config.model_type]
    fewer = copy.copy(config)
    fewer.num_experts_per_tok = top_k or config.num_experts_per_tok
    found = [[0.0] * len(choices) for _ in blocks]
    for sequence in sequences:
        for (router, experts), errors, hidden in zip(blocks, found, inputs_of(language_model, sequence), strict=True):
            for token in hidden:
                answers = [answer(config, experts, expert, token) for expert in range(len(router.weight))]
                usual = sum(gate * answers[expert] for expert, gate in route(config, router, token))
                for place, kept in enumerate(choices):
                    other = sum(gate * answers[expert] for expert, gate in route(fewer, router, token, kept))
                    errors[place] += float(((usual - other) ** 2).sum())
    return found


def gate_ratios(language_model: Any, sequences: Iterable[list[int]]) -> list[list[float]]:
    """w_2 / w_1 of all tokens of each layer."""
    blocks = [block for block in map(block_of, language_model.model.layers) if block is not None]
    config = language_model.config
    found: list[list[float]] = [[] for _ in blocks]
    for sequence in sequences:
        for (router, _), ratios, hidden in zip(blocks, found, inputs_of(language_model, sequence), strict=True):
            for token in hidden:
                gates = sorted((gate for _, gate in ROUTES[config.model_type](config, router, token)), reverse=True)
                ratios.append(gates[1] / gates[0])
    return found


def input_norms(language_model: Any, sequences: Iterable[list[int]]) -> list[dict[str, np.ndarray]]:
    """tokens (E,) and ||X_j g||_2 of what enters gate and up, hidden (E, H), and down, inner (E, I), of each layer."""
    blocks = [block for block in map(block_of, language_model.model.layers) if block is not None]
    config = language_model.config
    squares: list[dict[str, Any]] = [{} for _ in blocks]
    for sequence in sequences:
        for (router, experts), sums, hidden in zip(blocks, squares, inputs_of(language_model, sequence), strict=True):
            for token in hidden:
                for expert, gate in ROUTES[config.model_type](config, router, token):
                    inner = inner_of(config, experts, expert, token)
                    number, of_hidden, of_inner = sums.get(expert, (0, 0.0, 0.0))
                    sums[expert] = (number + 1, of_hidden + (token * gate) ** 2, of_inner + (inner * gate) ** 2)
    found = []
    for (router, _), sums in zip(blocks, squares, strict=True):
        hidden_size, inner_size = (np.size(sums[next(iter(sums))][place]) for place in (1, 2))
        idle = (0, np.zeros(hidden_size), np.zeros(inner_size))
        each = [sums.get(expert, idle) for expert in range(len(router.weight))]
        tokens, of_hidden, of_inner = (np.array(one) for one in zip(*each, strict=True))
        found.append({"tokens": tokens, "hidden": np.sqrt(of_hidden), "inner": np.sqrt(of_inner)})
    return found


def aimer(language_model: Any) -> list[list[float]]:
    """- mean |w| over the root of the mean w^2, of all weights of an expert one after the other."""
    scores = []
    for block in map(block_of, language_model.model.layers):
        if block is None:
            continue
        weights = [block[1].gate_up_proj.tolist(), block[1].down_proj.tolist()]
        of_layer = []
        for expert in range(len(weights[0])):
            flat = [value for stacked in weights for row in stacked[expert] for value in row]
            mean = math.fsum(map(abs, flat)) / len(flat)
            of_layer.append(-mean / math.sqrt(math.fsum(value * value for value in flat) / len(flat)))
        scores.append(of_layer)
    return scores


def block_of(decoder_layer: Any) -> tuple[Any, Any] | None:
    """Router and experts of a decoder layer, None where it is dense."""
    block = getattr(decoder_layer, "mlp", None) or decoder_layer.block_sparse_moe
    router = getattr(block, "gate", None) or getattr(block, "router", None)
    return (router, block.experts) if hasattr(block, "experts") else None


@torch.no_grad()
def inputs_of(language_model: Any, sequence: list[int]) -> list[np.ndarray]:
    """(T, H) hidden states that enter the experts of each MoE layer."""
    entered: list[np.ndarray] = []
    blocks = [block for block in map(block_of, language_model.model.layers) if block is not None]
    handles = [
        experts.register_forward_pre_hook(lambda _module, inputs: entered.append(inputs[0].double().numpy().copy()))
        for _, experts in blocks
    ]
    language_model(input_ids=torch.tensor([sequence]), use_cache=False)
    for handle in handles:
        handle.remove()
    return entered


@torch.no_grad()
def streams_of(language_model: Any, sequence: list[int]) -> list[np.ndarray]:
    """(T, H) residual stream that each MoE layer's answer is added to."""
    passing: list[np.ndarray] = []
    handles = [
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _module, inputs: passing.append(inputs[0][0].double().numpy().copy())
        )
        for layer in language_model.model.layers
        if block_of(layer) is not None
    ]
    language_model(input_ids=torch.tensor([sequence]), use_cache=False)
    for handle in handles:
        handle.remove()
    return passing


def softmax(values: Sequence[float], among: Iterable[int]) -> list[float]:
    """Over `among` only; 0 for the others."""
    shares = [0.0] * len(values)
    highest = max(values[place] for place in among)
    for place in among:
        shares[place] = math.exp(values[place] - highest)
    total = sum(shares)
    return [share / total for share in shares]


def logits_of(router: Any, token: np.ndarray) -> list[float]:
    logits = router.weight.detach().double().numpy() @ token
    bias = getattr(router, "bias", None)
    return list(logits if bias is None else logits + bias.detach().double().numpy())


def everyone(router: Any) -> range:
    return range(len(router.weight))


def best(values: Sequence[float], number: int, among: Iterable[int]) -> list[int]:
    return sorted(among, key=lambda place: -values[place])[:number]


def softmax_then_choose(renormalises: Callable[[Any], bool]) -> Route:
    def route(config: Any, router: Any, token: np.ndarray, kept: Kept = None) -> Chosen:
        among = everyone(router) if kept is None else kept
        shares = softmax(logits_of(router, token), among)
        chosen = best(shares, config.num_experts_per_tok, among)
        total = sum(shares[expert] for expert in chosen) if renormalises(config) else 1.0
        return [(expert, shares[expert] / total) for expert in chosen]

    return route


def choose_then_softmax(config: Any, router: Any, token: np.ndarray, kept: Kept = None) -> Chosen:
    logits = logits_of(router, token)
    chosen = best(logits, config.num_experts_per_tok, everyone(router) if kept is None else kept)
    return list(zip(chosen, softmax([logits[expert] for expert in chosen], range(len(chosen))), strict=True))


def among_best_groups(config: Any, values: Sequence[float], num_best: int, among: Iterable[int]) -> list[int]:
    """The experts of the `topk_group` groups whose `num_best` highest values have the largest sum."""
    size = len(values) // config.n_group
    groups = [
        [expert for expert in range(first, first + size) if expert in among] for first in range(0, len(values), size)
    ]
    merits = [sum(sorted((values[expert] for expert in group), reverse=True)[:num_best]) for group in groups]
    return [expert for group in best(merits, config.topk_group, range(len(groups))) for expert in groups[group]]


def deepseek_v2(config: Any, router: Any, token: np.ndarray, kept: Kept = None) -> Chosen:
    among = everyone(router) if kept is None else kept
    shares = softmax(logits_of(router, token), among)
    chosen = best(shares, config.num_experts_per_tok, among_best_groups(config, shares, 1, among))
    return [(expert, shares[expert] * config.routed_scaling_factor) for expert in chosen]


def sigmoid_with_bias(config: Any, router: Any, token: np.ndarray, kept: Kept = None) -> Chosen:
    among = everyone(router) if kept is None else kept
    scores = [1 / (1 + math.exp(-logit)) for logit in logits_of(router, token)]
    biased = [score + float(bias) for score, bias in zip(scores, router.e_score_correction_bias, strict=True)]
    chosen = best(biased, config.num_experts_per_tok, among_best_groups(config, biased, 2, among))
    total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
    return [(expert, scores[expert] / total * config.routed_scaling_factor) for expert in chosen]


by_config = softmax_then_choose(lambda config: config.norm_topk_prob)
ROUTES: dict[str, Route] = {
    "mixtral": softmax_then_choose(lambda config: True),
    "qwen2_moe": by_config,
    "qwen3_moe": by_config,
    "olmoe": by_config,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": sigmoid_with_bias,
    "glm4_moe": sigmoid_with_bias,
    "gpt_oss": choose_then_softmax,
    "granitemoe": choose_then_softmax,
}


def answer(config: Any, experts: Any, expert: int, token: np.ndarray) -> np.ndarray:
    """f_j(x), (H,)."""
    inner, down = inner_of(config, experts, expert, token), of_expert(experts, "down_proj", expert)
    if config.model_type == "gpt_oss":
        return inner @ down + of_expert(experts, "down_proj_bias", expert)
    return down @ inner


def inner_of(config: Any, experts: Any, expert: int, token: np.ndarray) -> np.ndarray:
    """What enters the down matrix, (I,)."""
    if config.model_type == "gpt_oss":
        inner = token @ of_expert(experts, "gate_up_proj", expert) + of_expert(experts, "gate_up_proj_bias", expert)
        gate, up = np.minimum(inner[0::2], experts.limit), np.clip(inner[1::2], -experts.limit, experts.limit)
        return (up + 1) * gate / (1 + np.exp(-experts.alpha * gate))
    gate, up = np.split(of_expert(experts, "gate_up_proj", expert) @ token, 2)
    return gate / (1 + np.exp(-gate)) * up


def of_expert(experts: Any, name: str, expert: int) -> np.ndarray:
    return getattr(experts, name)[expert].detach().double().numpy()
