"""Keys and values that attention read, kept so that later tokens are read without the earlier ones.

What they hold is a matter of the family: some keep a latent of both. Everything here relies on the token
being the third dimension, as caches of transformers do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache

KeyValues = tuple[Tensor, Tensor]
"""Of one decoder layer: keys (P, heads, T, size) and values, likewise."""


@dataclass(frozen=True)
class CacheNames:
    """The keywords for a cache, which releases of transformers have renamed.

    of_layers: under which the model hands one to its decoder layers. of_model: under which it takes and gives one.
    """

    of_layers: str
    of_model: str


class PastKeyValues:
    """Stands in for a cache of transformers, for some successive decoder layers.

    before: what earlier tokens left in each of them, which is put in front. read: what the new tokens left, as
    far as layers have attended.
    """

    def __init__(self, before: Iterable[KeyValues] = ()) -> None:
        self._before = list(before)
        self.read: list[KeyValues] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValues:
        """Called by attention with what it has read of the new tokens; the answer is what it sees."""
        self.read.append((keys, values))
        return joined(self._before[len(self.read) - 1], (keys, values)) if self._before else (keys, values)


def joined(before: KeyValues, after: KeyValues) -> KeyValues:
    """One layer's keys and values of successive tokens; earlier ones of a single row (1, ...) are for all rows."""
    keys, values = (
        torch.cat([one.expand(len(other), -1, -1, -1), other], dim=2) for one, other in zip(before, after, strict=True)
    )
    return keys, values


def beside_each_other(of_genomes: Iterable[Sequence[KeyValues]], rows: int) -> list[KeyValues]:
    """For each layer what several genomes left, (N * rows, heads, T, size); single rows are for all `rows`."""
    layers = [list(zip(*layer, strict=True)) for layer in zip(*of_genomes, strict=True)]
    return [(_together(keys, rows), _together(values, rows)) for keys, values in layers]


def _together(parts: Sequence[Tensor], rows: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.expand(rows, -1, -1, -1) for part in parts])


def padded_on_the_left(layer: KeyValues, pads: Tensor) -> KeyValues:
    """One layer's rows (P, heads, T, size) that end with pads (P,) tokens of padding, with these in front."""
    if not bool(pads.any()):
        return layer
    keys, values = layer
    length = keys.shape[2]
    order = ((torch.arange(length, device=pads.device) - pads[:, None]) % length)[:, None, :, None]
    return keys.take_along_dim(order, 2), values.take_along_dim(order, 2)


def cache_of(config: Any, layers: Iterable[KeyValues], length: int) -> Cache:
    """A cache for stock `generate` that has read these tokens and has room for `length` of them in all."""
    cache = StaticCache(config=config, max_cache_len=length)
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache
