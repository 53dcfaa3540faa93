"""Stock MoE models made of dense ones: their FFN's neurons are divided among experts, or copied to all of them.

The FFN of these models is a sum over neurons i, down_i act(gate_i x) (up_i x), so a sum of experts that share out the
neurons is the FFN. All formats weigh the active experts with numbers whose sum is 1, which is made up for by a factor
on the experts' down matrices. Letters in shapes: H hidden size, I neurons of the FFN, E experts of m neurons each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_evo.models.carve.formats import Layout
from moe_evo.models.layer import MoELayer
from moe_evo.models.transformers_border import transformers
from moe_evo.models.view import MoEModel

_GATE_OF_SHARED = 0.5
"""sigmoid(0): what qwen2_moe multiplies the shared expert with, where its gate's weights are zeros."""


_SPREAD = 2.0**-4
"""Standard deviation of a token's logits among its experts.

Weights of active experts differ by some percent then, which is little beside what the others would have added, and an
optimizer's steps do not drown the router's rows, as they would smaller ones.
"""

_SPREAD_OF_ALL = 2.0**-22
"""The same where all experts are active, so that there is nothing to choose: weights are equal but for rounding."""


@dataclass(frozen=True, eq=False)
class FFN:
    """The weights of one dense FFN. gate, up: (I, H). down: (H, I)."""

    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Factors:
    """What weights are multiplied with. down: the down matrices of the routed experts. router: the router's rows."""

    down: float = 1.0
    router: float = 1.0

    @classmethod
    def of_parts(cls, layout: Layout) -> Factors:
        """For experts that share out the neurons of an FFN, so that each active one counts as in the FFN.

        Weights have the sum 1, so each of top_k active ones has 1 / top_k, if the router's logits are close together.
        """
        spread = _SPREAD if layout.top_k < layout.num_experts else _SPREAD_OF_ALL
        return cls(down=float(layout.top_k), router=spread)


@dataclass(frozen=True, eq=False)
class Expansion:
    """What one FFN becomes.

    neurons: (E, m), those of each expert. shared: (S,), those of the shared expert. router: (E, H), with logits of
    standard deviation 1 among experts.
    """

    neurons: Tensor
    shared: Tensor
    router: Tensor


def one_expert(dense_model: Any, config: Any) -> Any:
    """The dense model as an MoE of one expert, whose weight is always 1; it computes the same. Shares its weights.

    config: as `target_config` makes it for one expert and no shared one.
    """
    state = dense_model.state_dict()
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}.mlp."
        gate, up, down = (state.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        every = torch.arange(len(gate), device=gate.device)
        whole = Expansion(every[None], every[:0], gate.new_zeros(1, gate.shape[1]))
        state |= _named(prefix, block_state(FFN(gate, up, down), whole, config, Factors()))
    return moe_model(state, config, dense_model)


def moe_model(state: Mapping[str, Tensor], config: Any, like: Any) -> Any:
    """A stock model in eval mode that holds the tensors of `state`. like: the model whose generation config it gets."""
    with torch.device("meta"):  # only a shell: its tensors come from `state`
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=like.dtype)
    model.load_state_dict(dict(state), assign=True)
    model.tie_weights()
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(like.device)  # its buffers are in no state dict
    model.generation_config = like.generation_config
    return model.requires_grad_(False).eval()


def expanded(moe: MoEModel, expansions: Sequence[Expansion], config: Any, factors: Factors) -> Any:
    """A dense model, given as an MoE of one expert, with other experts; config: of the result.

    Shares all weights but those of the experts.
    """
    state = dict(moe.language_model.state_dict())
    for layer, made in zip(moe.layers, expansions, strict=True):
        prefix = f"model.layers.{layer.number}.mlp."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        state |= _named(prefix, block_state(ffn_of(layer), made, config, factors))
    return moe_model(state, config, moe.language_model)


def ffn_of(layer: MoELayer) -> FFN:
    """The dense FFN that a layer of one expert holds."""
    tensors = layer.expert_tensors()
    gate, up = tensors["gate_up_proj"][0].chunk(2)
    return FFN(gate, up, tensors["down_proj"][0])


def block_state(ffn: FFN, made: Expansion, config: Any, factors: Factors) -> dict[str, Tensor]:
    """The tensors of one MoE block, by their names in it."""
    gate_up = torch.cat([ffn.gate[made.neurons], ffn.up[made.neurons]], dim=1)
    down = _scaled(ffn.down[:, made.neurons].transpose(0, 1), factors.down).contiguous()
    router = (made.router * factors.router).to(gate_up.dtype)
    found = {"experts.gate_up_proj": gate_up, "experts.down_proj": down, "gate.weight": router}
    if config.model_type == "qwen2_moe":
        shared = _shared(ffn, made.shared, config.shared_expert_intermediate_size)
        found |= {f"shared_expert.{name}_proj.weight": one for name, one in vars(shared).items()}
        found["shared_expert_gate.weight"] = gate_up.new_zeros(1, gate_up.shape[2])
    return found


def _shared(ffn: FFN, neurons: Tensor, width: int) -> FFN:
    """The shared expert; of zeros where it has no neurons, as the format demands one."""
    if len(neurons) == 0:
        hidden = ffn.gate.shape[1]
        return FFN(
            ffn.gate.new_zeros(width, hidden), ffn.up.new_zeros(width, hidden), ffn.down.new_zeros(hidden, width)
        )
    return FFN(ffn.gate[neurons], ffn.up[neurons], _scaled(ffn.down[:, neurons], 1 / _GATE_OF_SHARED).contiguous())


def _scaled(down: Tensor, scale: float) -> Tensor:
    return down if scale == 1 else (down.float() * scale).to(down.dtype)


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
