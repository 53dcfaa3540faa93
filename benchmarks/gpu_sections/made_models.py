"""Models of real shapes with random weights, built where they run, with what there is to score on them.

Nothing is read from disk but the embedded tokenizer. Weights are normal with a deviation of 0.02, as before
training: logits spread, routers choose, and no two experts are alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import EMBEDDED
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import no_init_weights

from gpu_sections.record import free_memory
from moe_evo.config.search import EEPConfig
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.genome import Genome, Matrix
from moe_evo.genomes.operators import gaussian_mutation, random_pruning, swap_mutation
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.free_memory import free_bytes
from moe_evo.models.placement import suit_device
from moe_evo.models.transformers_border import quiet
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch
from moe_evo.tasks.batches import forward_batches
from moe_evo.tasks.choice import ChoiceScorer
from moe_evo.tasks.data import TaskData, check_tasks
from moe_evo.tasks.prompt import PromptFormat
from moe_evo.tasks.rows import BatchLimits, Row
from moe_evo.tasks.task import Task

OLMOE = {
    "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 50304, "num_experts": 64, "num_experts_per_tok": 8,
}  # fmt: skip
QWEN3 = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
DEEPSEEK = {"num_hidden_layers": 2, "first_k_dense_replace": 1}  # else as the config of the library: DeepSeek-V3's
SHAPES = {"olmoe": ("olmoe", OLMOE), "qwen3": ("qwen3_moe", QWEN3), "deepseek_v3": ("deepseek_v3", DEEPSEEK)}

_SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2500,
    "num_experts_per_tok": 2, "intermediate_size": 48, "moe_intermediate_size": 48,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 16, "n_group": 2, "topk_group": 1,
}  # fmt: skip
SMALL_SHAPES = {
    "olmoe": ("olmoe", _SMALL | {"num_hidden_layers": 3, "num_experts": 8}),
    "qwen3": ("qwen3_moe", _SMALL | {"num_hidden_layers": 4, "num_experts": 16, "head_dim": 16}),
    "deepseek_v3": ("deepseek_v3", _SMALL | _LATENT | DEEPSEEK),
}
QWEN3_LAYERS = (48, 24, 12)
ROW = 128  # tokens of a row


class MadeModels:
    """Random models on a device, of which the last one is kept.

    qwen3_layers: decoder layers of the Qwen3 shape; None is as many of `QWEN3_LAYERS` as fill at most half of the
    memory that is free now: the rest is for caches, a smaller model beside it and activations.
    """

    def __init__(self, device: torch.device, *, is_small: bool, qwen3_layers: int | None = None) -> None:
        self.device = device
        self.is_small = is_small
        self.dtype = torch.float32 if is_small else torch.bfloat16
        self.shapes: dict[str, tuple[str, dict[str, Any]]] = dict(SMALL_SHAPES if is_small else SHAPES)
        self._kept: dict[tuple[Any, ...], tuple[MoEModel, int]] = {}
        layers = qwen3_layers or (None if is_small else _fitting_layers(device))
        if layers is not None:
            model_type, sizes = self.shapes["qwen3"]
            self.shapes["qwen3"] = (model_type, {**sizes, "num_hidden_layers": layers})

    def get(self, name: str, *, dtype: torch.dtype | None = None, layers: int | None = None) -> MoEModel:
        """The model; the one before must not be in use any more. layers: fewer decoder layers than the shape has."""
        key = (name, dtype, layers)
        if key not in self._kept:
            self.forget()
            model_type, sizes = self.shapes[name]
            sizes = sizes if layers is None else {**sizes, "num_hidden_layers": layers}
            config = AutoConfig.for_model(model_type, **{"eos_token_id": None, **sizes})
            made = _made(config, self.device, dtype or self.dtype)
            self._kept[key] = (made, made.merged_cache.budget_bytes)
        model, budget_bytes = self._kept[key]
        model.merged_cache.clear()
        model.merged_cache.budget_bytes = budget_bytes
        return model

    def forget(self) -> None:
        """Give back the memory of the last model."""
        self._kept.clear()
        free_memory()


def _fitting_layers(device: torch.device) -> int:
    """Of the Qwen3 shape."""
    hidden, experts = QWEN3["hidden_size"], QWEN3["num_experts"]
    a_layer = 2 * experts * 3 * hidden * QWEN3["moe_intermediate_size"]  # bytes; of attention there is little
    free = free_bytes(device) or 0
    return next((layers for layers in QWEN3_LAYERS if layers * a_layer < free / 2), QWEN3_LAYERS[-1])


def empty_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A language model on the device whose weights are whatever was in memory; norms are ones."""
    with quiet(), torch.device(device), no_init_weights():
        made: Any = AutoModelForCausalLM
        model: Any = made.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None  # answers have the length that is asked for
    suit_device(model, device)
    return model.eval().requires_grad_(False)


