"""Merged layers that are kept for the next genomes, under a memory budget.

Siblings share most layers, so a layer is keyed by its number and the rows of W_EM alone. Many of the others differ
in few rows: the cache also tells where rows of a layer stand that is not kept. Layers of the genome that is applied
are never evicted for one another: an LRU would throw out each layer shortly before it is needed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from torch import Tensor

from moe_evo.genomes.genome import Matrix

MergedKey = tuple[int, tuple[bytes, ...]]
MergedTensors = dict[str, Tensor]
KeptRow = tuple[MergedTensors, int]  # the tensors of a layer and the number of a row in them


def merged_key(layer: int, expert_merging: Matrix) -> MergedKey:
    """Key of MoE layer number `layer` merged by `expert_merging` (K, E)."""
    return (layer, tuple(row.tobytes() for row in expert_merging))


class MergedCache:
    """Least recently used layers go first; what does not fit is built anew whenever it is used."""

    def __init__(self, budget_gib: float) -> None:
        self.budget_bytes = int(budget_gib * 2**30)
        self._entries: OrderedDict[MergedKey, MergedTensors] = OrderedDict()
        self._rows: dict[tuple[int, bytes], KeptRow] = {}  # by layer and row: in the newest entry that has it
        self._in_use: frozenset[MergedKey] = frozenset()

    @property
    def size_bytes(self) -> int:
        return sum(_size_bytes(tensors) for tensors in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def use(self, keys: Iterable[MergedKey]) -> None:
        """Name the layers of the genome that is applied now."""
        self._in_use = frozenset(keys)

    def get(self, key: MergedKey, size_bytes: int, build: Callable[[MergedTensors], MergedTensors]) -> MergedTensors:
        """The kept tensors of `key`, or new ones of this size from `build`, which are kept if they fit.

        build: is given tensors of that size which went to make room, to write into, or none.
        """
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        evicted = self._evict_for(size_bytes)
        if evicted is None:
            return build({})
        into: MergedTensors = next((one for one in evicted if _size_bytes(one) == size_bytes), {})
        del evicted  # the others need not stay while what comes is built
        tensors = build(into)
        layer, rows = key
        self._entries[key] = tensors
        self._rows.update(((layer, row), (tensors, slot)) for slot, row in enumerate(rows))
        return tensors

    def known_rows(self, key: MergedKey) -> dict[int, KeptRow]:
        """Rows of `key` that kept layers of the same number have, by their numbers in `key`."""
        layer, rows = key
        return {slot: self._rows[layer, row] for slot, row in enumerate(rows) if (layer, row) in self._rows}

    def clear(self) -> None:
        self._entries.clear()
        self._rows.clear()

    def _evict_for(self, needed_bytes: int) -> list[MergedTensors] | None:
        """Evict what is not in use until so many bytes fit; the evicted tensors, or None where they cannot fit."""
        idle = [key for key in self._entries if key not in self._in_use]
        excess = self.size_bytes + needed_bytes - self.budget_bytes
        evictable = sum(_size_bytes(self._entries[key]) for key in idle)
        if excess > evictable:
            return None
        evicted: list[MergedTensors] = []
        for key in idle:
            if excess <= 0:
                break
            evicted.append(self._evict(key))
            excess -= _size_bytes(evicted[-1])
        return evicted

    def _evict(self, key: MergedKey) -> MergedTensors:
        tensors = self._entries.pop(key)
        layer, rows = key
        for row in rows:
            kept = self._rows.get((layer, row))
            if kept is not None and kept[0] is tensors:  # else a newer entry has, or had, the row too
                del self._rows[layer, row]
        return tensors


def _size_bytes(tensors: MergedTensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
