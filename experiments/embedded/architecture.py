"""The embedded models before training: their tokenizer, their shapes and how a checkpoint is written."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCABULARY = 2048
SHAPES = ("coarse", "fine")
Row = dict[str, Any]  # prompt, choices, label


def train_tokenizer(rows: dict[str, list[Row]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose fixed labels are one token each and whose digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [r["prompt"] + r["choices"][r["label"]] for task in sorted(rows) for r in rows[task]]
    # Repeated until BPE merges each of them whole.
    texts += fixed_labels(rows) * 3000
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def fixed_labels(rows: dict[str, list[Row]]) -> list[str]:
    """The choices of the tasks whose choices are the same in every row."""
    labels = []
    for task in sorted(rows):
        if len({tuple(r["choices"]) for r in rows[task]}) == 1:
            labels += rows[task][0]["choices"]
    return sorted(set(labels))


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> None:
    """Raise ValueError where prompt + choice does not tokenise as its two parts, or where a
    tokenised choice is a prefix of another of its row."""
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        choices = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in row["choices"]]
        for text, ids in zip(row["choices"], choices, strict=True):
            if tokenizer(row["prompt"] + text)["input_ids"] != prompt + ids:
                raise ValueError(f"{row['prompt']!r} + {text!r} tokenises across its border")
        for a in choices:
            if sum(b[: len(a)] == a for b in choices) > 1:
                raise ValueError(f"a choice is a prefix of another one in {row['choices']}")


def new_model(shape: str, aux_coefficient: float) -> PreTrainedModel:
    """The untrained model of a shape: `coarse` (3.0 M parameters, 1.1 M of them used for a token) or `fine`
    (5.4 M, 1.2 M used)."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.04,
        "router_aux_loss_coef": aux_coefficient,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model: PreTrainedModel
    if shape == "coarse":
        model = MixtralForCausalLM(
            MixtralConfig(
                **common, intermediate_size=208, num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2
            )
        )
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common,
                intermediate_size=256,
                moe_intermediate_size=64,
                num_hidden_layers=6,
                num_experts=32,
                num_experts_per_tok=4,
                norm_topk_prob=True,
            )
        )
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=16, do_sample=False
    )
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, stored: str = "float32") -> None:
    """Write the checkpoint beside `folder`, then move file by file, so that readers never see
    half a file.

    stored: number format of the weights in the file; the config says float32, in which they are loaded."""
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    weights = staging / "model.safetensors"
    dtype = getattr(torch, stored)
    save_file({name: one.to(dtype) for name, one in load_file(weights).items()}, weights, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    staging.rmdir()
