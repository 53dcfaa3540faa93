"""The model's own decoder layers, run in halves: attention, then the MoE block.

What a genome changes lies in the second half, so everything up to there is shared by all genomes that
agree on the layers before. The halves are the stock `forward` of a layer in which the other half's module
answers with zeros: the residual stream goes through it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from moe_evo.models.forward.key_values import CacheNames, PastKeyValues
from moe_evo.models.layer import LayerPlan
from moe_evo.models.view import MoEModel


@dataclass(frozen=True, eq=False)
class Start:
    """A batch in front of the first decoder layer.

    hidden: (P, T, H) embeddings. calls: for each decoder layer what the model hands it beside the
    hidden states (masks, position embeddings), as positional and keyword arguments.
    """

    hidden: Tensor
    calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]


class LayerHalves:
    """Stages of a model: stage i ends in front of MoE block i; the last one in front of the head.

    Hidden states of N copies of a batch are (N * P, T, H), copy by copy; any N will do.
    """

    def __init__(self, model: MoEModel) -> None:
        self._model = model
        self._decoder_layers: Sequence[nn.Module] = list(model.language_model.get_decoder().layers)
        self._positions = model.shape.decoder_layers
        self._block = model.family.block
        self._zero_block = _zeros_in_tuple if model.family.block_returns_tuple else torch.zeros_like

    @property
    def num_stages(self) -> int:
        return len(self._positions)

    @property
    def ends_with_moe(self) -> bool:
        """Whether nothing but the head comes after the last MoE block."""
        return self._positions[-1] == len(self._decoder_layers) - 1

    @cached_property
    def cache_names(self) -> CacheNames | None:
        """What the model itself calls the cache that it makes; None where its layers get none by name."""
        handed: list[list[str]] = []

        def look(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            handed.append(_names_of_caches(kwargs))
            return hidden

        token = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)
        with torch.inference_mode(), _replaced({layer: look for layer in self._decoder_layers}):
            given = _names_of_caches(self._model.language_model(input_ids=token, use_cache=True))
        if len(given) != 1 or len(handed[0]) != 1 or any(names != handed[0] for names in handed):
            return None
        return CacheNames(of_layers=handed[0][0], of_model=given[0])

    def start(self, input_ids: Tensor, arguments: Mapping[str, Any]) -> Start:
        """Embed a batch; arguments: position_ids and attention_mask as the language model takes them."""
        calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
        seen: list[Tensor] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(hidden)
            calls.append((args, kwargs))
            return hidden

        with _replaced({layer: record for layer in self._decoder_layers}):
            self._model.language_model(input_ids=input_ids, **arguments, use_cache=False, logits_to_keep=1)
        return Start(seen[0], calls)

    def attend(self, stage: int, hidden: Tensor, start: Start, past_key_values: PastKeyValues | None = None) -> Tensor:
        """From the end of MoE block `stage` - 1 (or the embeddings) to the residual stream before block `stage`.

        Where `stage` is the number of stages: to the end of the last decoder layer. past_key_values: of these layers.
        """
        first = self._positions[stage - 1] + 1 if stage else 0
        last = self._positions[stage] if stage < self.num_stages else len(self._decoder_layers)
        batch, copies = start.hidden.shape[0], hidden.shape[0] // start.hidden.shape[0]
        for position in range(first, min(last + 1, len(self._decoder_layers))):
            layer = self._decoder_layers[position]
            args, kwargs = _repeated(start.calls[position], batch, copies)
            if past_key_values is not None:
                assert self.cache_names is not None, "keys and values are kept only of layers that take a cache"
                kwargs = {**kwargs, self.cache_names.of_layers: past_key_values}
            half = {layer.get_submodule(self._block): self._zero_block} if position == last else {}
            with _replaced(half):
                hidden = layer(hidden, *args, **kwargs)
        return hidden

    def mix(self, stage: int, residual: Tensor, plans: Sequence[LayerPlan | None], start: Start) -> Tensor:
        """Through MoE block `stage`; plans: the tokens (..., H) of `residual` are divided evenly among them."""
        layer = self._decoder_layers[self._positions[stage]]
        args, kwargs = start.calls[self._positions[stage]]
        with _replaced({layer.get_submodule("self_attn"): _zero_attention}), self._model.planned(stage, plans):
            hidden: Tensor = layer(residual, *args, **kwargs)
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """Final norm and head: (M, H) hidden states to logits (M, V)."""
        stubs: dict[nn.Module, Callable[..., Any]] = {layer: _same for layer in self._decoder_layers}
        stubs[self._decoder_layers[-1]] = lambda _, *args, **kwargs: hidden[None]
        token = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)
        with _replaced(stubs):
            logits: Tensor = self._model.language_model(input_ids=token, use_cache=False).logits
        return logits[0]


def _names_of_caches(values: Mapping[str, Any]) -> list[str]:
    return [name for name, value in values.items() if isinstance(value, Cache)]


def _same(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden


def _zeros_in_tuple(hidden: Tensor) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden), None


def _zero_attention(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    return _zeros_in_tuple(hidden_states)


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules answer with other functions until the block is left."""
    with ExitStack() as stack:
        for module, function in forwards.items():
            previous = module.__dict__.get("forward")
            module.__dict__["forward"] = function
            stack.callback(_restore, module, previous)
        yield


def _restore(module: nn.Module, previous: Callable[..., Any] | None) -> None:
    if previous is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = previous


def _repeated(value: Any, batch: int, copies: int) -> Any:
    """Every tensor of a batch in a nest of arguments, as many times as there are copies."""
    if copies == 1 or batch == 1:  # one row goes with any number of rows
        return value
    if isinstance(value, Tensor):
        return value.repeat(copies, *[1] * (value.ndim - 1)) if value.shape[:1] == (batch,) else value
    if isinstance(value, Mapping):
        return {key: _repeated(one, batch, copies) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_repeated(one, batch, copies) for one in value)
    return value
