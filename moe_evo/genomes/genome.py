"""Genomes: which experts each MoE layer keeps, how the rest are merged in, how the router is remapped.

`LayerGenome` holds one layer's two matrices, `Genome` one `LayerGenome` a MoE layer. Both are frozen
values on the host; nothing here knows torch. A search holds thousands of genomes, so a `Genome` keeps its layers
packed and makes their matrices when they are asked for.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from moe_evo.errors import GenomeError

Matrix = npt.NDArray[np.float32]

_NUM_UNPACKED = 64  # more than a request has; dense, a merge of 48 layers of 128 experts takes 3 MiB


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
        _check_top_k(self.top_k, merging.shape[0])
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
        return _pruned_layer(_checked_kept(kept, num_experts, top_k), num_experts, top_k)

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

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        if self.is_pruning:
            return (LayerGenome.from_kept, (self.kept, self.num_experts, self.top_k))
        return (LayerGenome, (self.expert_merging, self.router_mapping, self.top_k))

    @cached_property
    def compressed(self) -> bytes:
        """Both matrices in little memory."""
        return zlib.compress(self.expert_merging.tobytes() + self.router_mapping.tobytes(), level=1)


def _check_top_k(top_k: int, num_kept: int) -> None:
    if not 1 <= top_k <= num_kept:
        raise GenomeError(
            f"top_k: got {top_k} with {num_kept} experts kept, expected 1 to {num_kept}; keep more experts or lower "
            "top_k"
        )


def _checked_kept(kept: Iterable[int], num_experts: int, top_k: int) -> list[int]:
    """The kept experts of a layer in ascending order; raises GenomeError where they make no pruning."""
    experts = sorted(int(expert) for expert in kept)
    if not experts or experts[0] < 0 or experts[-1] >= num_experts:
        raise GenomeError(f"kept: got {experts}, expected experts 0 to {num_experts - 1}")
    if len(set(experts)) != len(experts):
        raise GenomeError(f"kept: got {experts}, expected each expert at most once")
    _check_top_k(top_k, len(experts))
    return experts


def _pruned_layer(kept: Sequence[int], num_experts: int, top_k: int) -> LayerGenome:
    """The pruning that keeps experts which are known to be in order."""
    one_hot = np.eye(num_experts, dtype=np.float32)[list(kept)]
    one_hot.setflags(write=False)
    return _known_layer(one_hot, one_hot, top_k, is_pruning=True)


def _known_layer(merging: Matrix, mapping: Matrix, top_k: int, **known: object) -> LayerGenome:
    """A layer of frozen matrices that were checked before."""
    layer = object.__new__(LayerGenome)
    layer.__dict__.update(expert_merging=merging, router_mapping=mapping, top_k=int(top_k), **known)
    return layer


@dataclass(frozen=True, eq=False)
class PackedLayers:
    """The layers of a genome in little memory: two of them are the same only if they are one object.

    num_experts, num_kept, top_k: of each layer. kept: (sum of num_kept,) the expert with the largest |W_EM| of each
    slot, layer by layer. merged: compressed matrices of the layers that do more than prune, by the layer's index.
    """

    num_experts: tuple[int, ...]
    num_kept: tuple[int, ...]
    top_k: tuple[int, ...]
    kept: npt.NDArray[np.unsignedinteger]
    merged: Mapping[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: Sequence[LayerGenome]) -> PackedLayers:
        num_experts, num_kept = tuple(one.num_experts for one in layers), tuple(one.num_kept for one in layers)
        merged = {index: one.compressed for index, one in enumerate(layers) if not one.is_pruning}
        kept = [expert for one in layers for expert in one.kept]
        return cls.of_kept(num_experts, num_kept, tuple(one.top_k for one in layers), kept, merged)

    @classmethod
    def of_kept(
        cls,
        num_experts: tuple[int, ...],
        num_kept: tuple[int, ...],
        top_k: tuple[int, ...],
        kept: npt.ArrayLike,
        merged: Mapping[int, bytes],
    ) -> PackedLayers:
        """Equal numbers of layers are kept once for all genomes, and experts in the smallest type that holds them."""
        smallest = np.uint8 if max(num_experts) <= 256 else np.uint16
        experts: npt.NDArray[np.unsignedinteger] = np.array(kept, dtype=smallest)
        experts.setflags(write=False)
        return cls(_shared(num_experts), _shared(num_kept), _shared(top_k), experts, merged)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (PackedLayers.of_kept, (self.num_experts, self.num_kept, self.top_k, self.kept, dict(self.merged)))

    @property
    def kept_by_layer(self) -> tuple[tuple[int, ...], ...]:
        ends = np.cumsum(self.num_kept)
        return tuple(tuple(part.tolist()) for part in np.split(self.kept, ends[:-1]))

    def unpacked(self) -> tuple[LayerGenome, ...]:
        sizes = zip(self.kept_by_layer, self.num_experts, self.top_k, strict=True)
        return tuple(
            self._merged_layer(index) if index in self.merged else _pruned_layer(*one)
            for index, one in enumerate(sizes)
        )

    def _merged_layer(self, index: int) -> LayerGenome:
        shape = (2, self.num_kept[index], self.num_experts[index])
        content = self.merged[index]
        merging, mapping = np.frombuffer(zlib.decompress(content), dtype=np.float32).reshape(shape)
        return _known_layer(merging, mapping, self.top_k[index], is_pruning=False, compressed=content)


@lru_cache(maxsize=1024)
def _shared(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for all that are equal."""
    return numbers


@lru_cache(maxsize=_NUM_UNPACKED)
def _unpacked(packed: PackedLayers) -> tuple[LayerGenome, ...]:
    return packed.unpacked()


@dataclass(frozen=True, eq=False, init=False)
class Genome:
    """One `LayerGenome` for each MoE layer of a model, in the model's order."""

    packed: PackedLayers = field(repr=False)

    def __init__(self, layers: Iterable[LayerGenome]) -> None:
        found = tuple(layers)
        if not found:
            raise GenomeError("genome: has no layers, expected one for each MoE layer")
        object.__setattr__(self, "packed", PackedLayers.of(found))

    @classmethod
    def of_packed(cls, packed: PackedLayers, digest: str | None = None) -> Genome:
        """A genome whose layers were packed before. digest: where it is known, as it takes long to compute."""
        genome = object.__new__(cls)
        genome.__dict__["packed"] = packed
        if digest is not None:
            genome.__dict__["digest"] = digest
        return genome

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
        return cls(map(LayerGenome.from_kept, kept, experts, active))

    @property
    def layers(self) -> tuple[LayerGenome, ...]:
        """Made anew where they were not used lately: keep what this returns while the matrices are needed."""
        return _unpacked(self.packed)

    @property
    def is_pruning(self) -> bool:
        return not self.packed.merged

    @property
    def kept(self) -> tuple[tuple[int, ...], ...]:
        """The dominant expert of each slot, layer by layer."""
        return self.packed.kept_by_layer

    @property
    def num_experts(self) -> tuple[int, ...]:
        return self.packed.num_experts

    @property
    def num_kept(self) -> tuple[int, ...]:
        return self.packed.num_kept

    @property
    def top_k(self) -> tuple[int, ...]:
        return self.packed.top_k

    @cached_property
    def digest(self) -> str:
        """Hash of the layers' digests in order."""
        return hashlib.sha256(":".join(layer.digest for layer in self.layers).encode()).hexdigest()[:32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Genome) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # with the digest, where it is known: a genome travels often
        return (Genome.of_packed, (self.packed, self.__dict__.get("digest")))
