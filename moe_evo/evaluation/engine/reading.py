"""What decoder layers read of prompts, as the purpose of a traversal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from moe_evo.evaluation.engine.stages import Stages
from moe_evo.evaluation.engine.states import FirstGenes, State
from moe_evo.evaluation.engine.traversal import Node
from moe_evo.models.forward.key_values import KeyValues, PastKeyValues, joined
from moe_evo.models.forward.layer_halves import Start
from moe_evo.tasks.base import ForwardBatch

Steps = tuple[tuple[State | None, tuple[KeyValues, ...]], ...]
"""For each step between MoE blocks, from the first on: the shared prefix's state and what was read of the batch."""


class Reading:
    """Each genome gets the keys and values of all its decoder layers, (P, heads, C + T, size) each."""

    def __init__(self, stages: Stages, batch: ForwardBatch) -> None:
        self._layer_halves, self._states = stages.layer_halves, stages.states
        self._batch = batch

    @property
    def num_blocks(self) -> int:
        """Behind a last block that is the end of all layers nothing is read."""
        return self._layer_halves.num_stages - self._layer_halves.ends_with_moe

    def lengths(self, genes: FirstGenes) -> Sequence[int]:
        return range(self._states.unbroken(self._batch, genes) + 1)

    @property
    def nothing(self) -> Steps:
        return ()

    def carry(self, before: Steps, prefix_state: State | None, read: tuple[KeyValues, ...]) -> Steps:
        return (*before, (prefix_state, read))

    def attend(
        self, stage: int, hidden: Tensor, start: Start, before: Sequence[KeyValues], copies: int
    ) -> tuple[Tensor, list[tuple[KeyValues, ...]]]:
        past = PastKeyValues(before)
        hidden = self._layer_halves.attend(stage, hidden, start, past)
        layers = [zip(keys.chunk(copies), values.chunk(copies), strict=True) for keys, values in past.read]
        return hidden, list(zip(*layers, strict=True))

    def result(self, node: Node[Steps]) -> tuple[KeyValues, ...]:
        return tuple(layer for step in node.carried for layer in _joined(*step))


def _joined(prefix_state: State | None, read: tuple[KeyValues, ...]) -> Iterator[KeyValues]:
    """What some layers read of the shared prefix and of the batch behind it."""
    return iter(read) if prefix_state is None else map(joined, prefix_state.read, read)
