"""A tiny random model of every supported family, to try what moe_evo relies on in transformers without a checkpoint."""

from __future__ import annotations

import re
from typing import Any

import torch

from moe_evo.models.transformers_border import transformers

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
ATTENTION_OF_DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
SHARED = {"intermediate_size": 48, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1, "routed_scaling_factor": 1.5}
GROUPS = {"n_group": 2, "topk_group": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 8},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 8, "head_dim": 8, "norm_topk_prob": True},
    "qwen2_moe": {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "mlp_only_layers": [1],
        "intermediate_size": 48,
    },
    "olmoe": {"intermediate_size": 16, "num_experts": 8, "tie_word_embeddings": True},
    "deepseek_v2": {**SHARED, **ROUTED, **GROUPS, **ATTENTION_OF_DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**SHARED, **ROUTED, **GROUPS, **ATTENTION_OF_DEEPSEEK},
    "glm4_moe": {**SHARED, **ROUTED, "head_dim": 8},
    "gpt_oss": {
        "intermediate_size": 16,
        "num_local_experts": 8,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granitemoe": {"intermediate_size": 16, "num_local_experts": 8, "logits_scaling": 2.0},
}


def tiny_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32 whose router logits are far apart and whose biases are not zero."""
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **CONFIGS.get(model_type, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            is_router = re.search(r"(gate|router)\.weight$", name) is not None
            if tensor.ndim >= 2 or "bias" in name:
                scale = 0.6 if is_router else 0.15
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    model.tie_weights()
    return model
