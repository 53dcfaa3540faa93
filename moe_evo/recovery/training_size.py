"""How many numbers a training changes, and the memory that it takes beside activations; without weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from moe_evo.models.size.memory import exported_size
from moe_evo.models.size.size import ModelSize, Weight

_MATRICES = ("gate_up_proj", "down_proj")
_FLOAT32 = 4


def trained_numbers(size: ModelSize, num_kept: Sequence[int], parts: Sequence[str], rank: int) -> int:
    """How many numbers the `moe_evo.config.recover.PARTS` have in a model of which `num_kept` experts a layer are left.

    size: of the full model. rank: of adapters.
    """
    own = sum(_numel(weight, num_kept) for weight in _weights_of(size, parts))
    return own + _adapter_numbers(size, num_kept, parts, rank)


def training_bytes(
    size: ModelSize, num_kept: Sequence[int], parts: Sequence[str], rank: int, *, checkpointing: bool
) -> int:
    """Bytes of weights, and of what is trained: gradients, two moments, and float32 copies of what is not float32.

    checkpointing: whether layers are computed again, so that adapters are added to one layer's weights at a time.
    """
    _, total = exported_size(size, num_kept)
    for weight in _weights_of(size, parts):
        copies = 0 if weight.itemsize == _FLOAT32 else 2 * _FLOAT32  # and their gradients
        total += _numel(weight, num_kept) * (weight.itemsize + 2 * _FLOAT32 + copies)
    total += 4 * _FLOAT32 * _adapter_numbers(size, num_kept, parts, rank)  # with themselves
    added: dict[int, int] = {}
    for weight in _adapted(size, parts):
        assert weight.moe_layer is not None
        added[weight.moe_layer] = added.get(weight.moe_layer, 0) + _numel(weight, num_kept) * weight.itemsize
    return total + (max if checkpointing else sum)(added.values() or [0])


def _numel(weight: Weight, num_kept: Sequence[int]) -> int:
    if weight.moe_layer is None:
        return weight.numel
    return prod(weight.shape[1:]) * num_kept[weight.moe_layer]


def _weights_of(size: ModelSize, parts: Sequence[str]) -> Iterator[Weight]:
    """The model's own parameters among these parts."""
    for weight in size.weights:
        last = weight.module.rpartition(".")[2]
        is_in = {
            "all": True,
            "experts": weight.is_expert,
            "router": weight.moe_layer is not None and not weight.is_expert,
            "norms": "norm" in last,
            "attention": ".self_attn." in f".{weight.module}.",
        }
        if weight.is_parameter and any(is_in.get(part, False) for part in parts):
            yield weight


def _adapted(size: ModelSize, parts: Sequence[str]) -> Iterator[Weight]:
    """The experts' matrices that are computed anew from what is trained."""
    chosen = _MATRICES if "adapters" in parts else _MATRICES[1:] if "scales" in parts else ()
    yield from (weight for weight in size.weights if weight.is_expert and weight.name in chosen)


def _adapter_numbers(size: ModelSize, num_kept: Sequence[int], parts: Sequence[str], rank: int) -> int:
    """Of adapters a rank-r factor on each side of each expert matrix, and of scales one number an expert."""
    found = sum(num_kept) if "scales" in parts else 0
    if "adapters" in parts:
        for weight in _adapted(size, parts):
            assert weight.moe_layer is not None
            found += num_kept[weight.moe_layer] * rank * sum(weight.shape[1:])
    return found
