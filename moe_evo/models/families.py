"""How each supported family of MoE models stores its experts and routes to them, as data.

Nothing else in the package asks which family it deals with. A new family is one entry in `FAMILIES`, from here
or from another package, and one tiny model in the contract suite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moe_evo.errors import ConfigError, ModelError
from moe_evo.genomes.space import ModelShape
from moe_evo.plugins import Registry

Scoring = Literal["softmax", "top_k_softmax", "sigmoid"]
Renormalisation = Literal["always", "norm_topk_prob", "never"]


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers. Its experts are stacked in dimension 0 of their tensors.

    experts_field: config field that original checkpoints use for the number of experts.
    block, router: names of the MoE block in a decoder layer and of the router in the block; the
    experts are always `experts`. router_tensors, expert_tensors: those with one row an expert.
    scoring: 'softmax' over all experts then top-k, 'top_k_softmax' the other way round, or 'sigmoid'
    with a correction bias that takes part in the choice only. renormalisation: whether the chosen
    weights are divided by their sum. min_kept_per_group: see `ModelShape`. experts_plan: tensor parallel
    styles of the experts' tensors ('' is the module) where transformers has none. output_biases: biases
    of the experts' outputs; under tensor parallelism outputs are summed over ranks, so only one rank holds them.
    block_returns_tuple: whether the block returns (output, something else) in place of the output. config_defaults:
    what other readers of a checkpoint need in its config.json, and transformers does not write.
    """

    model_type: str
    experts_field: str
    scoring: Scoring = "softmax"
    renormalisation: Renormalisation = "always"
    block: str = "mlp"
    router: str = "gate"
    router_tensors: tuple[str, ...] = ("weight",)
    expert_tensors: tuple[str, ...] = ("gate_up_proj", "down_proj")
    min_kept_per_group: int = 1
    experts_plan: Mapping[str, str] = field(default_factory=dict)
    output_biases: tuple[str, ...] = ()
    block_returns_tuple: bool = False
    config_defaults: Mapping[str, Any] = field(default_factory=dict)

    top_k_field = "num_experts_per_tok"
    norm = "post_attention_layernorm"  # of what enters the block, in a decoder layer of every family

    def renormalises(self, config: Any) -> bool:
        """Whether the weights of the chosen experts have the sum 1 (before any scaling)."""
        if self.renormalisation == "norm_topk_prob":
            return bool(config.norm_topk_prob)
        return self.renormalisation == "always"

    def scaling(self, config: Any) -> float:
        """Factor on the routing weights after everything else."""
        return float(getattr(config, "routed_scaling_factor", None) or 1.0)

    def residual_scaling(self, config: Any) -> float:
        """Factor on the block's output where it is added to the residual stream."""
        return float(getattr(config, "residual_multiplier", 1.0))

    def groups(self, config: Any) -> tuple[int, int]:
        """Number of expert groups and how many of them a token may use; (1, 1) without groups."""
        num_groups = getattr(config, "n_group", None) or 1
        if not hasattr(config, "topk_group"):  # a field of other families, which this one's classes do not read
            return (1, 1)
        # 'greedy' has no groups; 'noaux_tc' is what original configs of DeepSeek-V3 say of choosing them with biases
        is_grouped = getattr(config, "topk_method", None) != "greedy"
        return (int(num_groups), int(config.topk_group)) if is_grouped and num_groups > 1 else (1, 1)

    def expert_width(self, config: Any) -> int:
        """Neurons of one routed expert."""
        return int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)

    def check_eep_router(self, config: Any) -> None:
        """Raise ConfigError where EEP's router mapping (eq. 5) has no meaning for this family."""
        reason = None
        if self.scoring == "sigmoid":
            reason = "scores experts with a sigmoid, so there is no softmax to map after"
        elif self.groups(config) != (1, 1):
            reason = "chooses groups of experts, which mapped probabilities no longer have"
        if reason:
            raise ConfigError(f"model.router: got 'eep', but {self.model_type} {reason}; use 'exported'")

    def check_tensor_parallel(self, config: Any, size: int) -> None:
        """Raise ConfigError where `size` ranks cannot hold equal slices of every expert."""
        width = self.expert_width(config)
        if width % size:
            raise ConfigError(
                f"model.sharding: got 'tensor_parallel' over {size} ranks, but the experts of this {self.model_type} "
                f"model are {width} wide, which {size} does not divide; use another cluster.gang_size, or zero3"
            )

    def tensor_parallel_plan(self, config: Any, size: int) -> dict[str, str]:
        """Rules, by parameter or module, that complete or replace those of transformers' own plan.

        Attention whose heads cannot be divided among `size` ranks is computed whole by each of them.
        """
        experts = f"model.layers.*.{self.block}.experts"
        plan = {f"{experts}.{name}" if name else experts: style for name, style in self.experts_plan.items()}
        heads = (config.num_attention_heads, getattr(config, "num_key_value_heads", None) or 0)
        if any(number % size for number in heads):
            own_rules = config.base_model_tp_plan or {}
            plan |= {f"model.{rule}": "replicate" for rule in own_rules if ".self_attn." in rule}
        return plan

    def shape(self, config: Any) -> ModelShape:
        """What a model of this family with this (transformers) config offers."""
        decoder_layers = tuple(layer for layer in range(config.num_hidden_layers) if _is_moe(config, layer))
        if not decoder_layers:
            raise ModelError(f"{self.model_type} model: this config has no Mixture-of-Experts layers")
        num_groups, top_k_groups = self.groups(config)
        return ModelShape(
            family=self.model_type,
            num_experts=(int(getattr(config, self.experts_field)),) * len(decoder_layers),
            top_k=(int(getattr(config, self.top_k_field)),) * len(decoder_layers),
            decoder_layers=decoder_layers,
            num_expert_groups=num_groups,
            top_k_groups=top_k_groups,
            min_kept_per_group=self.min_kept_per_group,
        )


