"""The dense models that can become MoEs, and the stock MoE format that computes the same in every other part.

Nothing is taken over that the format does not have: what no stock config can say is refused, before weights are read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_evo.config.check import require
from moe_evo.errors import ConfigError, ModelError
from moe_evo.models.families import FAMILIES
from moe_evo.models.transformers_border import transformers

DENSE_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""The model types of dense models that can be carved. SmolLM2 is a llama."""

_TAKEN_OVER = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout", "rope_parameters",
    "dtype",
)  # fmt: skip
"""Fields of the same name and meaning in all these formats."""

_NO_SHARED = 1  # neurons, of zeros, where the format has a shared expert and the model is to have none


@dataclass(frozen=True)
class Layout:
    """The MoE layers that are to be made.

    num_experts, top_k: of every layer, without the shared expert. width: neurons of an expert. shared_size: neurons of
    the shared expert, which runs for every token; 0 is none.
    """

    num_experts: int
    top_k: int
    width: int
    shared_size: int = 0


def check_dense(raw_config: Mapping[str, Any], where: str) -> str:
    """The model type of a dense model's config.json; raises ModelError for a model that cannot be carved."""
    model_type = str(raw_config.get("model_type"))
    if model_type in FAMILIES:
        raise ModelError(f"{where}: is a Mixture-of-Experts model ({model_type}) already; give a dense one")
    if model_type not in DENSE_TYPES:
        raise ModelError(f"{where}: got a model of type {model_type!r}, expected one of {', '.join(DENSE_TYPES)}")
    if raw_config.get("quantization_config"):
        raise ModelError(
            f"{where}: the checkpoint is quantised; moe_evo needs a bfloat16, float16 or float32 version of it"
        )
    return model_type


def target_type(dense_type: str, layout: Layout) -> str:
    """The model type of the MoE."""
    if dense_type == "qwen3":
        return "qwen3_moe"
    return "qwen2_moe" if dense_type == "qwen2" or layout.shared_size else "mixtral"


def target_config(config: Any, layout: Layout) -> Any:
    """The stock config of the MoE that is made of a dense model with this (transformers) config.

    Raises ConfigError where the format lacks something that the model has.
    """
    target = target_type(config.model_type, layout)
    has_shared = target == "qwen2_moe" or not layout.shared_size
    require(has_shared, "--shared_size", layout.shared_size, f"0: {target} has no shared expert")
    _check_biases(config)
    taken = {name: copy.deepcopy(getattr(config, name)) for name in _TAKEN_OVER}
    made = transformers.AutoConfig.for_model(
        target, **{**taken, **_ATTENTION[target](config), **_experts(target, layout)}
    )
    made.name_or_path = config.name_or_path
    return made


def _check_biases(config: Any) -> None:
    """No format has biases in its experts, and those of llama's output projection are in none of them."""
    for option in ("mlp_bias", "attention_bias"):
        has_format = option == "attention_bias" and config.model_type == "qwen3"
        require(
            has_format or not getattr(config, option, False), f"{config.name_or_path or 'config.json'}: {option}", True,
            "false: no stock Mixture-of-Experts format has such biases",
        )  # fmt: skip


def _experts(target: str, layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = {"num_experts_per_tok": layout.top_k}
    if target == "mixtral":
        return {**found, "num_local_experts": layout.num_experts, "intermediate_size": layout.width}
    found |= {"num_experts": layout.num_experts, "moe_intermediate_size": layout.width, "norm_topk_prob": True}
    return found | (
        {"shared_expert_intermediate_size": layout.shared_size or _NO_SHARED} if target == "qwen2_moe" else {}
    )


def _mixtral_attention(config: Any) -> dict[str, Any]:
    return {"head_dim": config.head_dim, "sliding_window": getattr(config, "sliding_window", None)}


def _qwen2_moe_attention(config: Any) -> dict[str, Any]:
    usual = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or usual
    if head_dim != usual:
        advice = "" if config.model_type == "qwen2" else "; use --shared_size 0"
        raise ConfigError(
            f"{config.name_or_path or 'config.json'}: head_dim: got {head_dim}, expected {usual} (hidden size / "
            f"heads): qwen2_moe, the format with a shared expert, has no other{advice}"
        )
    window = getattr(config, "sliding_window", None)
    default = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    return {
        "qkv_bias": config.model_type == "qwen2",
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": list(getattr(config, "layer_types", None) or default),
    }


def _qwen3_moe_attention(config: Any) -> dict[str, Any]:
    kinds = set(config.layer_types)
    if len(kinds) > 1:
        raise ConfigError(
            f"{config.name_or_path or 'config.json'}: layer_types: got {' and '.join(sorted(kinds))}, expected one for "
            "all layers: qwen3_moe has one sliding window or none"
        )
    window = config.sliding_window if "sliding_attention" in kinds else None
    return {
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


_ATTENTION = {
    "mixtral": _mixtral_attention,
    "qwen2_moe": _qwen2_moe_attention,
    "qwen3_moe": _qwen3_moe_attention,
}
