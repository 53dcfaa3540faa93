"""What one rank finds for one genome on one task, before the parts of all ranks are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moe_evo.genomes.population import ACTIVE_EXPERTS
from moe_evo.tasks.base import Batch, TaskScores
from moe_evo.tasks.task import Task


@dataclass
class TaskReport:
    """The results of a genome's batches, and whether all numbers are finite.

    num_active: experts that tokens ran at `num_positions` scored positions, over all MoE layers; 0 of 0 without dynamic
    routing.
    """

    parts: list[tuple[npt.NDArray[np.int64], Tensor]] = field(default_factory=list)
    is_finite: bool = True
    num_active: int = 0
    num_positions: int = 0

    def add(self, batch: Batch, partial: Tensor, is_finite: bool = True) -> None:
        """Add the results (B, anything) of one batch; is_finite: whether the logits behind them were finite."""
        self.is_finite = self.is_finite and is_finite and bool(partial.isfinite().all())
        self.parts.append((batch.examples, partial.cpu()))

    def count(self, active: Tensor | None, positions: Tensor) -> None:
        """Add experts that tokens ran, over all MoE layers, and the scored positions where they did; sums of both."""
        if active is not None:
            self.num_active += int(active.sum())
            self.num_positions += int(positions.sum())


def joined(task: Task, split: str, reports: Sequence[TaskReport], num_layers: int) -> TaskScores:
    """The scores of a task; reports: of every rank and part, all of them finite."""
    scores = task.combine(split, [part for report in reports for part in report.parts])
    num_positions = sum(report.num_positions for report in reports)
    if not num_positions:
        return scores
    mean = sum(report.num_active for report in reports) / (num_positions * num_layers)
    return replace(scores, metrics={**scores.metrics, ACTIVE_EXPERTS: mean})
