"""Tiny tokenizers, models and data of `moe_evo.testing`, and brute force over them."""

from __future__ import annotations

import numpy as np
import torch

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.space import ModelShape
from moe_evo.testing.tiny_tasks import (
    CHAT_TEMPLATE,
    CORPUS,
    SIZES,
    forward,
    make_task,
    run_task,
    tiny_llama,
    tiny_mixtral,
    tiny_tokenizer,
    write_rows,
    write_splits,
)

__all__ = [
    "CHAT_TEMPLATE",
    "CORPUS",
    "SIZES",
    "alone",
    "answer_log_likelihood",
    "forward",
    "make_task",
    "run_task",
    "tiny_llama",
    "tiny_merge",
    "tiny_mixtral",
    "tiny_tokenizer",
    "write_rows",
    "write_splits",
]


def tiny_merge(shape: ModelShape, *, num_kept: int = 2, scale: float = 0.5) -> Genome:
    """Random W_EM and W_RM; a huge `scale` makes numbers that are not finite."""
    rng = np.random.default_rng(0)

    def matrix(num_experts: int, size: float) -> np.ndarray:
        return rng.normal(0, size, size=(num_kept, num_experts)).astype(np.float32)

    return Genome(tuple(LayerGenome(matrix(one, scale), matrix(one, 0.5), 2) for one in shape.num_experts))


@torch.inference_mode()
def alone(model, tokens: list[int]) -> torch.Tensor:
    """(T, V) log-probabilities of one sequence, without padding, cache or batch."""
    log_probs: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return log_probs


def answer_log_likelihood(model, context: list[int], answer: list[int]) -> float:
    """Brute force: one row, one token after the other."""
    log_probs = alone(model, context + answer)
    return sum(float(log_probs[len(context) - 1 + place, token]) for place, token in enumerate(answer))
