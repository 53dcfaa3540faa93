"""How large a model is, told from config.json without its weights.

The stock model is built on the meta device, so names, shapes and the library's own tensor parallel plan
are those of the model that will be loaded. All sizes are in bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe_evo.errors import ConfigError, ModelError
from moe_evo.genomes.space import ModelShape
from moe_evo.models.families import Family
from moe_evo.models.source import ModelSource
from moe_evo.models.transformers_border import (
    LIBRARY_ERRORS,
    attention_implementation,
    kept_in_float32,
    one_line,
    quiet,
    transformers,
    undivided_modules,
)

_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Weight:
    """One tensor of the state dict.

    module: the path of the module that owns it. moe_layer: number of the MoE layer of whose experts or
    router it holds one row an expert, else None. is_expert: of the experts, not of the router.
    is_parameter: False for a buffer, which no sharding splits. style: rule of the tensor parallel plan.
    """

    module: str
    name: str
    shape: tuple[int, ...]
    itemsize: int
    moe_layer: int | None = None
    is_expert: bool = False
    is_parameter: bool = True
    style: str | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def size(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Activations:
    """What a forward pass holds beside weights, from the sizes of the widest layer.

    hidden: numbers a token between layers. inner: numbers a token inside the widest block. cached: bytes
    a token of keys and values while text is generated. eager_heads: attention heads whose scores are
    written out (length x length each), 0 where the library's fused attention runs.
    """

    hidden: int
    inner: int
    cached: int
    eager_heads: int

    def bound(self, tokens: int, longest: int, itemsize: int, *, generates: bool = False) -> int:
        """Rough upper bound in bytes for a batch of `tokens` whose rows have at most `longest` each."""
        # 4: residual, normed, output of a block, sum; norms compute in float32; half as much again for the
        # rest (masks, indices, copies): measured peaks of all families are 0.35 to 0.95 of the whole
        layer = tokens * (itemsize * (4 * self.hidden + self.inner) + 2 * 4 * self.hidden) * 3 // 2
        scores = self.eager_heads * tokens * longest * (2 * itemsize + 4)
        return layer + scores + tokens * self.cached * generates


@dataclass(frozen=True)
class ModelSize:
    """A model's state dict without its numbers, for a gang of `ranks`; tied tensors stand in it once.

    tensor_parallel_refusal: why `ranks` cannot hold slices of it, '' where they can. dtype: of the
    weights once loaded. vocabulary: logits a position. blocks: paths of the modules that a
    device map never splits.
    """

    shape: ModelShape
    ranks: int
    tensor_parallel_refusal: str
    dtype: str
    itemsize: int
    vocabulary: int
    num_decoder_layers: int
    weights: tuple[Weight, ...]
    blocks: tuple[str, ...]
    activations: Activations

    @property
    def parameters(self) -> int:
        """Numbers in the state dict, as a checkpoint holds them."""
        return sum(weight.numel for weight in self.weights)

    @property
    def expert_parameters(self) -> int:
        return sum(weight.numel for weight in self.weights if weight.is_expert)

    @property
    def active_parameters(self) -> int:
        """Those that one token meets."""
        return sum(
            weight.numel * self.shape.top_k[weight.moe_layer] // weight.shape[0]
            if weight.is_expert and weight.moe_layer is not None
            else weight.numel
            for weight in self.weights
        )

    @property
    def size(self) -> int:
        return sum(weight.size for weight in self.weights)


def read_size(source: ModelSource, ranks: int) -> ModelSize:
    """The size of the model that `load_model` would load, from config.json; raises ModelError."""
    if source.config.dtype == "auto":
        dtype = source.transformers_config.dtype or _first_dtype(source.location)
    else:
        dtype = getattr(torch, source.config.dtype)
    try:
        size = size_of(source.family, source.transformers_config, dtype, ranks)
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{source.config.path}: config.json cannot be used ({one_line(error)})") from error
    return replace(size, weights=tuple(filter(_is_of_ffn, size.weights))) if source.is_dense else size


def _is_of_ffn(weight: Weight) -> bool:
    """Of a dense model taken as an MoE of one expert: whether the dense model has the weight, too."""
    is_router = weight.moe_layer is not None and not weight.is_expert
    return not is_router and "shared_expert" not in weight.module


def size_of(family: Family, transformers_config: Any, dtype: torch.dtype, ranks: int) -> ModelSize:
    """The size of a model of `family` with this config, loaded in `dtype`, for gangs of `ranks`."""
    with quiet(), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers_config, dtype=dtype, trust_remote_code=False)
    shape = family.shape(transformers_config)
    names = {module: name for name, module in model.named_modules()}
    layers = model.get_decoder().layers
    rows = {}
    for number, position in enumerate(shape.decoder_layers):
        block = layers[position].get_submodule(family.block)
        rows[names[block.get_submodule("experts")]] = (number, frozenset(family.expert_tensors), True)
        rows[names[block.get_submodule(family.router)]] = (number, frozenset(family.router_tensors), False)
    refusal = ""
    try:
        family.check_tensor_parallel(transformers_config, ranks)
    except ConfigError as error:
        refusal = str(error)
    plan = {**(model.tp_plan or {}), **family.tensor_parallel_plan(transformers_config, ranks)}
    embedding = model.get_input_embeddings().weight
    weights = _weights(model, dtype, rows, plan)
    return ModelSize(
        shape=shape,
        ranks=ranks,
        tensor_parallel_refusal=refusal,
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        vocabulary=int(embedding.shape[0]),
        num_decoder_layers=len(layers),
        weights=tuple(weights),
        blocks=tuple(name for module, name in names.items() if type(module).__name__ in undivided_modules(model)),
        activations=_activations(family, transformers_config, shape, weights, dtype.itemsize),
    )


def _weights(
    model: Any,
    dtype: torch.dtype,
    rows: Mapping[str, tuple[int, frozenset[str], bool]],
    plan: Mapping[str, str],
) -> list[Weight]:
    """rows: by path of an experts or router module its MoE layer, its tensors with a row an expert, is_expert."""
    parameters = dict(model.named_parameters())
    transient = {name for name, _ in model.named_non_persistent_buffers()}
    buffers = {name: tensor for name, tensor in model.named_buffers() if name not in transient}
    in_float32 = kept_in_float32(model, dtype)
    weights = []
    for path, tensor in {**parameters, **buffers}.items():
        module, _, name = path.rpartition(".")
        number, with_rows, is_expert = rows.get(module, (None, frozenset(), False))
        is_float32 = any(pattern in path for pattern in in_float32)
        weights.append(
            Weight(
                module,
                name,
                tuple(tensor.shape),
                itemsize=4 if is_float32 else tensor.element_size(),
                moe_layer=number if name in with_rows else None,
                is_expert=is_expert and name in with_rows,
                is_parameter=path in parameters,
                style=_style(module, name, plan),
            )
        )
    return weights


def _style(module: str, name: str, plan: Mapping[str, str]) -> str | None:
    """The rule for a tensor, else the one for its module, as transformers resolves them."""
    generic_module, generic = (re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in (module, f"{module}.{name}"))
    return plan.get(generic, plan.get(generic_module))


def _first_dtype(source: Path | str) -> torch.dtype:
    """That of the checkpoint's first floating tensor, where config.json names none."""
    files = sorted(source.glob("*.safetensors")) if isinstance(source, Path) else []
    for file in files[:1]:
        try:
            with safe_open(file, framework="numpy") as tensors:
                names = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
        except LIBRARY_ERRORS:
            break
        return next((_SAFETENSORS_DTYPES[name] for name in names if name in _SAFETENSORS_DTYPES), torch.float32)
    return torch.float32


def _activations(
    family: Family, config: Any, shape: ModelShape, weights: Sequence[Weight], itemsize: int
) -> Activations:
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    queries, keys, values = heads * head, int(config.num_key_value_heads) * head, int(config.num_key_value_heads) * head
    if getattr(config, "kv_lora_rank", None):  # the library keeps keys and values of all heads, not the latent
        queries = keys = heads * int(config.qk_nope_head_dim + config.qk_rope_head_dim)
        values = heads * int(config.v_head_dim)
    # input, gate and up, product, output and weighted output, for each expert that a token is sent to
    routed = max(shape.top_k) * (3 * hidden + 3 * family.expert_width(config))
    dense_width = max((weight.shape[0] for weight in weights if weight.module.endswith(".up_proj")), default=0)
    return Activations(
        hidden=hidden,
        inner=max(routed, 3 * dense_width, 3 * queries + 2 * (keys + values)),
        cached=int(config.num_hidden_layers) * (keys + values) * itemsize,
        eager_heads=heads if attention_implementation(config) == "eager" else 0,
    )
