"""Checkpoints whose MoE layers differ in experts or top_k, which no stock config can hold.

The modules are the stock ones; only their sizes differ by layer. config.json names a model type of
our own, so that a stock loader refuses the folder instead of filling missing experts with random weights.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_evo.errors import ModelError
from moe_evo.files.json_text import read_json
from moe_evo.genomes.genome import Genome
from moe_evo.models.checkpoint_check import check_report, headers_of
from moe_evo.models.config_check import check_config
from moe_evo.models.export.written_config import consistent, without_predictions
from moe_evo.models.families import PRUNED_TYPE, Family, family_of
from moe_evo.models.load import resolve_device
from moe_evo.models.transformers_border import LIBRARY_ERRORS, one_line, transformers
from moe_evo.plain import PlainError, value_of
from moe_evo.shown import shown


def save_pruned(language_model: Any, state: dict[str, Tensor], genome: Genome, folder: Path) -> None:
    """Write weights and configs; `state` is the state dict with each layer's own number of experts."""
    content = {
        "model_type": PRUNED_TYPE,
        "base_config": without_predictions(language_model.config.to_dict()),
        "num_kept": genome.num_kept,
        "top_k": genome.top_k,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    language_model.generation_config.save_pretrained(folder)
    tied = list(language_model.all_tied_weights_keys)
    save_torch_state_dict(state, folder, shared_tensors_to_discard=tied)


def load_pruned(folder: str | Path, *, device: str | torch.device = "auto") -> Any:
    """The transformers model in eval mode, in the dtype that was exported.

    Use it like any other: forward, `generate`, tokenizer from the same folder. Raises ModelError for a
    folder that `export_checkpoint` did not write for this loader.
    """
    folder = Path(folder)
    content = _read_config(folder)
    family = family_of(content.base_config, str(folder))
    state: dict[str, Tensor] = {}
    try:
        config = transformers.AutoConfig.for_model(**content.base_config)
        language_model = _skeleton(config, family, content.num_kept, content.top_k)
        for file in sorted(folder.glob("*.safetensors")):
            state.update(load_file(file))
        found = language_model.load_state_dict(state, strict=False, assign=True)
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{folder}: cannot be loaded ({one_line(error)})") from error
    tied = set(language_model.all_tied_weights_keys)
    report = {"missing_keys": set(found.missing_keys) - tied, "unexpected_keys": found.unexpected_keys}
    headers = headers_of(folder.glob("*.safetensors"))
    check_report(str(folder), {"mismatched_keys": (), **report}, language_model, headers)
    language_model.tie_weights()
    language_model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    target = resolve_device(device) if isinstance(device, str) else device
    return language_model.to(target).requires_grad_(False).eval()


def has_unequal_layers(folder: Path) -> bool:
    """Whether this is a checkpoint that `save_pruned` wrote."""
    try:
        content = read_json(folder / "config.json", ModelError, takes_infinity=True)
    except ModelError:  # no checkpoint at all, as whoever loads it will say
        return False
    return isinstance(content, dict) and content.get("model_type") == PRUNED_TYPE


@dataclass(frozen=True)
class _PrunedConfig:
    """The config.json of `save_pruned`."""

    base_config: dict[str, Any]
    num_kept: list[int]
    top_k: list[int]

    def __post_init__(self) -> None:
        pairs = list(zip(self.num_kept, self.top_k, strict=False))
        if len(self.num_kept) != len(self.top_k) or not all(1 <= active <= kept for kept, active in pairs):
            raise PlainError(f"top_k: got {shown(self.top_k, 80)}, expected 1 to num_kept for each layer")


def _read_config(folder: Path) -> _PrunedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: has no config.json; give a folder that moe_evo exported")
    content = read_json(file, ModelError, takes_infinity=True)
    if not isinstance(content, dict) or content.get("model_type") != PRUNED_TYPE:
        raise ModelError(
            f"{folder}: is no checkpoint with layers of different size; load it with transformers' "
            "AutoModelForCausalLM.from_pretrained"
        )
    try:
        told = value_of(_PrunedConfig, content)
    except PlainError as error:
        raise ModelError(f"{file}: {error}; give a folder that moe_evo exported") from error
    check_config(told.base_config, str(file))
    return told


def _skeleton(config: Any, family: Family, num_kept: list[int], top_k: list[int]) -> Any:
    """The model with the fewest experts a router can do with, whose MoE layers then get their sizes."""
    shape = family.shape(config)
    small = copy.deepcopy(config)
    setattr(small, family.experts_field, shape.num_expert_groups * shape.min_kept_per_group)
    language_model = transformers.AutoModelForCausalLM.from_config(small, dtype=config.dtype)
    layers = language_model.get_decoder().layers
    for position, kept, active in zip(shape.decoder_layers, num_kept, top_k, strict=True):
        block = layers[position].get_submodule(family.block)
        router, experts = block.get_submodule(family.router), block.get_submodule("experts")
        _resize(router, family.router_tensors, kept)
        _resize(experts, family.expert_tensors, kept)
        router.num_experts = experts.num_experts = kept
        router.top_k = active
    told = consistent(language_model.config.to_dict(), num_kept=max(num_kept), top_k=max(top_k))
    for name, value in told.items():
        if getattr(language_model.config, name, value) != value:
            setattr(language_model.config, name, value)
    setattr(language_model.config, family.experts_field, max(num_kept))
    setattr(language_model.config, family.top_k_field, max(top_k))
    return language_model


def _resize(module: nn.Module, names: tuple[str, ...], num_kept: int) -> None:
    """Put empty tensors (K, ...) in the place of (E, ...), ready to be assigned."""
    for name in names:
        old = getattr(module, name)
        new = torch.empty((num_kept, *old.shape[1:]), dtype=old.dtype, device="meta")
        setattr(module, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