def _made(config: Any, device: torch.device, dtype: torch.dtype) -> MoEModel:
    model = empty_model(config, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        if tensor.ndim >= 2 or "bias" in name:
            tensor.normal_(0, 0.02, generator=generator)
    with quiet():
        made: Any = AutoTokenizer
        return MoEModel(model, made.from_pretrained(EMBEDDED), device=device)


def genomes_in_words(number: int) -> str:
    """For the name of a point."""
    return f"{number} genome" if number == 1 else f"{number} genomes"


def space_of(model: MoEModel) -> SearchSpace:
    """Genomes that keep half of the experts."""
    return SearchSpace.build(model.shape, num_kept=[number // 2 for number in model.shape.num_experts])


def prunings(model: MoEModel, number: int) -> list[Genome]:
    """Random ones, which have nothing in common."""
    space = space_of(model)
    return [random_pruning(space, np.random.default_rng([1, one])) for one in range(number)]


def pruning_family(model: MoEModel, number: int) -> list[Genome]:
    """A pruning and its children, with the rates of a search."""
    space, rates = space_of(model), EEPConfig()
    parent = random_pruning(space, np.random.default_rng(2))
    children = (
        swap_mutation(
            parent, space, np.random.default_rng([2, one]), layer_rate=rates.layer_rate, swap_rate=rates.swap_rate
        )
        for one in range(number - 1)
    )
    return [parent, *children]


def merging_family(model: MoEModel, number: int) -> list[Genome]:
    """Children of a pruning in the merging phase, with the rates of a search; most of them merge other layers."""
    space, rates = space_of(model), EEPConfig()
    parent = random_pruning(space, np.random.default_rng(3))
    return [
        gaussian_mutation(
            parent, space, np.random.default_rng([3, one]),
            layer_rate=rates.layer_rate, entry_rate=rates.entry_rate, sigma=rates.sigma,
        )
        for one in range(number)
    ]  # fmt: skip


def dense_merge(model: MoEModel) -> Genome:
    """Every kept slot of every layer mixes all experts."""
    space = space_of(model)
    parent = random_pruning(space, np.random.default_rng(4))
    return gaussian_mutation(parent, space, np.random.default_rng(5), layer_rate=1.0, entry_rate=1.0, sigma=0.1)


def dense_matrix(num_kept: int, num_experts: int, rng: np.random.Generator) -> Matrix:
    """W_EM (K, E)."""
    return rng.normal(0, num_experts**-0.5, (num_kept, num_experts)).astype(np.float32)


def batch_of(model: MoEModel, num_tokens: int, *, row: int = ROW, num_scored: int = 1) -> ForwardBatch:
    """Rows of random tokens that have nothing in common, of which the last `num_scored` tokens are scored."""
    row = min(row, num_tokens)
    rng = np.random.default_rng([6, num_tokens])
    words = rng.integers(3, model.language_model.config.vocab_size, (num_tokens // row, row))
    rows = [Row(number, tuple(tokens.tolist()), row - num_scored) for number, tokens in enumerate(words)]
    (batch,) = forward_batches(rows, BatchLimits(2 * num_tokens, 1, trees=False))
    return batch.to(model.device)


def made_up_data(folder: Path, number: int, *, words: int) -> TaskData:
    """Choice examples of made-up words: a prompt of so many, and four choices of a tenth of that."""
    rng = np.random.default_rng(7)
    for split, size in (("search", number), ("validation", 20), ("test", 20)):
        lines = (json.dumps(_example(rng, words)) for _ in range(size))
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (data,) = check_tasks([TaskConfig(name="made_up", data=str(folder), kind="choice")])
    return data


def _example(rng: np.random.Generator, words: int) -> dict[str, Any]:
    choices = [" " + " ".join(_words(rng, max(words // 10, 1))) for _ in range(4)]
    return {"prompt": " ".join(_words(rng, words)), "choices": choices, "label": int(rng.integers(4))}


def _words(rng: np.random.Generator, number: int) -> Iterator[str]:
    for _ in range(number):
        yield "".join(rng.choice(list("abcdefghijklmnoprstuvwy"), int(rng.integers(3, 7))))


def choice_task(data: TaskData, model: MoEModel, batch_tokens: int) -> Task:
    """The task, with batches no larger than those of a tokenizer with as many words as the model has."""
    limits = BatchLimits(batch_tokens, model.language_model.config.vocab_size)
    scorer = ChoiceScorer(PromptFormat(data.config, data, model.tokenizer))
    return Task(data, {data.metric: scorer}, limits)


def needed_flops(model: MoEModel, batch: ForwardBatch, genomes: Sequence[Genome]) -> float:
    """Operations of the matrix multiplications that the scores of genomes need which have no layer in common.

    As `models.Work` counts: their first attention is computed once, and the last MoE block and the head see the
    scored tokens alone.
    """
    language_model = model.language_model
    config, layers = language_model.config, language_model.get_decoder().layers
    tokens, scored = int((batch.counts > 0).sum()), int(batch.kept.sum())
    seen = int((batch.position_ids + 1)[batch.counts > 0].sum())
    projections = sum(
        part.weight.numel() for part in layers[0].self_attn.modules() if isinstance(part, torch.nn.Linear)
    )
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * projections * tokens + 4 * config.num_attention_heads * head_width * seen
    head = 2 * language_model.get_output_embeddings().weight.numel() * scored
    expert = sum(2 * tensor[0].numel() for tensor in model.layers[0].expert_tensors().values())
    total = float(attention)
    for genome in genomes:
        total += attention * (len(layers) - 1) + head
        for number, gene in enumerate(genome.layers):
            seen_by_block = scored if number == len(genome.layers) - 1 else tokens
            total += seen_by_block * (gene.num_kept * 2 * config.hidden_size + gene.top_k * expert)
    return total
