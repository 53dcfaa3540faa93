"""The logits of the scored tokens, as the purpose of a traversal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moe_evo.evaluation.engine.stages import Stages
from moe_evo.evaluation.engine.states import FirstGenes, State
from moe_evo.evaluation.engine.traversal import Node
from moe_evo.models.forward.key_values import KeyValues, PastKeyValues
from moe_evo.models.forward.layer_halves import Start
from moe_evo.tasks.base import ForwardBatch


class Scoring:
    """Each genome gets logits (M, V). It takes nothing along but the residual stream."""

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
        self, stage: int, hidden: Tensor, start: Start, before: Sequence[KeyValues], copies: int
    ) -> tuple[Tensor, list[tuple[KeyValues, ...]]]:
        hidden = self._layer_halves.attend(stage, hidden, start, PastKeyValues(before) if before else None)
        return hidden, [() for _ in range(copies)]

    def result(self, node: Node[None]) -> Tensor:
        return self._layer_halves.finish(node.residual[0])