def _is_moe(config: Any, layer: int) -> bool:
    """Whether decoder layer `layer` has experts; families without the fields below have them everywhere."""
    if layer < (getattr(config, "first_k_dense_replace", 0) or 0):
        return False
    if layer in (getattr(config, "mlp_only_layers", None) or ()):
        return False
    return (layer + 1) % (getattr(config, "decoder_sparse_step", 1) or 1) == 0


def _sigmoid_family(model_type: str) -> Family:
    return Family(
        model_type,
        experts_field="n_routed_experts",
        scoring="sigmoid",
        renormalisation="norm_topk_prob",
        router_tensors=("weight", "e_score_correction_bias"),
        min_kept_per_group=2,  # a group's score is the sum of its two best, also where there is one group
    )


_BUILTIN: dict[str, Family] = {
    "mixtral": Family("mixtral", "num_local_experts"),
    "qwen2_moe": Family("qwen2_moe", "num_experts", renormalisation="norm_topk_prob"),
    "qwen3_moe": Family("qwen3_moe", "num_experts", renormalisation="norm_topk_prob"),
    "olmoe": Family("olmoe", "num_experts", renormalisation="norm_topk_prob"),
    "deepseek_v2": Family("deepseek_v2", "n_routed_experts", renormalisation="never"),
    "deepseek_v3": replace(
        _sigmoid_family("deepseek_v3"), config_defaults={"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    ),
    "glm4_moe": _sigmoid_family("glm4_moe"),
    "gpt_oss": Family(
        "gpt_oss",
        "num_local_experts",
        scoring="top_k_softmax",
        router="router",
        router_tensors=("weight", "bias"),
        expert_tensors=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
        # stored (E, in, out) with gate and up interleaved, so even slices of the last dimension keep pairs
        experts_plan={
            "gate_up_proj": "rowwise",
            "gate_up_proj_bias": "rowwise",
            "down_proj": "colwise",
            "": "moe_tp_experts",
        },
        output_biases=("down_proj_bias",),
        block_returns_tuple=True,
    ),
    "granitemoe": Family(
        "granitemoe",
        "num_local_experts",
        scoring="top_k_softmax",
        block="block_sparse_moe",
        router="router",
    ),
}

FAMILIES: Registry[Family] = Registry(
    "family",
    ["moe_evo.families"],
    _BUILTIN,
    lambda thing: None if isinstance(thing, Family) else f"got {thing!r}, expected a moe_evo.models.families.Family",
    takes_paths=False,  # names come from config.json, which must not say what is imported
)
"""By `model_type`. Another package adds one by an entry point, so that gangs know it, too."""

PRUNED_TYPE = "moe_evo_pruned"
"""The model_type of our own checkpoints whose layers differ in experts; no stock class loads them."""

_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_config")


def family_of(raw_config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json; `where` names the model in the ModelError for all others."""
    model_type = raw_config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{where}: config.json has no model_type; give the folder of a checkpoint")
    if model_type == PRUNED_TYPE:
        raise ModelError(
            f"{where}: its layers keep different numbers of experts, which only moe_evo.load_pruned reads; give the "
            "model that it was made of, and --genome with the genome that was exported"
        )
    if model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES.names()))
        if not any(field in raw_config for field in _EXPERT_FIELDS):
            raise ModelError(
                f"{where}: {model_type} has no Mixture-of-Experts layers; supported families: {supported}; "
                "moe-evo carve makes one of a dense model"
            )
        raise ModelError(
            f"{where}: the Mixture-of-Experts family {model_type} is not supported; supported: {supported}"
        )
    if raw_config.get("quantization_config"):
        raise ModelError(
            f"{where}: the checkpoint is quantised; moe_evo needs a bfloat16, float16 or float32 version of it"
        )
    return FAMILIES.get(model_type, where)
