"""`Observed`: what observing needs of an `Evaluator`, which stands above the criteria and is not imported here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch
from moe_evo.tasks.task import Task

T = TypeVar("T")


class Observed(Protocol):
    """A loaded model and tasks that it can be run on."""

    @property
    def model(self) -> MoEModel: ...

    @property
    def tasks(self) -> Sequence[Task]: ...

    @property
    def batch_tokens(self) -> int: ...

    def forward(self, batch: ForwardBatch) -> Tensor: ...

    def within_memory(self, compute: Callable[[], T]) -> T: ...
