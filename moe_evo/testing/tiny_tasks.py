"""Tiny tokenizers, models and data, and functions that score a task on such a model without genomes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.engine.generate import generate_greedily
from moe_evo.models.transformers_border import transformers
from moe_evo.models.tree_masks import attention_masks
from moe_evo.tasks.base import Batch, ForwardBatch, TaskScores
from moe_evo.tasks.data import read_task
from moe_evo.tasks.registry import build_task
from moe_evo.tasks.task import Task

Rows = Sequence[Mapping[str, Any]]
"""The rows of a JSONL file."""

CORPUS = [
    "the capital of france is paris", "the capital of japan is tokyo", "one two three four five six",
    "question: what is the sum of 12 and 30? answer: 42", "a cat and a dog are animals", "yes no good bad maybe",
]  # fmt: skip

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(*, bos: bool = False, chat: bool = False) -> Any:
    """Byte-level BPE with a few merges; with `bos`, every text begins with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


SIZES = {
    "vocab_size": 350,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,  # large, so that different tokens and positions give clearly different logits
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def tiny_mixtral(num_experts: int = 4) -> Any:
    torch.manual_seed(1)
    config = transformers.MixtralConfig(
        **SIZES, num_local_experts=num_experts, num_experts_per_tok=2, sliding_window=None
    )
    return transformers.MixtralForCausalLM(config).eval()


def write_rows(path: Path, rows: Rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_splits(folder: Path, rows: Rows) -> str:
    """A folder whose search split holds all rows; the other two hold two rows each of the same form."""
    write_rows(folder / "search.jsonl", rows)
    for split in ("validation", "test"):
        others = [{**row, _input(row): f"{split} {row[_input(row)]}"} for row in rows[:2]]
        write_rows(folder / f"{split}.jsonl", others)
    return str(folder)


def _input(row: Mapping[str, Any]) -> str:
    return "prompt" if "prompt" in row else "text"


def make_task(folder: Path, rows: Rows, tokenizer: Any, *, batch_tokens: int = 64, **options: Any) -> Task:
    config = TaskConfig(data=write_splits(folder, rows), **options)
    return build_task(read_task(config), tokenizer, batch_tokens)


@torch.inference_mode()
def forward(model: Any, batch: ForwardBatch) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=attention_masks(model.config, batch.position_ids, batch.ends, batch.counts, model.dtype),
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.kept,
    ).logits
    return logits


@torch.inference_mode()
def run_task(
    task: Task,
    model: Any,
    tokenizer: Any,
    *,
    reference_model: Any = None,
    split: str = "search",
    indices: list[int] | None = None,
) -> TaskScores:
    """The steps of an evaluator, without genomes: forward or generate, score, combine."""
    parts = []
    for batch in task.batches(split, indices):
        reference = None
        if task.needs_reference:
            assert isinstance(batch, ForwardBatch)
            reference = task.reference(batch, forward(reference_model, batch))
        parts.append((batch.examples, task.score(split, batch, _output(model, tokenizer, batch), reference)))
    return task.combine(split, parts)


def _output(model: Any, tokenizer: Any, batch: Batch) -> torch.Tensor:
    return forward(model, batch) if isinstance(batch, ForwardBatch) else generate_greedily(model, tokenizer, batch).new
