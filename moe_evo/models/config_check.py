"""Checks of what a model's config.json says, before the library builds anything from it.

The library takes a million layers and no heads at all, and fails much later, in its own words, or never ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_evo.errors import ModelError
from moe_evo.shown import shown

_MOST_LAYERS, _MOST_EXPERTS, _WIDEST, _MOST_TOKENS = 1000, 2**16, 2**24, 2**30

_RANGES: dict[str, tuple[int, int]] = {
    "num_hidden_layers": (1, _MOST_LAYERS),
    "hidden_size": (1, _WIDEST),
    "intermediate_size": (1, _WIDEST),
    "moe_intermediate_size": (1, _WIDEST),
    "shared_expert_intermediate_size": (0, _WIDEST),
    "vocab_size": (1, _MOST_TOKENS),
    "max_position_embeddings": (1, _MOST_TOKENS),
    "num_attention_heads": (1, _MOST_EXPERTS),
    "num_key_value_heads": (1, _MOST_EXPERTS),
    "head_dim": (1, _WIDEST),
    "num_local_experts": (1, _MOST_EXPERTS),
    "num_experts": (1, _MOST_EXPERTS),
    "n_routed_experts": (1, _MOST_EXPERTS),
    "num_experts_per_tok": (1, _MOST_EXPERTS),
    "n_shared_experts": (0, _MOST_EXPERTS),
    "n_group": (0, _MOST_EXPERTS),
    "topk_group": (0, _MOST_EXPERTS),
    "first_k_dense_replace": (0, _MOST_LAYERS),
    "decoder_sparse_step": (1, _MOST_LAYERS),
    "kv_lora_rank": (1, _WIDEST),
    "q_lora_rank": (1, _WIDEST),
    "qk_nope_head_dim": (0, _WIDEST),
    "qk_rope_head_dim": (1, _WIDEST),
    "v_head_dim": (1, _WIDEST),
    "sliding_window": (1, _MOST_TOKENS),
    "max_window_layers": (0, _MOST_LAYERS),
    "moe_layer_freq": (1, _MOST_LAYERS),
    "num_nextn_predict_layers": (0, _MOST_LAYERS),
}
"""The whole numbers of the families' configs, from least to most; null is the library's default."""

_ABOVE_ZERO = (
    "rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor", "logits_scaling",
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "swiglu_limit",
)  # fmt: skip
"""Numbers with which a model loads, but computes nonsense, where they are 0 or less."""

_ROPE = ("rope_theta", "partial_rotary_factor", "factor")

_SWITCHES = ("norm_topk_prob", "tie_word_embeddings", "attention_bias", "use_cache")

_DTYPES = ("float32", "bfloat16", "float16")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError for the first value of a config that no model has; where: the file, for the message."""
    for name, (least, most) in _RANGES.items():
        value = config.get(name)
        if name == "sliding_window" and config.get("use_sliding_window") is False:
            continue  # the library makes it 0 where it is not used
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        _expect(value is None or (is_whole and least <= value <= most), where, name, value, f"{least:,} to {most:,}")
    ropes = (config.get(name) for name in ("rope_parameters", "rope_scaling"))
    rope = {name: one[name] for one in ropes if isinstance(one, Mapping) for name in _ROPE if name in one}
    for name, value in [*((name, config.get(name)) for name in _ABOVE_ZERO), *rope.items()]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(value is None or (is_number and 0 < value < float("inf")), where, name, value, "more than 0")
    for name in _SWITCHES:
        value = config.get(name)
        _expect(value is None or isinstance(value, bool), where, name, value, "true or false")
    for name in ("dtype", "torch_dtype"):
        _expect(_is_dtype(config.get(name)), where, name, config.get(name), f"one of {', '.join(_DTYPES)}")
    _check_together(config, where)


def _check_together(config: Mapping[str, Any], where: str) -> None:
    """Numbers that must fit each other; those that are absent fit."""
    vocabulary, padding = config.get("vocab_size"), config.get("pad_token_id")
    is_token = isinstance(padding, int) and (vocabulary is None or -vocabulary <= padding < vocabulary)
    _expect(padding is None or is_token, where, "pad_token_id", padding, f"a token below vocab_size ({vocabulary})")
    experts = next((config[name] for name in _EXPERTS if config.get(name) is not None), None)
    active = config.get("num_experts_per_tok")
    _expect(experts is None or (active or 1) <= experts, where, "num_experts_per_tok", active,
            f"at most the {experts} experts")  # fmt: skip
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    _expect(not heads or not shared or heads % shared == 0, where, "num_key_value_heads", shared,
            f"a divisor of the {heads} num_attention_heads")  # fmt: skip
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    _expect(chosen <= groups, where, "topk_group", chosen, f"at most n_group ({groups})")
    _expect(experts is None or experts % groups == 0, where, "n_group", groups, f"a divisor of the {experts} experts")
    dense, layers = config.get("mlp_only_layers"), config.get("num_hidden_layers") or _MOST_LAYERS
    is_list = isinstance(dense, list | tuple) and all(type(one) is int and 0 <= one < layers for one in dense)
    _expect(dense is None or is_list, where, "mlp_only_layers", dense, f"a list of layers, 0 to {layers - 1}")
    _expect(not config.get("is_encoder_decoder"), where, "is_encoder_decoder", True,
            "false, as this family is a decoder in the library")  # fmt: skip


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _is_dtype(value: Any) -> bool:
    """Whether weights of this number format can be searched; a config may leave it out."""
    return value in (None, "auto") or str(value).removeprefix("torch.") in _DTYPES


def _expect(condition: bool, where: str, name: str, got: object, expected: str) -> None:
    if not condition:
        raise ModelError(f"{where}: {name}: got {shown(got, 80)}, expected {expected}; give another checkpoint")
