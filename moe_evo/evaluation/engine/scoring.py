"""The logits of the scored tokens, and how many experts these ran, as the purpose of a traversal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from moe_evo.evaluation.engine.stages import Stages
from moe_evo.evaluation.engine.states import FirstGenes, State
from moe_evo.evaluation.engine.traversal import Node
from moe_evo.models.forward.key_values import KeyValues, PastKeyValues
from moe_evo.models.forward.layer_halves import EmbeddedBatch
from moe_evo.tasks.base import ForwardBatch


class Scored(NamedTuple):
    """What one genome makes of a batch.

    logits: (M, V). active: (M,) how many experts each of these tokens ran, all MoE layers together; None without
    dynamic routing.
    """

    logits: Tensor
    active: Tensor | None


class Scoring:
    """Each genome gets what is `Scored`. It takes nothing along but the residual stream."""

    def __init__(self, stages: Stages, batch: ForwardBatch) -> None:
        self._layer_halves, self._states = stages.layer_halves, stages.states
        self._batch = batch

    @property
    def num_blocks(self) -> int:
        return self._layer_halves.num_stages

    def lengths(self, genes: FirstGenes) -> Sequence[int]:
        return [self._states.longest(self._batch, genes)]

    @property
    def nothing(self) -> None:
        return None

    def carry(self, before: None, prefix_state: State | None, read: tuple[KeyValues, ...]) -> None:
        return None

    def attend(
        self, stage: int, hidden: Tensor, embedded: EmbeddedBatch, before: Sequence[KeyValues], copies: int
    ) -> tuple[Tensor, list[tuple[KeyValues, ...]]]:
        hidden = self._layer_halves.attend(stage, hidden, embedded, PastKeyValues(before) if before else None)
        return hidden, [() for _ in range(copies)]

    def result(self, node: Node[None]) -> Scored:
        return Scored(self._layer_halves.finish(node.residual[0]), None if node.active is None else node.active[0])
