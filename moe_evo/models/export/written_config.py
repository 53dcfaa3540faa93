"""What an exported config.json needs beside what transformers writes, so that every field and every reader agree.

transformers 5 writes rotary embeddings under new names only: release 4, and vLLM on top of it, would take the default
base for them without an error. And a config may tell one number under several names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_evo.models.families import Family

_NUM_EXPERTS = (
    "num_local_experts", "num_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts", "n_experts",
    "moe_num_routed_experts", "num_moe_experts", "num_total_experts", "moe_experts",
)  # fmt: skip
_TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "num_selected_experts", "num_active_experts", "num_activated_experts", "top_k_experts", "router_top_k",
    "moe_router_topk", "n_activated_experts",
)  # fmt: skip
"""All names under which configs tell them; a model's own code reads one of them."""
_PREDICTION_LAYERS = (
    "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers", "num_mtp_modules",
    "num_mtp_predict_layers",
)  # fmt: skip


def consistent(told: Mapping[str, Any], *, num_kept: int, top_k: int) -> dict[str, Any]:
    """The config with these numbers wherever it tells them, also in parts of it; layers for multi-token prediction: 0.

    Their weights are not read, so that no export has them.
    """
    numbers = dict.fromkeys(_NUM_EXPERTS, num_kept) | dict.fromkeys(_TOP_K, top_k)
    return {name: _with(value, numbers, name) for name, value in without_predictions(told).items()}


def without_predictions(told: Mapping[str, Any]) -> dict[str, Any]:
    """The config with no layers for multi-token prediction."""
    numbers = dict.fromkeys(_PREDICTION_LAYERS, 0)
    return {name: _with(value, numbers, name) for name, value in told.items()}


def _with(value: Any, numbers: Mapping[str, int], name: str) -> Any:
    if isinstance(value, Mapping):
        return {inner: _with(one, numbers, inner) for inner, one in value.items()}
    if name not in numbers or value is None or isinstance(value, bool):
        return value
    # some configs have one number a layer
    return [numbers[name] for _ in value] if isinstance(value, list) else numbers[name]


def _with_infinities(value: Any) -> Any:
    """The value with numbers in place of the objects that transformers 5 writes for them, and release 4 cannot read."""
    if isinstance(value, Mapping):
        is_number = value.keys() == {"__float__"}
        return float(value["__float__"]) if is_number else {key: _with_infinities(one) for key, one in value.items()}
    return [_with_infinities(one) for one in value] if isinstance(value, list) else value


def readable_by_all(told: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config with what transformers 4 and vLLM read: older names of rotary embeddings and dtype, and the router.

    An infinite number is written as Python's JSON does, which all of them read.
    """
    written: dict[str, Any] = _with_infinities({**family.config_defaults, **told})
    rope = written.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        own = ("rope_theta", "partial_rotary_factor")
        written |= {name: rope[name] for name in own if name in rope}
        scaling = {name: value for name, value in rope.items() if name not in own}
        is_plain = rope.get("rope_type", "default") == "default"
        written["rope_scaling"] = None if is_plain else {**scaling, "type": rope["rope_type"]}
    if "dtype" in written:
        written["torch_dtype"] = written["dtype"]
    return written


def tokenizer_readable_by_all(told: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with a class that transformers 4 knows, and its name for further special tokens."""
    written = dict(told)
    if written.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name of the same
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(written.get("extra_special_tokens"), list):
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    return written
