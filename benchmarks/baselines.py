"""What an evaluation is compared with: other ways to score the same genome on the same examples.

`PublishedLoop` works as the released search of EEP does, `Harness` asks lm-evaluation-harness, `Checkpoint`
writes the smaller model to disk and loads it. All are given batches of the size that suits them best.
"""

from __future__ import annotations

import copy
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import loaded

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.view import MoEModel
from moe_evo.tasks.data import TaskData
from moe_evo.tasks.prompt import PromptFormat

BATCH_SIZES = (8, 32, 128)

Question = tuple[list[tuple[list[int], int]], int]
"""An example's choices, as (tokens of prompt and answer, where the answer begins), and the right one."""


def fitness_of(evaluator: Evaluator, genome: Genome | None) -> float:
    """Mean accuracy over the tasks on the search split."""
    outcome = evaluator.evaluate([genome], "search")[0]
    assert isinstance(outcome, Evaluation), outcome
    return outcome.fitness


class PublishedLoop:
    """Merge every expert of every layer from a copy on the host, load the state dict, run padded batches.

    Every choice is a sequence of its own with all its logits, as in the released evaluation, and experts
    run one after the other ('eager').
    """

    name = "rewrite and reload"

    def __init__(self, model: MoEModel, data: Sequence[TaskData], num_kept: int, top_k: int) -> None:
        self._family = model.family
        self._positions = model.shape.decoder_layers
        self._state = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
        config = copy.deepcopy(model.language_model.config)
        setattr(config, self._family.experts_field, num_kept)
        setattr(config, self._family.top_k_field, top_k)
        self._small = type(model.language_model)(config).eval()
        self._small.set_experts_implementation("eager")
        self._tasks = [list(questions(one, model.tokenizer)) for one in data]
        self._batch_size = BATCH_SIZES[0]

    def fitness(self, genome: Genome) -> float:
        """Mean accuracy over the tasks."""
        self._reload(genome)
        return float(np.mean([self._accuracy(task) for task in self._tasks]))

    def tune(self, genome: Genome) -> None:
        """Choose the batch size that is fastest for this genome."""
        seconds = {}
        for self._batch_size in BATCH_SIZES:
            started = time.perf_counter()
            self.fitness(genome)
            seconds[self._batch_size] = time.perf_counter() - started
        self._batch_size = min(seconds, key=lambda size: seconds[size])

    def _reload(self, genome: Genome) -> None:
        state = dict(self._state)
        for position, gene in zip(self._positions, genome.layers, strict=True):
            block = f"model.layers.{position}.{self._family.block}"
            for matrix, tensors, part in (
                (gene.expert_merging, self._family.expert_tensors, "experts"),
                (gene.router_mapping, self._family.router_tensors, self._family.router),
            ):
                weights = torch.from_numpy(matrix.copy())
                for tensor in tensors:
                    stacked = self._state[f"{block}.{part}.{tensor}"]
                    state[f"{block}.{part}.{tensor}"] = torch.stack(
                        [sum(weight * one for weight, one in zip(row, stacked, strict=True)) for row in weights]
                    )
        self._small.load_state_dict(state)

    @torch.inference_mode()
    def _accuracy(self, task: list[Question]) -> float:
        sequences = [sequence for choices, _ in task for sequence in choices]
        likelihoods = [
            value
            for first in range(0, len(sequences), self._batch_size)
            for value in self._likelihoods(sequences[first : first + self._batch_size])
        ]
        values = iter(likelihoods)
        hits = [np.argmax([next(values) for _ in choices]) == label for choices, label in task]
        return float(np.mean(hits))

    def _likelihoods(self, sequences: list[tuple[list[int], int]]) -> Iterator[float]:
        width = max(len(tokens) for tokens, _ in sequences)
        input_ids = torch.zeros((len(sequences), width), dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, (tokens, _) in enumerate(sequences):
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        log_probs = self._small(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
        for row, (tokens, start) in enumerate(sequences):
            answer = torch.tensor(tokens[start:])
            yield float(log_probs[row, start - 1 : len(tokens) - 1].gather(1, answer[:, None]).sum())


def questions(data: TaskData, tokenizer: Any) -> Iterator[Question]:
    """The examples of the search split."""
    form = PromptFormat(data.config, data, tokenizer)
    for example in data.splits["search"]:
        context, answers = form.pair_tokens(example, example.choices)
        assert example.label is not None
        yield [([*context, *answer], len(context)) for answer in answers], example.label


class Harness:
    """lm-evaluation-harness on the resident model, with the genome applied."""

    name = "lm_eval"

    def __init__(self, model: MoEModel, data: Sequence[TaskData], folder: Path) -> None:
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        for one in data:
            form = PromptFormat(one.config, one, model.tokenizer)
            rows = [
                {"prompt": form.prompt(e), "choices": list(e.choices), "label": e.label} for e in one.splits["search"]
            ]
            path = folder / f"{one.name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            (folder / f"{one.name}.yaml").write_text(
                json.dumps(
                    {
                        "task": one.name,
                        "dataset_path": "json",
                        "dataset_kwargs": {"data_files": {"test": str(path)}},
                        "test_split": "test",
                        "output_type": "multiple_choice",
                        "doc_to_text": "{{prompt}}",
                        "doc_to_choice": "choices",
                        "doc_to_target": "label",
                        "target_delimiter": "",
                        "metric_list": [{"metric": "acc"}],
                    }
                ),
                encoding="utf-8",
            )
        self._model = model
        self._names = [one.name for one in data]
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        self._tasks = manager.load(self._names)["tasks"]
        self._lm = HFLM(pretrained=model.language_model, tokenizer=model.tokenizer, batch_size=128, device="cpu")

    def fitness(self, genome: Genome) -> float:
        """Mean accuracy over the tasks."""
        from lm_eval.evaluator import evaluate

        with self._model.applied(genome), redirect_stderr(io.StringIO()):  # it draws progress bars
            results = evaluate(lm=self._lm, task_dict=self._tasks, bootstrap_iters=0, log_samples=False)
        return float(np.mean([results["results"][name]["acc,none"] for name in self._names]))


class Checkpoint:
    """Export the genome, load what was written, score it."""

    name = "write and load"

    def __init__(self, evaluator: Evaluator, data: Sequence[TaskData]) -> None:
        self._evaluator = evaluator
        self._data = data

    def fitness(self, genome: Genome) -> float:
        """Mean accuracy over the tasks."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model")
            export_checkpoint(self._evaluator.model, genome, Path(path), provenance={})
            return fitness_of(loaded(path, self._data, EvaluationConfig(), self_check=False), None)
