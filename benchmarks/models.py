"""Random models with the embedded model's tokenizer, and the operations that evaluations of genomes need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

import moe_evo
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import Dtype, ModelConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.models.source import ModelSource
from moe_evo.models.transformers_border import quiet
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.base import ForwardBatch
from moe_evo.tasks.data import TaskData
from moe_evo.tracking.terminal import TerminalTracker

EMBEDDED = Path(moe_evo.__file__).parent / "data" / "model"
COMMON = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
MIXTRAL = COMMON | {"num_hidden_layers": 8, "intermediate_size": 1024, "num_local_experts": 8}
QWEN3 = COMMON | {
    "num_hidden_layers": 6, "moe_intermediate_size": 128, "num_experts": 64, "num_experts_per_tok": 8, "head_dim": 64,
}  # fmt: skip
SHAPES = {"mixtral": ("mixtral", MIXTRAL), "qwen3": ("qwen3_moe", QWEN3)}
KEPT = {"embedded": 4, "mixtral": 4, "qwen3": 32}


def random_model(folder: Path, model_type: str, **sizes: int) -> str:
    """Path of a new random model; sizes: fields of its config."""
    torch.manual_seed(0)
    made: Any = AutoModelForCausalLM
    with quiet():
        made.from_config(AutoConfig.for_model(model_type, vocab_size=2048, **sizes)).save_pretrained(folder)
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


def model_path(name: str, folder: Path) -> str:
    """Path of the embedded model, or of a new random one of `SHAPES`."""
    if name == "embedded":
        return name
    model_type, sizes = SHAPES[name]
    return random_model(folder / name, model_type, **sizes)


def loaded(
    path: str,
    tasks: Sequence[TaskData],
    config: EvaluationConfig,
    *,
    self_check: bool = True,
    dtype: Dtype = "auto",
    merged_cache_gib: float | None = None,
) -> Evaluator:
    """The model with the tasks, without a word."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        tracker = TerminalTracker(Console(file=nowhere))
        model = ModelConfig(path=path, self_check=self_check, dtype=dtype, merged_cache_gib=merged_cache_gib)
        return load_evaluator(ModelSource(model), tasks, config, tracker)


def evaluate(evaluator: Evaluator, genomes: Sequence[Genome]) -> None:
    """Score genomes together on the search split."""
    outcomes = evaluator.evaluate(genomes, "search")
    assert all(isinstance(outcome, Evaluation) for outcome in outcomes), outcomes


class Work:
    """Floating-point operations of the matrix multiplications that the scores of genomes need.

    Only what no earlier genome has computed counts, and only real tokens: padding is nobody's need, a token
    attends to its ancestors alone, and the last MoE block and the head see the scored tokens.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        model = evaluator.model
        self.batches = [
            batch
            for task in evaluator.tasks
            for batch in task.batches("search", batch_tokens=evaluator.batch_tokens, trees=model.reads_trees)
            if isinstance(batch, ForwardBatch)
        ]
        self.tokens = sum(int((batch.counts > 0).sum()) for batch in self.batches)
        self.scored = sum(int(batch.kept.sum()) for batch in self.batches)
        seen = sum(int((batch.position_ids + 1)[batch.counts > 0].sum()) for batch in self.batches)
        config, layers = model.language_model.config, model.language_model.get_decoder().layers
        assert model.shape.decoder_layers == tuple(range(len(layers))), "every layer has experts"
        projections = [part.weight for part in layers[0].self_attn.modules() if isinstance(part, torch.nn.Linear)]
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        scores = 4 * config.num_attention_heads * head_width * seen
        self._attention = 2 * sum(weight.numel() for weight in projections) * self.tokens + scores
        self._head = 2 * model.language_model.get_output_embeddings().weight.numel() * self.scored
        self._expert = sum(2 * tensor[0].numel() for tensor in model.layers[0].expert_tensors().values())
        self._router_row = 2 * config.hidden_size
        self._known: set[tuple[str, ...]] = set()

    def of(self, genome: Genome) -> int:
        """Those of a pruning that comes after all the genomes that were asked for before."""
        genes = [gene.digest for gene in genome.layers]
        beginnings = [tuple(genes[:length]) for length in range(len(genes))]
        first = max((length for length, known in enumerate(beginnings) if known in self._known), default=-1)
        self._known.update(beginnings)
        total: int = self._attention * (len(genes) - 1 - first) + self._head
        for number, gene in list(enumerate(genome.layers))[max(first, 0) :]:
            tokens = self.scored if number == len(genes) - 1 else self.tokens
            total += tokens * (gene.num_kept * self._router_row + gene.top_k * self._expert)
        return total
