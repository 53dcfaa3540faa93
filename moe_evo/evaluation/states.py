"""Hidden states of recent genomes, kept so that their children start where they differ.

A state is the residual stream in front of one MoE block. It depends on a batch and on the genes of the
blocks before, so it serves every genome that begins with the same genes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

Prefix = tuple[Hashable, ...]
"""The genes of the first MoE blocks."""


class StateCache:
    """Least recently used states go first; device: where they are kept."""

    def __init__(self, budget_gib: float, device: torch.device) -> None:
        self.budget_bytes = int(budget_gib * 2**30)
        self.size_bytes = 0
        self._device = device
        self._entries: OrderedDict[tuple[Any, Prefix], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, batch: Any, genes: Prefix) -> int:
        """Of how many first genes a state is kept, at most; 0 also where there is none at all."""
        lengths = range(len(genes) - 1, 0, -1)  # behind the last block nothing is left to share
        return next((length for length in lengths if (batch, genes[:length]) in self._entries), 0)

    def get(self, batch: Any, prefix: Prefix) -> Tensor | None:
        """A kept state, where it is kept."""
        key = (batch, prefix)
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def keep(self, batch: Any, prefix: Prefix, state: Tensor) -> None:
        """Keep a state, unless it is larger than the whole budget."""
        size = state.numel() * state.element_size()
        key = (batch, prefix)
        if size > self.budget_bytes or key in self._entries:
            return
        while self.size_bytes + size > self.budget_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.size_bytes -= dropped.numel() * dropped.element_size()
        # a view would hold on to the states of all that were computed with it
        self._entries[key] = state.to(self._device, copy=state.untyped_storage().nbytes() > size)
        self.size_bytes += size

    def clear(self) -> None:
        self._entries.clear()
        self.size_bytes = 0
