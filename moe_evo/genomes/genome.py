"""Genomes: which experts each MoE layer keeps, how the rest are merged in, how the router is remapped.

`LayerGenome` holds one layer's two matrices, `Genome` one `LayerGenome` a MoE layer. Both are frozen
values on the host; nothing here knows torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moe_evo.errors import GenomeError

Matrix = npt.NDArray[np.float32]


def _frozen_matrix(name: str, values: npt.ArrayLike) -> Matrix:
    matrix = np.array(values, dtype=np.float32) + np.float32(0)  # + 0 turns -0.0 into 0.0
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise GenomeError(f"{name}: got shape {matrix.shape}, expected (num_kept, num_experts)")
    if not np.isfinite(matrix).all():
        raise GenomeError(f"{name}: holds NaN or infinity, expected finite numbers")
    if matrix.shape[0] > matrix.shape[1]:
        raise GenomeError(f"{name}: keeps {matrix.shape[0]} experts of {matrix.shape[1]}, expected at most all")
    matrix.setflags(write=False)
    return matrix


def _kept_of_one_hot(matrix: Matrix) -> tuple[int, ...] | None:
    """The column of each row's single 1, or None where a row is not one-hot or two rows agree."""
    one_hot = ((matrix == 0) | (matrix == 1)).all() and (matrix.sum(axis=1) == 1).all()
    if not one_hot:
        return None
    kept = tuple(int(column) for column in matrix.argmax(axis=1))
    return kept if len(set(kept)) == len(kept) else None


@dataclass(frozen=True, eq=False)
class LayerGenome:
    """One MoE layer: K kept slots made of E experts.

    expert_merging: W_EM (K, E); slot i computes with sum_j W_EM[i, j] * theta_j (EEP eq. 6).
    router_mapping: W_RM (K, E); how the router's E outputs become K (EEP eq. 5).
    top_k: experts active a token, 1 <= top_k <= K.
    is_pruning: every slot is one unchanged expert with its own router output.

    The rows of a pruning are put in ascending order of the kept expert, so that
    a pruning is the same value whatever the order in which its experts were named.
    """

    expert_merging: Matrix
    router_mapping: Matrix
    top_k: int
    is_pruning: bool = field(init=False)

    def __post_init__(self) -> None:
        merging = _frozen_matrix("expert_merging", self.expert_merging)
        is_tied = self.router_mapping is self.expert_merging  # as in every pruning: one matrix is enough
        mapping = merging if is_tied else _frozen_matrix("router_mapping", self.router_mapping)
        if merging.shape != mapping.shape:
            raise GenomeError(f"router_mapping: got shape {mapping.shape}, expected {merging.shape} as expert_merging")
        if not 1 <= self.top_k <= merging.shape[0]:
            raise GenomeError(
                f"top_k: got {self.top_k} with {merging.shape[0]} experts kept, expected 1 to "
                f"{merging.shape[0]}; keep more experts or lower top_k"
            )
        kept = _kept_of_one_hot(merging)
        is_pruning = kept is not None and (is_tied or np.array_equal(merging, mapping))
        if kept is not None and is_pruning and list(kept) != sorted(kept):
            merging = mapping = _frozen_matrix("expert_merging", merging[np.argsort(kept)])
        object.__setattr__(self, "is_pruning", is_pruning)
        object.__setattr__(self, "expert_merging", merging)
        object.__setattr__(self, "router_mapping", mapping)
        object.__setattr__(self, "top_k", int(self.top_k))

    @classmethod
    def from_kept(cls, kept: Iterable[int], num_experts: int, top_k: int) -> LayerGenome:
        """The pruning that keeps the experts `kept` unchanged."""
        experts = sorted(int(expert) for expert in kept)
        if not experts or experts[0] < 0 or experts[-1] >= num_experts:
            raise GenomeError(f"kept: got {experts}, expected experts 0 to {num_experts - 1}")
        if len(set(experts)) != len(experts):
            raise GenomeError(f"kept: got {experts}, expected each expert at most once")
        one_hot = np.eye(num_experts, dtype=np.float32)[experts]
        return cls(one_hot, one_hot, top_k)

    @property
    def num_kept(self) -> int:
        return int(self.expert_merging.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.expert_merging.shape[1])

    @property
    def is_identity(self) -> bool:
        """True where nothing is pruned, merged or remapped (`top_k` may still differ)."""
        return self.is_pruning and self.num_kept == self.num_experts

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The expert with the largest |W_EM| of each slot: for a pruning, the kept experts."""
        return tuple(int(expert) for expert in np.abs(self.expert_merging).argmax(axis=1))

    @property
    def members(self) -> list[list[int]]:
        """The experts that each slot is made of, by their shares: the largest |W_EM| first."""
        weights = np.abs(self.expert_merging)
        return [[int(one) for one in np.argsort(-row, kind="stable") if row[one]] for row in weights]

    @cached_property
    def digest(self) -> str:
        """Hash of shape, matrices and top_k; equal for equal values, stable across processes."""
        content = hashlib.sha256(f"{self.expert_merging.shape}:{self.top_k}:".encode())
        content.update(self.expert_merging.astype("<f4").tobytes())
        content.update(self.router_mapping.astype("<f4").tobytes())
        return content.hexdigest()[:32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerGenome) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[object, tuple[dict[str, object]]]:
        return (_refrozen, (self.__dict__,))  # with the digest, where it is known: a genome travels often


def _refrozen(state: dict[str, object]) -> LayerGenome:
    """A layer as it was before it was pickled; numpy forgets that an array was frozen."""
    layer = object.__new__(LayerGenome)
    layer.__dict__.update(state)
    layer.expert_merging.setflags(write=False)
    layer.router_mapping.setflags(write=False)
    return layer


@dataclass(frozen=True)
class Genome:
    """One `LayerGenome` for each MoE layer of a model, in the model's order."""

    layers: tuple[LayerGenome, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise GenomeError("genome: has no layers, expected one for each MoE layer")

    @classmethod
    def from_kept(
        cls, kept: Sequence[Iterable[int]], num_experts: int | Sequence[int], top_k: int | Sequence[int]
    ) -> Genome:
        """The pruning that keeps `kept[layer]`; numbers that hold for all layers may be given once."""
        experts = [num_experts] * len(kept) if isinstance(num_experts, int) else list(num_experts)
        active = [top_k] * len(kept) if isinstance(top_k, int) else list(top_k)
        if not len(kept) == len(experts) == len(active):
            raise GenomeError(
                f"kept: got {len(kept)} layers, {len(experts)} num_experts and {len(active)} top_k, "
                "expected one of each a MoE layer"
            )
        return cls(tuple(map(LayerGenome.from_kept, kept, experts, active)))

    @property
    def is_pruning(self) -> bool:
        return all(layer.is_pruning for layer in self.layers)

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """The dominant expert of each slot, layer by layer."""
        return tuple(layer.kept for layer in self.layers)

    @property
    def num_kept(self) -> tuple[int, ...]:
        return tuple(layer.num_kept for layer in self.layers)

    @property
    def top_k(self) -> tuple[int, ...]:
        return tuple(layer.top_k for layer in self.layers)

    @cached_property
    def digest(self) -> str:
        """Hash of the layers' digests in order."""
        return hashlib.sha256(":".join(layer.digest for layer in self.layers).encode()).hexdigest()[:32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Genome) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)
