"""Pruning by frequency of use: keep the experts that the task's prompts are most often routed to.

The counts are the router's own choices on the full model (#A_j, as REAP's `frequency`); padding never
counts, and every example's prompt counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch
from moe_evo.tasks.share import share_of
from moe_evo.tasks.task import Task

Counts = Sequence[npt.NDArray[np.float64]]
T = TypeVar("T")


class Observed(Protocol):
    """What is needed of an `Evaluator`, which stands above the criteria and is not imported here."""

    @property
    def model(self) -> MoEModel: ...

    @property
    def tasks(self) -> Sequence[Task]: ...

    @property
    def batch_tokens(self) -> int: ...

    def forward(self, batch: ForwardBatch) -> Tensor: ...

    def within_memory(self, compute: Callable[[], T]) -> T: ...


def routing_counts(evaluator: Observed, split: str = "search") -> Counts:
    """Tokens routed to each expert, (E,) a MoE layer, over the prompts of all tasks.

    All ranks of a gang call this together and all get the same. Raises OutOfMemory.
    """
    return evaluator.within_memory(lambda: _counted(evaluator, split))


def _counted(evaluator: Observed, split: str) -> Counts:
    ranks = evaluator.model.share
    with torch.inference_mode(), evaluator.model.observe_routing() as counts:
        for task in evaluator.tasks:
            trees = evaluator.model.reads_trees
            make = partial(task.prompt_batches, split, batch_tokens=evaluator.batch_tokens, trees=trees)
            share = share_of(ranks.rank, ranks.size, task.numbers(split), make)
            for position, batch in enumerate(share.batches):
                placed = batch.to(evaluator.model.device)
                counts.times = placed.counts if position < share.num_counted else torch.zeros_like(placed.counts)
                evaluator.forward(placed)
    of_ranks = ranks.gather(counts.layers)
    return tuple(np.sum(layer, axis=0) for layer in zip(*of_ranks, strict=True))
