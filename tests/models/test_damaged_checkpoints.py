"""Weights that are not those of config.json are refused in one line that names a tensor and its sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import largest_difference, logits, tiny_model, tokens
from torch import Tensor

from moe_evo.config.model import ModelConfig
from moe_evo.errors import ModelError
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel

Weights = dict[str, Tensor]
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
GATE = "model.layers.1.block_sparse_moe.gate.weight"
NORM = "model.layers.0.input_layernorm.weight"


def changed(
    source: Path, target: Path, change: Callable[[Weights], Mapping[str, Tensor]] = dict, **config: Any
) -> ModelSource:
    """A copy of a checkpoint with other weights and another config."""
    shutil.copytree(source, target)
    weights = change(load_file(target / "model.safetensors"))
    save_file({name: one.contiguous() for name, one in weights.items()}, target / "model.safetensors", {"format": "pt"})
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **config}))
    return ModelSource(ModelConfig(path=str(target), device="cpu"))


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: one for name, one in weights.items() if name not in names}


def with_tensor(name: str, tensor: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: tensor}


DAMAGE: dict[str, tuple[Callable[[Weights], Mapping[str, Tensor]], dict[str, Any], list[str]]] = {
    "a layer too many": (dict, {"num_hidden_layers": 2}, ["model.layers.2.", "(24, 32)", "has 2 num_hidden_layers"]),
    "a layer too few": (dict, {"num_hidden_layers": 4}, ["lacks 9 weights", "model.layers.3.", "(32)"]),
    "an expert is missing": (without(EXPERT), {}, [f"lacks {EXPERT} (24, 32)"]),
    "an expert has another shape": (
        with_tensor(EXPERT, torch.zeros(23, 32)), {}, [f"{EXPERT} (23, 32) is unlike other experts", "(24, 32)"],
    ),
    "an expert too many": (
        with_tensor(EXPERT.replace("experts.3", "experts.8"), torch.zeros(24, 32)), {},
        ["lacks", "experts.8.w1.weight (24, 32)"],
    ),
    "the router is missing": (without(GATE), {}, ["lacks 1 weights", "model.layers.1.mlp.gate.weight (8, 32)"]),
    "the router has other rows": (
        with_tensor(GATE, torch.zeros(7, 32)), {}, ["model.layers.1.mlp.gate.weight (7, 32)", "expects (8, 32)"],
    ),
    "a norm is missing": (without(NORM), {}, [f"{NORM} (32)"]),
    "a norm has another size": (with_tensor(NORM, torch.ones(5)), {}, [f"{NORM} (5)", "expects (32)"]),
    "another vocabulary": (dict, {"vocab_size": 97}, ["(96, 32)", "expects (97, 32)"]),
    "fewer experts in the config": (dict, {"num_local_experts": 4}, ["(8, ", "expects (4, "]),
    "more experts in the config": (dict, {"num_local_experts": 16}, ["(8, ", "expects (16, "]),
    "wider experts in the config": (dict, {"intermediate_size": 48}, ["(8, 32, 24)", "expects (8, 32, 48)"]),
    "a tensor that nobody knows": (
        with_tensor("model.layers.0.extra.weight", torch.ones(3, 2)), {}, ["model.layers.0.extra.weight (3, 2)"],
    ),
    "whole numbers": (with_tensor(NORM, torch.ones(32, dtype=torch.int8)), {}, [f"{NORM} (32)", "I8"]),
    "eight bits": (
        with_tensor(EXPERT, torch.zeros(24, 32).to(torch.float8_e4m3fn)), {}, [f"{EXPERT} (24, 32)", "F8_E4M3"],
    ),
    "numbers that are none": (with_tensor(NORM, torch.full((32,), torch.nan)), {}, ["logits are not finite"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_with_the_tensor_and_its_sizes(
    checkpoint: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    change, config, parts = DAMAGE[damage]
    with pytest.raises(ModelError) as caught:
        load_model(changed(checkpoint("mixtral"), tmp_path / "damaged", change, **config))
    message = str(caught.value)
    assert "\n" not in message and "above report" not in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sliding_window", -5), ("sliding_window", 0), ("num_experts_per_tok", 0), ("num_experts_per_tok", 9),
        ("num_key_value_heads", 3), ("max_position_embeddings", -1), ("rms_norm_eps", -1.0), ("head_dim", -8),
        ("is_encoder_decoder", True),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {field}: got {value!r}, expected") as caught:
        load_model(changed(checkpoint("mixtral"), tmp_path / "odd", **{field: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("topk_group", 3), ("n_group", 3), ("first_k_dense_replace", -1)])
def test_groups_and_layers_that_make_no_sense_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(ModelError, match=f"{field}: got {value}, expected"):
        load_model(changed(checkpoint("deepseek_v3"), tmp_path / "odd", **{field: value}))


def prediction_layer(weights: Weights) -> Weights:
    """The last layer once more, with what a layer for multi-token prediction has besides."""
    last = {name.replace("layers.2.", "layers.3."): one.clone() for name, one in weights.items() if "layers.2." in name}
    more = {"eh_proj.weight": torch.zeros(32, 64), "enorm.weight": torch.ones(32), "hnorm.weight": torch.ones(32)}
    return {**weights, **last, **{f"model.layers.3.{name}": one for name, one in more.items()}}


def old_buffers(weights: Weights) -> Weights:
    return {**weights, **{f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}}


@pytest.mark.parametrize("add", [prediction_layer, old_buffers, lambda some: {**some, "mtp.fc.weight": torch.ones(2)}])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_what_stock_transformers_leaves_out_on_purpose_still_loads(
    checkpoint: Callable[[str], Path], tmp_path: Path, model_type: str, add: Callable[[Weights], Weights]
) -> None:
    source = changed(checkpoint(model_type), tmp_path / "more", add, num_nextn_predict_layers=1)
    expected = logits(tiny_model(model_type), tokens())
    assert largest_difference(logits(load_model(source).language_model, tokens()), expected) == 0


def test_a_layer_for_prediction_does_not_hide_a_layer_too_many(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = changed(checkpoint("deepseek_v3"), tmp_path / "more", prediction_layer, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"holds model\.layers\.2\..* but config\.json has 2 num_hidden_layers"):
        load_model(source)


def test_tied_weights_still_load(load: Callable[[str], MoEModel]) -> None:
    model = load("olmoe").language_model
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
