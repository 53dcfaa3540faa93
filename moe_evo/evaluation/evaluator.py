"""Genomes in, outcomes out: the one place that runs forward passes to score.

The model stays loaded and genomes are applied to it one after the other; equal genomes are computed
once. Nothing here knows of pools, journals or searches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_evo.config import EvaluationConfig
from moe_evo.evaluation.batch_memory import MEMORY_ERRORS, BatchMemory
from moe_evo.evaluation.generate import generate_greedily
from moe_evo.genome import Genome
from moe_evo.models.view import MoEModel
from moe_evo.population import Evaluation, EvaluationFailure, Outcome
from moe_evo.space import check_fits
from moe_evo.tasks.base import Batch, ForwardBatch, TaskScores
from moe_evo.tasks.share import share_of
from moe_evo.tasks.task import Task

Indices = Mapping[str, Sequence[int]]
"""Example numbers by task name; a task that is not named is used whole."""


T = TypeVar("T")


@dataclass(frozen=True)
class _Prepared:
    """One task's batches on the model's device, each with its reference where the task needs one.

    num_counted: the first so many batches count; others only keep this rank in step with the rest.
    """

    task: Task
    batches: tuple[Batch, ...]
    references: tuple[Tensor | None, ...]
    num_counted: int


@dataclass(frozen=True)
class _Report:
    """What one rank found of one task: the partial results of its batches, and whether all numbers are finite."""

    parts: list[tuple[npt.NDArray[np.int64], Tensor]]
    is_finite: bool


class Evaluator:
    """A loaded model and the tasks that its genomes are scored on.

    Where several ranks hold the model, each has its evaluator, and all make the same calls in the same
    order. All get the same outcomes; an outcome that is a failure leaves them in step.
    """

    def __init__(self, model: MoEModel, tasks: Sequence[Task], config: EvaluationConfig) -> None:
        assert tasks and len({task.name for task in tasks}) == len(tasks), "tasks need distinct names"
        self.model = model
        self.tasks = tuple(tasks)
        self._config = config
        self._whole: dict[str, tuple[_Prepared, ...]] = {}
        self._memory = BatchMemory(config.batch_tokens, model)

    @property
    def batch_tokens(self) -> int:
        """Most tokens of a batch: the config's number, or less where that did not fit in memory."""
        return self._memory.batch_tokens

    def evaluate(self, genomes: Sequence[Genome | None], split: str, indices: Indices | None = None) -> list[Outcome]:
        """One outcome a genome, in order; None is the untouched model.

        Raises GenomeError, before anything is computed, where a genome does not fit the model, and
        OutOfMemory.
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
        own = self.within_memory(lambda: self._reports(genome, split, indices))
        scores = {}
        for task, reports in zip(self.tasks, zip(*self.model.share.gather(own), strict=True), strict=True):
            if not all(report.is_finite for report in reports):
                reason = f"task {task.name}: logits or scores are not finite"
                return EvaluationFailure("non_finite", reason, time.perf_counter() - started)
            scores[task.name] = task.combine(split, [part for report in reports for part in report.parts])
        return scores

    def within_memory(self, compute: Callable[[], T]) -> T:
        """What `compute` returns; where memory runs out, it is called again with half the tokens in a batch.

        Raises OutOfMemory where a batch of one row is too much, or where other ranks wait for this one.
        """
        while True:
            try:
                return compute()
            except MEMORY_ERRORS as error:
                self._memory.lower_after(error)
            # only now, as the error holds on to the tensors of the calls that it went through
            self._whole.clear()  # references, too, are of the old batches
            self._memory.free()

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits (B, n, V) of whatever function the model computes at the moment."""
        self._memory.note(batch)
        logits: Tensor = self.model.language_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.logits_to_keep,
        ).logits
        return logits

    def _reports(self, genome: Genome | None, split: str, indices: Indices | None) -> list[_Report]:
        """One a task. Nothing that goes wrong with a genome ends this early: other ranks go on, too."""
        with torch.inference_mode(), _threads(self._config.threads):
            prepared = self._prepared(split, indices)
            with self.model.applied(genome) if genome is not None else nullcontext():
                return [self._report(one) for one in prepared]

    def _report(self, prepared: _Prepared) -> _Report:
        parts, finite = [], []
        for position, (batch, reference) in enumerate(zip(prepared.batches, prepared.references, strict=True)):
            output, is_finite = self._run(batch)
            if position < prepared.num_counted:
                parts.append((batch.examples, prepared.task.score(batch, output, reference)))
                finite.append(is_finite)
        all_finite = all(finite) and all(bool(partial.isfinite().all()) for _, partial in parts)
        return _Report([(examples, partial.cpu()) for examples, partial in parts], all_finite)

    def _run(self, batch: Batch) -> tuple[Tensor, bool]:
        """The output of a batch, and whether the logits that it was generated from are finite."""
        if isinstance(batch, ForwardBatch):
            return self.forward(batch), True
        self._memory.note(batch)
        return generate_greedily(
            self.model.language_model, self.model.tokenizer, batch, in_lockstep=self.model.ranks.size > 1
        )

    def _prepared(self, split: str, indices: Indices | None) -> tuple[_Prepared, ...]:
        if indices is not None:
            return tuple(self._prepare(task, split, indices.get(task.name)) for task in self.tasks)
        if split not in self._whole:
            self._whole[split] = tuple(self._prepare(task, split, None) for task in self.tasks)
        return self._whole[split]

    def _prepare(self, task: Task, split: str, indices: Sequence[int] | None) -> _Prepared:
        ranks = self.model.share
        make = partial(task.batches, split, batch_tokens=self.batch_tokens)
        share = share_of(ranks.rank, ranks.size, task.numbers(split, indices), make)
        batches = tuple(batch.to(self.model.device) for batch in share.batches)
        references = tuple(
            task.reference(batch, self.forward(batch))
            if task.needs_reference and isinstance(batch, ForwardBatch)
            else None
            for batch in batches
        )
        return _Prepared(task, batches, references, share.num_counted)

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
