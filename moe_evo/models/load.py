"""Loading a model: its weights, and the view around it. Weights are safetensors only: other formats can run code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moe_evo.config.check import require
from moe_evo.errors import ConfigError, ModelError
from moe_evo.models.carve.build import one_expert
from moe_evo.models.checkpoint_check import check_report
from moe_evo.models.experts.alignment import align_neurons
from moe_evo.models.placement import (
    check_device,
    check_placement,
    drop_repeated_biases,
    input_device,
    placement_options,
    suit_device,
    weights_dtype,
)
from moe_evo.models.ranks import ALONE, Ranks
from moe_evo.models.self_check import self_check
from moe_evo.models.source import ModelSource
from moe_evo.models.transformers_border import LIBRARY_ERRORS, one_line, quiet, transformers
from moe_evo.models.variants.dynamic_routing import dynamic_routing_of
from moe_evo.models.variants.meo import MEO, check_experts
from moe_evo.models.view import MoEModel
from moe_evo.models.zero3 import load_slices, load_zero3


def load_model(source: ModelSource, ranks: Ranks = ALONE, slices: Mapping[str, Any] | None = None) -> MoEModel:
    """Read a checkpoint and put the view around it.

    ranks: the processes that hold the model together, where `model.sharding` divides it; each of them
    calls this. slices: DeepSpeed's config for a zero3 model that will be trained; it computes once the trainer has
    made an engine of it. Raises ModelError (lacking weights, failed self-check) or ConfigError (device, router,
    sharding) in one line.
    """
    config, family, transformers_config, shape = source.config, source.family, source.transformers_config, source.shape
    dynamic_routing = dynamic_routing_of(config)
    if dynamic_routing is not None:
        dynamic_routing.check(family, shape)
    check_experts(config.experts, family, transformers_config)
    if config.router == "eep":
        family.check_eep_router(transformers_config)
    device = resolve_device(config.device)
    require(
        config.sharding == "single" or not source.is_dense, "model.sharding", config.sharding,
        "'single' for a dense model",
    )  # fmt: skip
    check_placement(config, family, transformers_config, ranks)
    check_device(config, device, ranks)
    alignment = source.alignment
    options = placement_options(config, family, transformers_config, device, ranks)
    with quiet():
        if slices is not None:
            language_model = load_slices(lambda: _language_model(source, options), config, dict(slices))
        elif config.sharding == "zero3":
            dtype = weights_dtype(config, transformers_config)
            language_model = load_zero3(lambda: _language_model(source, options), config, transformers_config, dtype)
        else:
            language_model = _language_model(source, options)
    suit_device(language_model, device)
    if config.experts == "meo":
        language_model.set_experts_implementation(MEO)
    if config.sharding == "tensor_parallel":
        drop_repeated_biases(language_model, family, ranks)
    moe = MoEModel(
        language_model,
        source.tokenizer,
        router_mode=config.router,
        merged_cache_gib=config.merged_cache_gib,
        device=input_device(language_model, device),
        ranks=ranks,
        splits_examples=config.sharding == "zero3" and ranks.size > 1,
        dynamic_routing=dynamic_routing,
    )
    if config.self_check and slices is None:
        self_check(moe)
    if alignment is not None:
        align_neurons(moe, alignment.permutations)
    return moe


def resolve_device(name: str) -> torch.device:
    """'auto' is a GPU where there is one. Raises ConfigError for a device that is not here or is 'meta'."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ConfigError(f"model.device: got {name!r}, which is not available here; use 'auto'") from error
    if device.type == "meta":
        raise ConfigError(f"model.device: got {name!r}, which holds no numbers to compute with; use 'auto'")
    return device


def _language_model(source: ModelSource, options: Mapping[str, Any]) -> Any:
    config = source.config
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    headers = source.checked_headers()
    try:
        language_model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=config.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, which the library's own error does not
            **options,
        )
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{source.location}: cannot be loaded ({one_line(error)})") from error
    check_report(str(source.location), report, language_model, headers)
    return one_expert(language_model, source.transformers_config) if source.is_dense else language_model
