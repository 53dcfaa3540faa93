"""Which tensors of a model are trained, named as people speak of a model's parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from moe_evo.errors import ConfigError
from moe_evo.models.view import MoEModel
from moe_evo.recovery.adapters import of_adapters, of_scales


def trained_parameters(model: MoEModel, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of these `moe_evo.config.recover.PARTS`, by name; raises ConfigError where there are none.

    Adapters and scales are there within `adapted`. Of a router all that is computed with is trained, but no correction
    bias, which takes part in the choice of experts only and has no gradient.
    """
    chosen = {id(one) for part in parts for one in _of_part(model, part)}
    found = {name: one for name, one in model.language_model.named_parameters() if id(one) in chosen}
    if not found:
        raise ConfigError(f"recover.train: got {', '.join(parts)}, of which this model has no parameters")
    return found


def _of_part(model: MoEModel, part: str) -> Iterator[nn.Parameter]:
    language_model: Any = model.language_model
    if part == "experts":
        tensors = [tensor for layer in model.layers for tensor in layer.expert_tensors().values()]
        yield from (one for one in tensors if isinstance(one, nn.Parameter))
    elif part == "adapters":
        yield from (one for layer in model.layers for one in of_adapters(layer))
    elif part == "scales":
        yield from (one for layer in model.layers for one in of_scales(layer))
    elif part == "router":
        tensors = [tensor for layer in model.layers for tensor in layer.router_tensors().values()]
        yield from (one for one in tensors if isinstance(one, nn.Parameter))
    elif part == "norms":
        norms = (one for one in language_model.modules() if type(one).__name__.endswith("Norm"))
        yield from (one for norm in norms for one in norm.parameters())
    elif part == "attention":
        layers = language_model.get_decoder().layers
        yield from (one for layer in layers for one in layer.self_attn.parameters())
    else:
        assert part == "all", part
        yield from language_model.parameters()
