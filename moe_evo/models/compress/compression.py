"""Compress the experts of a loaded model, one matrix after the other.

The result has dense matrices of the old shapes, because no stock architecture holds sparse or factored experts. What it
would take in a format that holds them is counted, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moe_evo.models.experts.matrices import expert_matrices
from moe_evo.models.layer import MoELayer
from moe_evo.models.view import MoEModel

Stacked = dict[str, Tensor]
"""The experts' tensors of one layer, each (E, ...), by name."""


class Compression(Protocol):
    """What is done to one matrix (out, in); `RouterWeightedPruning` and `LowRankPlusColumns`."""

    @property
    def needs_norms(self) -> bool: ...

    @property
    def description(self) -> str: ...

    @property
    def needs(self) -> str: ...

    def compressed(self, weight: Tensor, norms: Tensor | None) -> Tensor: ...

    def packed_bytes(self, compressed: Tensor) -> dict[str, int]: ...


@dataclass(frozen=True, eq=False)
class InputNorms:
    """Of one MoE layer: ||X_j g||_2 of each channel j over the tokens that are routed to an expert; float64.

    tokens: (E,) how many these are. hidden: (E, H), of what enters gate and up. inner: (E, I), of what
    enters down.
    """

    tokens: Tensor
    hidden: Tensor
    inner: Tensor

    def of(self, matrix: str) -> Tensor:
        return self.inner if matrix == "down" else self.hidden


@dataclass(frozen=True)
class LayerChange:
    """How far one MoE layer's matrices are from what they were, the mean over experts, gate, up and down.

    relative_error: ||W' - W||_F / ||W||_F. weighted_error: the same with every input channel times
    ||X_j g||_2, over experts that some token reached; None without norms. num_idle: experts that none did.
    """

    relative_error: float
    weighted_error: float | None
    num_idle: int


@dataclass
class ExpertSize:
    """Of gate, up and down of all experts, without biases; packed_bytes by the way of storing them."""

    num_weights: int = 0
    num_nonzero: int = 0
    dense_bytes: int = 0
    packed_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, matrix: Tensor, packed_bytes: Mapping[str, int]) -> None:
        self.num_weights += matrix.numel()
        self.num_nonzero += int(matrix.count_nonzero())
        self.dense_bytes += matrix.numel() * matrix.element_size()
        for way, size in packed_bytes.items():
            self.packed_bytes[way] = self.packed_bytes.get(way, 0) + size


@dataclass(frozen=True, eq=False)
class CompressedExperts:
    """layers: the tensors of every MoE layer, of the old shapes and dtype; changes: how far they moved."""

    layers: tuple[Stacked, ...]
    changes: tuple[LayerChange, ...]
    size: ExpertSize


def compressed_experts(
    moe: MoEModel,
    compression: Compression,
    norms: Sequence[InputNorms] | None,
    done: Callable[[int, LayerChange], None] = lambda *_: None,
) -> CompressedExperts:
    """What `compression` makes of every expert; the model is left as it is, biases stay.

    norms: one a MoE layer, for a compression that needs them. done: called with the number of each
    finished layer. Takes the memory of all experts once more.
    """
    assert not compression.needs_norms or norms is not None
    size = ExpertSize()
    layers, changes = [], []
    with torch.no_grad():
        for layer in moe.layers:
            stacked, change = _compressed_layer(
                layer, compression, None if norms is None else norms[layer.number], size
            )
            layers.append(stacked)
            changes.append(change)
            done(layer.number, change)
    return CompressedExperts(tuple(layers), tuple(changes), size)


def _compressed_layer(
    layer: MoELayer, compression: Compression, norms: InputNorms | None, size: ExpertSize
) -> tuple[Stacked, LayerChange]:
    stacked = {name: tensor.detach().clone() for name, tensor in layer.expert_tensors().items()}
    relative, weighted = [], []
    for name, matrices in expert_matrices(layer.experts, stacked).items():
        for expert, matrix in enumerate(matrices):
            of_expert = None if norms is None else norms.of(name)[expert].to(matrix.device)
            new = compression.compressed(matrix, of_expert)
            relative.append(relative_error(new, matrix))
            if of_expert is not None and of_expert.any():
                weighted.append(relative_error(new, matrix, of_expert))
            matrix.copy_(new)
            size.add(new, compression.packed_bytes(new))
    change = LayerChange(
        relative_error=sum(relative) / len(relative),
        weighted_error=sum(weighted) / len(weighted) if weighted else None,
        num_idle=0 if norms is None else int((norms.tokens == 0).sum()),
    )
    return stacked, change


def relative_error(new: Tensor, old: Tensor, norms: Tensor | None = None) -> float:
    """||(new - old) D||_F / ||old D||_F for matrices (out, in), D the diagonal of norms (in,); 0 for zeros."""
    factors = 1.0 if norms is None else norms.double()
    difference = torch.linalg.vector_norm((new.double() - old.double()) * factors)
    whole = torch.linalg.vector_norm(old.double() * factors)
    return float(difference / whole) if whole else 0.0


@contextmanager
def experts_replaced(moe: MoEModel, layers: Sequence[Stacked]) -> Iterator[None]:
    """Replace the experts' tensors by these until the block is left."""
    previous = [{name: tensor.data for name, tensor in layer.expert_tensors().items()} for layer in moe.layers]
    try:
        _put(moe, layers)
        yield
    finally:
        _put(moe, previous)


def _put(moe: MoEModel, layers: Sequence[Stacked]) -> None:
    for layer, stacked in zip(moe.layers, layers, strict=True):
        for name, tensor in layer.expert_tensors().items():
            tensor.data = stacked[name]
