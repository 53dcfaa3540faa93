"""Keys and values of earlier tokens, kept so that later tokens can be computed without them.

Families keep different things: some a latent of both. All that is assumed here, as in transformers' own caches, is that
the third dimension is the token.
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
    """The keywords for a cache, which differ between releases of transformers.

    of_layers: the keyword of the decoder layers. of_model: that of the model, and of its output.
    """

    of_layers: str
    of_model: str


class PastKeyValues:
    """Replaces a cache of transformers for some successive decoder layers.

    before: keys and values of earlier tokens, for each of these layers. read: those of the new tokens, for each layer
    that has run.
    """

    def __init__(self, before: Iterable[KeyValues] = ()) -> None:
        self._before = list(before)
        self.read: list[KeyValues] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValues:
        """Called by attention with the new tokens' keys and values; returns those that it attends to."""
        self.read.append((keys, values))
        return concatenated(self._before[len(self.read) - 1], (keys, values)) if self._before else (keys, values)


def concatenated(before: KeyValues, after: KeyValues) -> KeyValues:
    """One layer's keys and values of earlier and later tokens, concatenated; a single earlier row serves all rows."""
    keys, values = (
        torch.cat([one.expand(len(other), -1, -1, -1), other], dim=2) for one, other in zip(before, after, strict=True)
    )
    return keys, values


def stacked_genomes(of_genomes: Iterable[Sequence[KeyValues]], rows: int) -> list[KeyValues]:
    """For each layer the keys and values of several genomes as rows (N * rows, heads, T, size).

    A genome with a single row has the same for all `rows`.
    """
    layers = [list(zip(*layer, strict=True)) for layer in zip(*of_genomes, strict=True)]
    return [(_together(keys, rows), _together(values, rows)) for keys, values in layers]


def _together(parts: Sequence[Tensor], rows: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.expand(rows, -1, -1, -1) for part in parts])


def padded_on_the_left(layer: KeyValues, pads: Tensor) -> KeyValues:
    """Move padding to the front: rows (P, heads, T, size) of one layer end with `pads` (P,) tokens of it."""
    if not bool(pads.any()):
        return layer
    keys, values = layer
    length = keys.shape[2]
    order = ((torch.arange(length, device=pads.device) - pads[:, None]) % length)[:, None, :, None]
    return keys.take_along_dim(order, 2), values.take_along_dim(order, 2)


def cache_of(config: Any, layers: Iterable[KeyValues], length: int) -> Cache:
    """A cache for stock `generate` that holds these tokens, with space for `length` in all.

    Raises RuntimeError where the library's cache takes other arguments: Python puts that TypeError into our frame.
    """
    held = list(layers)
    try:
        cache = StaticCache(config=config, max_cache_len=length)
        for number, (keys, values) in enumerate(held):
            cache.update(keys, values, number)
    except (TypeError, AttributeError) as error:
        raise RuntimeError(f"transformers' StaticCache: {error}") from error
    return cache
