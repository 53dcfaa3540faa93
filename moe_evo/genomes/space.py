"""`ModelShape`, what a model offers, and `SearchSpace`, what of it a search may use.

Every constraint that a genome must meet is checked here, when the space is built, never in the
middle of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from moe_evo.errors import ConfigError, GenomeError
from moe_evo.genomes.bounds import Bounds
from moe_evo.genomes.genome import Genome, LayerGenome


@dataclass(frozen=True)
class ModelShape:
    """The MoE layers of a model, without its weights.

    num_experts, top_k: one number a MoE layer. decoder_layers: where those layers stand among the
    model's decoder layers (dense first layers shift them). num_expert_groups, top_k_groups: of a
    group-limited router, else 1 and 1. min_kept_per_group: fewest experts with which a group can
    still be scored (2 where a group's score is the sum of its two best).
    """

    family: str
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    num_expert_groups: int = 1
    top_k_groups: int = 1
    min_kept_per_group: int = 1

    @property
    def num_layers(self) -> int:
        return len(self.num_experts)

    def identity(self) -> Genome:
        """The genome that changes nothing."""
        return Genome.from_kept([range(n) for n in self.num_experts], self.num_experts, self.top_k)


@dataclass(frozen=True)
class SearchSpace:
    """The genomes that a search may propose.

    num_kept, top_k: one number a MoE layer. layer_groups: a partition of the layers into runs that
    share their genes. kept_bounds, top_k_bounds: given where the search chooses these numbers, too;
    then `num_kept` is the same in every layer and within the bounds, and `top_k` the largest allowed.
    """

    shape: ModelShape
    num_kept: tuple[int, ...]
    top_k: tuple[int, ...]
    layer_groups: tuple[tuple[int, ...], ...]
    kept_bounds: Bounds | None = None
    top_k_bounds: Bounds | None = None

    @classmethod
    def build(
        cls,
        shape: ModelShape,
        *,
        num_kept: int | Sequence[int] | Mapping[str, int],
        top_k: int | None = None,
        num_layer_groups: int | None = None,
        multiple_of: int = 1,
        varies_top_k: bool = False,
    ) -> SearchSpace:
        """Check what the user allows against what the model offers.

        num_kept: experts kept in every layer, a list with one number a layer, or numbers 'min', 'max' and 'mean'
        between which each layer keeps its own; without a mean their sum is free, too. top_k: experts active a token
        (default: the model's). num_layer_groups: consecutive layers share genes in so many groups of nearly equal
        size (default: none are shared). varies_top_k: each layer group has its own top_k, from 1 to `top_k`.

        Raises ConfigError with the option, the value and what would do.
        """
        active = shape.top_k if top_k is None else (top_k,) * shape.num_layers
        given = {f".{key}": one for key, one in num_kept.items()} if isinstance(num_kept, Mapping) else {"": num_kept}
        for key, one in given.items():
            kept = _per_layer("search.num_kept", one, shape.num_layers)
            for layer in range(shape.num_layers):
                _check_layer(shape, layer, kept[layer], active[layer], multiple_of, f"search.num_kept{key}")
        groups, bounds = _layer_groups(shape.num_layers, num_layer_groups), None
        if isinstance(num_kept, Mapping):
            bounds, even = _bounds(shape, num_kept, multiple_of, groups)
            kept = (even,) * shape.num_layers
        for group in groups:
            if len({(shape.num_experts[layer], kept[layer], active[layer]) for layer in group}) > 1:
                raise ConfigError(
                    f"search.num_layer_groups: layers {list(group)} would share genes but differ in "
                    "experts, num_kept or top_k; use more groups or one num_kept for all"
                )
        largest = tuple(active[group[0]] for group in groups)
        if varies_top_k and max(largest) == 1:
            raise ConfigError("search.objectives: got 'active', but top_k is 1 in every layer; leave it out")
        top_ks = Bounds((1,) * len(groups), largest) if varies_top_k else None
        return cls(shape, kept, active, groups, bounds, top_ks)

    @property
    def kept(self) -> Bounds:
        """How many experts each layer group may keep."""
        return self.kept_bounds or Bounds.fixed([self.num_kept[group[0]] for group in self.layer_groups])

    @property
    def active(self) -> Bounds:
        """The top_k that each layer group may have."""
        return self.top_k_bounds or Bounds.fixed([self.top_k[group[0]] for group in self.layer_groups])

    def genes(self, genome: Genome) -> tuple[LayerGenome, ...]:
        """One `LayerGenome` a layer group; raises GenomeError for a genome from another space."""
        self.check(genome)
        return tuple(genome.layers[group[0]] for group in self.layer_groups)

    def genome(self, genes: Sequence[LayerGenome]) -> Genome:
        """The genome whose layer groups have these genes."""
        by_layer = {layer: gene for group, gene in zip(self.layer_groups, genes, strict=True) for layer in group}
        return Genome(tuple(by_layer[layer] for layer in range(self.shape.num_layers)))

    def check(self, genome: Genome) -> None:
        """Raise GenomeError unless the genome belongs to this space."""
        check_fits(genome, self.shape)
        if not self._allows(genome):
            kept = list(self.num_kept) if self.kept_bounds is None else _told(self.kept_bounds)
            top_k = list(self.top_k) if self.top_k_bounds is None else _told(self.top_k_bounds)
            raise GenomeError(
                f"genome: keeps {list(genome.num_kept)} experts with top_k {list(genome.top_k)}, the space "
                f"allows {kept} with {top_k}"
            )

    def _allows(self, genome: Genome) -> bool:
        pairs = ((self.kept, genome.num_kept), (self.active, genome.top_k))
        shares_genes = all(
            len({numbers[layer] for layer in group}) == 1 for _, numbers in pairs for group in self.layer_groups
        )
        firsts = [group[0] for group in self.layer_groups]
        return shares_genes and all(bounds.holds([numbers[layer] for layer in firsts]) for bounds, numbers in pairs)

    def expert_group(self, group: int, slot: int) -> range:
        """The experts that slot `slot` of layer group `group` may keep as they are, where it keeps `num_kept`.

        All experts, except under a group-limited router, whose groups stay whole and in order.
        """
        layer = self.layer_groups[group][0]
        size = self.shape.num_experts[layer] // self.shape.num_expert_groups
        first = slot // (self.num_kept[layer] // self.shape.num_expert_groups) * size
        return range(first, first + size)

    @property
    def can_prune(self) -> bool:
        """False where every layer keeps all its experts."""
        return self.num_kept != self.shape.num_experts

    def to_json(self) -> dict[str, Any]:
        """Plain data for metadata and reports."""
        return asdict(self)


def check_fits(genome: Genome, shape: ModelShape) -> None:
    """Raise GenomeError unless the genome can be applied to a model of this shape."""
    got = genome.num_experts
    if got != shape.num_experts:
        raise GenomeError(
            f"genome: made for {len(got)} MoE layers of {_summary(got)} experts, the model has "
            f"{shape.num_layers} of {_summary(shape.num_experts)}; use the model it was searched on"
        )
    for index, layer in enumerate(genome.layers):
        _check_expert_groups(shape, layer, index)


def _check_expert_groups(shape: ModelShape, layer: LayerGenome, index: int) -> None:
    groups = shape.num_expert_groups
    per_group, rest = divmod(layer.num_kept, groups)
    if rest or per_group < shape.min_kept_per_group:
        raise GenomeError(
            f"genome layer {index}: keeps {layer.num_kept} experts, the router has {groups} groups; "
            f"keep the same number in each group, at least {shape.min_kept_per_group}"
        )
    if layer.top_k > per_group * shape.top_k_groups:
        raise GenomeError(
            f"genome layer {index}: top_k {layer.top_k} is more than the {per_group * shape.top_k_groups} "
            "experts in the groups chosen; keep more or lower top_k"
        )
    if layer.is_pruning:
        size, slots = layer.num_experts // groups, layer.num_kept // groups
        if any(expert // size != slot // slots for slot, expert in enumerate(layer.kept)):
            raise GenomeError(
                f"genome layer {index}: keeps {list(layer.kept)}, which is not {slots} experts in each of "
                f"the router's {groups} groups of {size}"
            )


def _summary(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else str(list(numbers))


def _per_layer(option: str, value: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * num_layers
    if len(value) != num_layers:
        raise ConfigError(f"{option}: got {len(value)} numbers, the model has {num_layers} MoE layers")
    return tuple(value)


def _bounds(
    shape: ModelShape, wanted: Mapping[str, int], multiple_of: int, groups: Sequence[Sequence[int]]
) -> tuple[Bounds, int]:
    """The bounds on what each layer group keeps, and the number within them that each keeps where all keep as many."""
    low, high, mean = wanted["min"], wanted["max"], wanted.get("mean")
    step = math.lcm(multiple_of, shape.num_expert_groups)
    sizes = sorted({len(group) for group in groups})
    if mean is not None and len(sizes) > 1:
        raise ConfigError(
            f"search.num_layer_groups: got {len(groups)} for {shape.num_layers} MoE layers, expected groups of equal "
            "size, as they share search.num_kept.mean; give a number that divides the layers"
        )
    middle = low + (high - low) // (2 * step) * step if mean is None else mean
    total = None if mean is None else mean * len(groups)
    return Bounds((low,) * len(groups), (high,) * len(groups), step, total), middle


def _told(bounds: Bounds) -> str:
    told = f"{min(bounds.fewest)} to {max(bounds.most)}"
    return told if bounds.total is None else f"{told}, {bounds.total / len(bounds.fewest):g} on average,"


def _check_layer(shape: ModelShape, layer: int, num_kept: int, top_k: int, multiple_of: int, option: str) -> None:
    experts, groups = shape.num_experts[layer], shape.num_expert_groups
    where = f"MoE layer {layer}"
    if not 1 <= num_kept <= experts:
        raise ConfigError(f"{option}: got {num_kept}, {where} has {experts} experts; give 1 to {experts}")
    if not 1 <= top_k <= num_kept:
        raise ConfigError(
            f"{option}: got {num_kept} with top_k {top_k} in {where}; keep at least {top_k} "
            f"experts, or set search.top_k to {num_kept} or less"
        )
    if num_kept % multiple_of:
        raise ConfigError(f"{option}: got {num_kept}, expected a multiple of search.multiple_of {multiple_of}")
    if num_kept % groups or num_kept // groups < shape.min_kept_per_group:
        raise ConfigError(
            f"{option}: got {num_kept}, the router of {shape.family} chooses among {groups} groups of "
            f"experts; give a multiple of {groups}, at least {groups * shape.min_kept_per_group}"
        )
    if groups > 1 and top_k > num_kept // groups * shape.top_k_groups:
        raise ConfigError(
            f"{option}: got {num_kept}, which leaves {num_kept // groups} experts in each of the "
            f"{shape.top_k_groups} groups chosen, fewer than top_k {top_k}; keep more or lower search.top_k"
        )


def _layer_groups(num_layers: int, num_groups: int | None) -> tuple[tuple[int, ...], ...]:
    count = num_layers if num_groups is None else num_groups
    if not 1 <= count <= num_layers:
        raise ConfigError(
            f"search.num_layer_groups: got {count}, the model has {num_layers} MoE layers; give 1 to {num_layers}"
        )
    bounds = [round(index * num_layers / count) for index in range(count + 1)]
    return tuple(tuple(range(first, end)) for first, end in pairwise(bounds))
