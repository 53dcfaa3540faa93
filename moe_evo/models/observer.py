"""Counting where tokens are routed, from the indices that the model itself uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


class RoutingCounts:
    """Tokens routed to each expert of each MoE layer.

    times: (P, T), how often each token of the batch that runs next counts; None counts all tokens once.
    With a KV cache the last columns are those of the new tokens.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self.times: Tensor | None = None
        self._counts = [torch.zeros(number, dtype=torch.float64) for number in num_experts]

    @property
    def layers(self) -> tuple[npt.NDArray[np.float64], ...]:
        """(E,) counts, one array a MoE layer."""
        return tuple(counts.numpy(force=True).copy() for counts in self._counts)

    def add(self, layer: int, index: Tensor) -> None:
        """Count a router's choice; index: (T, top_k) with T = B * new tokens."""
        times = torch.ones(index.shape[0], device=index.device)
        if self.times is not None:
            rows = self.times.shape[0]
            assert index.shape[0] % rows == 0, (tuple(index.shape), tuple(self.times.shape))
            new_tokens = index.shape[0] // rows
            assert new_tokens <= self.times.shape[1], (tuple(index.shape), tuple(self.times.shape))
            times = self.times[:, -new_tokens:].reshape(-1).to(index.device)
        counts = self._counts[layer]
        weights = times.double()[:, None].expand_as(index).reshape(-1).cpu()
        counts += torch.bincount(index.reshape(-1).cpu(), weights, minlength=len(counts))


@contextmanager
def observed(routers: Sequence[nn.Module], counts: RoutingCounts) -> Iterator[None]:
    """Count in `counts` what `routers` choose, until the block is left."""

    def hook(layer: int) -> Callable[..., None]:
        def count(_router: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
            counts.add(layer, output[2])

        return count

    handles = [router.register_forward_hook(hook(layer)) for layer, router in enumerate(routers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
