"""Genomes in, outcomes out: the one place that runs forward passes to score.

The model stays loaded and genomes are applied to it one after the other; equal genomes are computed
once. Nothing here knows of pools, journals or searches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moe_evo.config import EvaluationConfig
from moe_evo.errors import ModelError
from moe_evo.evaluation.generate import NonFiniteLogits, generate_greedily
from moe_evo.genome import Genome
from moe_evo.models.view import MoEModel
from moe_evo.population import Evaluation, EvaluationFailure, Outcome
from moe_evo.space import check_fits
from moe_evo.tasks.base import Batch, ForwardBatch, TaskScores
from moe_evo.tasks.task import Task

Indices = Mapping[str, Sequence[int]]
"""Example numbers by task name; a task that is not named is used whole."""


@dataclass(frozen=True)
class _Prepared:
    """One task's batches on the model's device, each with its reference where the task needs one."""

    task: Task
    batches: tuple[Batch, ...]
    references: tuple[Tensor | None, ...]


class Evaluator:
    """A loaded model and the tasks that its genomes are scored on."""

    def __init__(self, model: MoEModel, tasks: Sequence[Task], config: EvaluationConfig) -> None:
        assert tasks and len({task.name for task in tasks}) == len(tasks), "tasks need distinct names"
        self.model = model
        self.tasks = tuple(tasks)
        self._config = config
        self._whole: dict[str, tuple[_Prepared, ...]] = {}

    def evaluate(self, genomes: Sequence[Genome | None], split: str, indices: Indices | None = None) -> list[Outcome]:
        """One outcome a genome, in order; None is the untouched model.

        Raises GenomeError, before anything is computed, where a genome does not fit the model.
        """
        for genome in genomes:
            if genome is not None:
                check_fits(genome, self.model.shape)
        outcomes: dict[str | None, Outcome] = {}
        for genome in genomes:
            digest = genome.digest if genome is not None else None
            if digest not in outcomes:
                started = time.perf_counter()
                examined = self.examine(genome, split, indices)
                outcomes[digest] = self._outcome(examined, time.perf_counter() - started)
        return [outcomes[genome.digest if genome is not None else None] for genome in genomes]

    def examine(
        self, genome: Genome | None, split: str, indices: Indices | None = None
    ) -> dict[str, TaskScores] | EvaluationFailure:
        """The scores of every example, by task name."""
        started = time.perf_counter()
        with torch.inference_mode(), _threads(self._config.threads), self.within_memory():
            prepared = self._prepared(split, indices)
            try:
                with self.model.applied(genome) if genome is not None else nullcontext():
                    partials = [self._partials(one) for one in prepared]
            except NonFiniteLogits as error:
                return EvaluationFailure("non_finite", str(error), time.perf_counter() - started)
        return {
            one.task.name: one.task.combine(split, one.batches, parts)
            for one, parts in zip(prepared, partials, strict=True)
        }

    @contextmanager
    def within_memory(self) -> Iterator[None]:
        """Turn running out of memory into a ModelError that says what to lower."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"out of memory on {self.model.device}: lower evaluation.batch_tokens (now "
                f"{self._config.batch_tokens}) or model.merged_cache_gib, then run the same command again"
            ) from error

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits (B, n, V) of whatever function the model computes at the moment."""
        logits: Tensor = self.model.language_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.logits_to_keep,
        ).logits
        return logits

    def _partials(self, prepared: _Prepared) -> list[Tensor]:
        partials = []
        for batch, reference in zip(prepared.batches, prepared.references, strict=True):
            if isinstance(batch, ForwardBatch):
                output = self.forward(batch)
            else:
                output = generate_greedily(self.model.language_model, self.model.tokenizer, batch)
            partials.append(prepared.task.score(batch, output, reference))
        if not all(bool(part.isfinite().all()) for part in partials):
            raise NonFiniteLogits(f"task {prepared.task.name}: scores are not finite")
        return partials

    def _prepared(self, split: str, indices: Indices | None) -> tuple[_Prepared, ...]:
        if indices is not None:
            return tuple(self._prepare(task, split, indices.get(task.name)) for task in self.tasks)
        if split not in self._whole:
            self._whole[split] = tuple(self._prepare(task, split, None) for task in self.tasks)
        return self._whole[split]

    def _prepare(self, task: Task, split: str, indices: Sequence[int] | None) -> _Prepared:
        batches = tuple(batch.to(self.model.device) for batch in task.batches(split, indices))
        references = tuple(
            task.reference(batch, self.forward(batch))
            if task.needs_reference and isinstance(batch, ForwardBatch)
            else None
            for batch in batches
        )
        return _Prepared(task, batches, references)

    def _outcome(self, examined: dict[str, TaskScores] | EvaluationFailure, duration_s: float) -> Outcome:
        if isinstance(examined, EvaluationFailure):
            return replace(examined, duration_s=duration_s)
        scores = list(examined.values())
        means = [float(one.score.mean()) for one in scores]
        errors = [_standard_error(one) for one in scores]
        if self._config.fitness == "worst":
            worst = int(np.argmin(means))
            fitness, standard_error = means[worst], errors[worst]
        else:
            fitness = sum(means) / len(means)
            standard_error = math.sqrt(sum(error**2 for error in errors)) / len(errors)
        likelihoods = [0.0 if one.log_likelihood is None else float(one.log_likelihood.mean()) for one in scores]
        return Evaluation(
            fitness=fitness,
            tie_break=sum(likelihoods) / len(likelihoods),
            standard_error=standard_error,
            num_examples=sum(len(one.score) for one in scores),
            duration_s=duration_s,
            metrics={
                f"{name}/{metric}": value for name, one in examined.items() for metric, value in one.metrics.items()
            },
        )


def _standard_error(scores: TaskScores) -> float:
    """Of the mean score over examples; 0 where one example tells nothing of the spread."""
    number = len(scores.score)
    return float(scores.score.std(ddof=1) / math.sqrt(number)) if number > 1 else 0.0


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads of torch, until the block is left."""
    previous = torch.get_num_threads()
    torch.set_num_threads(previous if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
