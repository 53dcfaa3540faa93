"""`StateCache`: hidden states of recent genomes, so that a child is computed only from where it differs.

A state depends on a batch and on the genes of the MoE blocks before it. Every genome with the same first genes can
use it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_evo.models.forward.key_values import KeyValues

FirstGenes = tuple[Hashable, ...]
"""Digests of the genes of the first MoE blocks."""


@dataclass(frozen=True, eq=False)
class State:
    """The residual stream (P, T, H) at the input of one MoE block.

    read: keys and values of the decoder layers since the previous MoE block; () where no later token needs them.
    active: how many experts each token ran in the MoE blocks before, (P, T); None without dynamic routing.
    """

    residual: Tensor
    read: tuple[KeyValues, ...] = ()
    active: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def to(self, device: torch.device) -> State:
        """A copy on `device`, without copying tensors that are there already."""
        read = tuple((keys.to(device), values.to(device)) for keys, values in self.read)
        return State(self.residual.to(device), read, None if self.active is None else self.active.to(device))

    def compact(self) -> State:
        """Tensors with memory of their own: a view would keep the whole tensor that it is a part of alive."""
        read = tuple((_compact(keys), _compact(values)) for keys, values in self.read)
        return State(_compact(self.residual), read, None if self.active is None else _compact(self.active))

    def _tensors(self) -> Iterator[Tensor]:
        yield self.residual
        for layer in self.read:
            yield from layer
        if self.active is not None:
            yield self.active


class StateCache:
    """States by batch and first genes, at most `budget_gib` of them; the least recently used is dropped first.

    device: where they are kept.
    """

    def __init__(self, budget_gib: float, device: torch.device) -> None:
        self.budget_bytes = int(budget_gib * 2**30)
        self.size_bytes = 0
        self._device = device
        self._entries: OrderedDict[tuple[Any, FirstGenes], State] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, batch: Any, genes: FirstGenes) -> int:
        """The largest number of first genes for which a state is kept; 0 where there is none."""
        lengths = range(len(genes) - 1, 0, -1)  # after the last MoE block nothing is left to share
        return next((length for length in lengths if (batch, genes[:length]) in self._entries), 0)

    def unbroken(self, batch: Any, genes: FirstGenes) -> int:
        """The largest n for which the states of 0, 1, ..., n first genes are all kept; 0 where there are none."""
        lengths = range(len(genes))
        missing = next((length for length in lengths if (batch, genes[:length]) not in self._entries), len(genes))
        return max(missing - 1, 0)

    def get(self, batch: Any, first_genes: FirstGenes) -> State | None:
        """The state, or None where it is not kept."""
        key = (batch, first_genes)
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def keep(self, batch: Any, first_genes: FirstGenes, state: State) -> None:
        """Keep a state and drop the least recently used ones for it; nothing where it exceeds the whole budget."""
        size = state.size_bytes
        key = (batch, first_genes)
        if size > self.budget_bytes or key in self._entries:
            return
        while self.size_bytes + size > self.budget_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.size_bytes -= dropped.size_bytes
        self._entries[key] = state.compact().to(self._device)
        self.size_bytes += size

    def clear(self) -> None:
        self._entries.clear()
        self.size_bytes = 0


def _compact(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
