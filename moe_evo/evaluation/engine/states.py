"""Hidden states of recent genomes, kept so that their children start where they differ.

A state depends on a batch and on the genes of the blocks before, so it serves every genome that begins with
the same genes.
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
"""The genes of the first MoE blocks."""


@dataclass(frozen=True, eq=False)
class State:
    """In front of one MoE block: the residual stream (P, T, H).

    read: keys and values of the decoder layers since the block before, where later tokens need them.
    """

    residual: Tensor
    read: tuple[KeyValues, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def to(self, device: torch.device) -> State:
        """On `device`; itself where it is there."""
        return State(
            self.residual.to(device), tuple((keys.to(device), values.to(device)) for keys, values in self.read)
        )

    def compact(self) -> State:
        """Without hold on more memory than its own: a view keeps all that was computed with it."""
        read = tuple((_compact(keys), _compact(values)) for keys, values in self.read)
        return State(_compact(self.residual), read)

    def _tensors(self) -> Iterator[Tensor]:
        yield self.residual
        for layer in self.read:
            yield from layer


class StateCache:
    """Least recently used states go first; device: where they are kept."""

    def __init__(self, budget_gib: float, device: torch.device) -> None:
        self.budget_bytes = int(budget_gib * 2**30)
        self.size_bytes = 0
        self._device = device
        self._entries: OrderedDict[tuple[Any, FirstGenes], State] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, batch: Any, genes: FirstGenes) -> int:
        """Of how many first genes a state is kept, at most; 0 also where there is none at all."""
        lengths = range(len(genes) - 1, 0, -1)  # behind the last block nothing is left to share
        return next((length for length in lengths if (batch, genes[:length]) in self._entries), 0)

    def unbroken(self, batch: Any, genes: FirstGenes) -> int:
        """Up to how many first genes all states are kept; 0 also where there is none at all."""
        lengths = range(len(genes))
        missing = next((length for length in lengths if (batch, genes[:length]) not in self._entries), len(genes))
        return max(missing - 1, 0)

    def get(self, batch: Any, first_genes: FirstGenes) -> State | None:
        """A kept state, where it is kept."""
        key = (batch, first_genes)
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def keep(self, batch: Any, first_genes: FirstGenes, state: State) -> None:
        """Keep a state, unless it is larger than the whole budget."""
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
