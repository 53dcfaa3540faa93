"""`PreparedBatches`: the batches of every split on the model's device, made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from moe_evo.evaluation.racing import PARTS, parts_of
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import Batch, ForwardBatch
from moe_evo.tasks.rank_share import rank_share
from moe_evo.tasks.samples import Sample
from moe_evo.tasks.task import Task

Indices = Mapping[str, Sequence[int]]
"""Example numbers by task name; a task that is not named is used whole."""

_LATEST_SAMPLES = 3


@dataclass(frozen=True)
class Prepared:
    """One task's batches of one split on the model's device, each with its reference where the task needs one.

    num_counted: the first `num_counted` batches are scored; the others repeat one, so that all ranks run equally many.
    """

    task: Task
    split: str
    batches: tuple[Batch, ...]
    references: tuple[Tensor | None, ...]
    num_counted: int

    def score(self, batch: Batch, output: Tensor, reference: Tensor | None = None) -> Tensor:
        """See `Task.score`."""
        return self.task.score(self.split, batch, output, reference)


class PreparedBatches:
    """This rank's batches of all tasks. They are kept, those of a sample until a few later ones were asked for.

    forward: logits of a batch, for references. races: examples of the search split come in parts. shared_prefixes:
    whether batches may have one.
    """

    def __init__(
        self,
        model: MoEModel,
        tasks: Sequence[Task],
        forward: Callable[[ForwardBatch], Tensor],
        *,
        races: bool,
        shared_prefixes: bool,
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._forward = forward
        self._races = races
        self._shared_prefixes = shared_prefixes
        self._kept: dict[str, tuple[tuple[Prepared, ...], ...]] = {}

    def num_parts(self, split: str, indices: Indices | None) -> int:
        """The number of parts in which examples are scored: more than one where individuals race."""
        return len(PARTS) if self._races and split == "search" and indices is None else 1

    def of(self, split: str, indices: Indices | None, batch_tokens: int) -> tuple[tuple[Prepared, ...], ...]:
        """Every task's batches of a split or sample, part by part. batch_tokens: most tokens of a batch."""
        if indices is not None:
            chosen = (self._prepare(task, split, indices.get(task.name), batch_tokens) for task in self._tasks)
            return (tuple(chosen),)
        if split not in self._kept:
            if Sample.read(split) is not None:
                self._forget_samples()
            is_whole = self.num_parts(split, indices) == 1
            of_tasks = [[None] if is_whole else parts_of(task.num_examples(split)) for task in self._tasks]
            self._kept[split] = tuple(
                tuple(
                    self._prepare(task, split, numbers, batch_tokens)
                    for task, numbers in zip(self._tasks, part, strict=True)
                )
                for part in zip(*of_tasks, strict=True)
            )
        return self._kept[split]

    def forget(self) -> None:
        """Drop all batches with their references, as batches are to be smaller."""
        self._kept.clear()

    def _forget_samples(self) -> None:
        """Drop the batches of all samples but the latest few, which other genomes may still be scored on."""
        samples = [name for name in self._kept if Sample.read(name) is not None]
        for name in samples[: len(samples) - _LATEST_SAMPLES + 1]:
            del self._kept[name]

    def _prepare(self, task: Task, split: str, indices: Sequence[int] | None, batch_tokens: int) -> Prepared:
        ranks = self._model.example_ranks
        make = partial(
            task.batches,
            split,
            batch_tokens=batch_tokens,
            trees=self._model.reads_trees,
            shared_prefixes=self._shared_prefixes,
        )
        share = rank_share(ranks.rank, ranks.size, task.numbers(split, indices), make)
        batches = tuple(batch.to(self._model.device) for batch in share.batches)
        references = tuple(
            task.reference(batch, self._forward(batch))
            if task.needs_reference and isinstance(batch, ForwardBatch)
            else None
            for batch in batches
        )
        return Prepared(task, split, batches, references, share.num_counted)
