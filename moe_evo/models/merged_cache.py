"""`MergedCache`: merged layers that are kept for the next genomes, within a memory budget.

Siblings share most layers, so the key of a layer is its number and W_EM. Layers of the genome that is applied are not
evicted for each other: a plain LRU cache would evict each layer shortly before it is needed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from torch import Tensor

from moe_evo.genomes.genome import Matrix

MergedKey = tuple[int, bytes]
MergedTensors = dict[str, Tensor]


def merged_key(layer: int, expert_merging: Matrix) -> MergedKey:
    """Key of MoE layer number `layer` merged by `expert_merging` (K, E)."""
    return (layer, expert_merging.tobytes())


class MergedCache:
    """The least recently used layers are evicted first. A layer that does not fit is built at every use."""

    def __init__(self, budget_gib: float) -> None:
        self.budget_bytes = int(budget_gib * 2**30)
        self._entries: OrderedDict[MergedKey, MergedTensors] = OrderedDict()
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

        build: gets evicted tensors of that size to write into, or none, {}.
        """
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        evicted = self._evict_for(size_bytes)
        if evicted is None:
            return build({})
        into: MergedTensors = next((one for one in evicted if _size_bytes(one) == size_bytes), {})
        del evicted  # the others need not stay while what comes is built
        self._entries[key] = build(into)
        return self._entries[key]

    def clear(self) -> None:
        self._entries.clear()

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
            evicted.append(self._entries.pop(key))
            excess -= _size_bytes(evicted[-1])
        return evicted


def _size_bytes(tensors: MergedTensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
