"""What experts do, one token and one expert after the other: loops in float64 over stock models' weights.

Nothing of `moe_evo` computes here. The stock model gives the hidden states that enter its experts; how
they are routed and what an expert answers is written out anew, family by family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

Chosen = list[tuple[int, float]]
"""Experts and their gate weights."""

STATISTICS = ("tokens", "gates", "norms", "gated_norms", "squared_norms")


def observe(language_model: Any, sequences: Iterable[list[int]]) -> list[dict[str, np.ndarray]]:
    """The statistics (E,) of each MoE layer over all tokens of the sequences, each run by itself."""
    blocks = [block for block in map(block_of, language_model.model.layers) if block is not None]
    config = language_model.config
    found = [{name: np.zeros(len(router.weight)) for name in STATISTICS} for router, _ in blocks]
    for sequence in sequences:
        for (router, experts), sums, hidden in zip(blocks, found, inputs_of(language_model, sequence), strict=True):
            for token in hidden:
                for expert, gate in ROUTES[config.model_type](config, router, token):
                    norm = math.sqrt(sum(value * value for value in answer(config, experts, expert, token)))
                    values = (1.0, gate, norm, gate * norm, norm * norm)
                    for name, value in zip(STATISTICS, values, strict=True):
                        sums[name][expert] += value
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


def softmax(values: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def logits_of(router: Any, token: np.ndarray) -> list[float]:
    logits = router.weight.detach().double().numpy() @ token
    bias = getattr(router, "bias", None)
    return list(logits if bias is None else logits + bias.detach().double().numpy())


def best(values: Sequence[float], number: int, among: Iterable[int]) -> list[int]:
    return sorted(among, key=lambda place: -values[place])[:number]


def softmax_then_choose(renormalises: Callable[[Any], bool]) -> Callable[[Any, Any, np.ndarray], Chosen]:
    def route(config: Any, router: Any, token: np.ndarray) -> Chosen:
        shares = softmax(logits_of(router, token))
        chosen = best(shares, config.num_experts_per_tok, range(len(shares)))
        total = sum(shares[expert] for expert in chosen) if renormalises(config) else 1.0
        return [(expert, shares[expert] / total) for expert in chosen]

    return route


def choose_then_softmax(config: Any, router: Any, token: np.ndarray) -> Chosen:
    logits = logits_of(router, token)
    chosen = best(logits, config.num_experts_per_tok, range(len(logits)))
    return list(zip(chosen, softmax([logits[expert] for expert in chosen]), strict=True))


def among_best_groups(config: Any, values: Sequence[float], num_best: int) -> list[int]:
    """The experts of the `topk_group` groups whose `num_best` highest values have the largest sum."""
    size = len(values) // config.n_group
    groups = [range(first, first + size) for first in range(0, len(values), size)]
    merits = [sum(sorted((values[expert] for expert in group), reverse=True)[:num_best]) for group in groups]
    return [expert for group in best(merits, config.topk_group, range(len(groups))) for expert in groups[group]]


def deepseek_v2(config: Any, router: Any, token: np.ndarray) -> Chosen:
    shares = softmax(logits_of(router, token))
    chosen = best(shares, config.num_experts_per_tok, among_best_groups(config, shares, 1))
    return [(expert, shares[expert] * config.routed_scaling_factor) for expert in chosen]


def sigmoid_with_bias(config: Any, router: Any, token: np.ndarray) -> Chosen:
    scores = [1 / (1 + math.exp(-logit)) for logit in logits_of(router, token)]
    biased = [score + float(bias) for score, bias in zip(scores, router.e_score_correction_bias, strict=True)]
    chosen = best(biased, config.num_experts_per_tok, among_best_groups(config, biased, 2))
    total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
    return [(expert, scores[expert] / total * config.routed_scaling_factor) for expert in chosen]


by_config = softmax_then_choose(lambda config: config.norm_topk_prob)
ROUTES: dict[str, Callable[[Any, Any, np.ndarray], Chosen]] = {
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

    def of_expert(name: str) -> np.ndarray:
        return getattr(experts, name)[expert].detach().double().numpy()

    if config.model_type == "gpt_oss":
        inner = token @ of_expert("gate_up_proj") + of_expert("gate_up_proj_bias")
        gate, up = np.minimum(inner[0::2], experts.limit), np.clip(inner[1::2], -experts.limit, experts.limit)
        inner = (up + 1) * gate / (1 + np.exp(-experts.alpha * gate))
        return inner @ of_expert("down_proj") + of_expert("down_proj_bias")
    gate, up = np.split(of_expert("gate_up_proj") @ token, 2)
    return of_expert("down_proj") @ (gate / (1 + np.exp(-gate)) * up)
