"""What is known of a model from its config alone, and what is refused from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONFIGS, tiny_model

from moe_evo.config.model import ModelConfig
from moe_evo.errors import ModelError
from moe_evo.genomes.space import ModelShape
from moe_evo.models.families import FAMILIES, PRUNED_TYPE, family_of
from moe_evo.models.source import ModelSource


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert set(FAMILIES) == set(CONFIGS)
    assert all(name == family.model_type for name, family in FAMILIES.items())


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_shape_from_config_alone_equals_shape_of_the_loaded_model(
    model_type: str, checkpoint: Callable[[str], Path], load: Callable[[str], Any]
) -> None:
    shape = ModelSource(ModelConfig(path=str(checkpoint(model_type)))).shape
    assert shape == load(model_type).shape
    assert shape.num_experts == (8,) * shape.num_layers
    assert shape.top_k == (2,) * shape.num_layers


@pytest.mark.parametrize(
    ("model_type", "decoder_layers"),
    [("mixtral", (0, 1, 2)), ("qwen2_moe", (0, 2)), ("deepseek_v3", (1, 2)), ("glm4_moe", (1, 2))],
)
def test_dense_layers_are_not_counted(load, model_type: str, decoder_layers: tuple[int, ...]) -> None:
    assert load(model_type).shape.decoder_layers == decoder_layers


def test_sparse_step_leaves_dense_layers_between() -> None:
    model = tiny_model("qwen3_moe", decoder_sparse_step=2, intermediate_size=48)
    assert FAMILIES["qwen3_moe"].shape(model.config).decoder_layers == (1,)


@pytest.mark.parametrize(
    ("model_type", "groups"),
    [("mixtral", (1, 1, 1)), ("deepseek_v2", (2, 1, 1)), ("deepseek_v3", (2, 1, 2)), ("glm4_moe", (1, 1, 2))],
)
def test_groups_of_the_router(load, model_type: str, groups: tuple[int, int, int]) -> None:
    shape: ModelShape = load(model_type).shape
    assert (shape.num_expert_groups, shape.top_k_groups, shape.min_kept_per_group) == groups


REFUSED = [
    ({"model_type": "llama"}, "llama has no Mixture-of-Experts layers; supported families: deepseek_v2, "),
    ({"model_type": "gpt2"}, "gpt2 has no Mixture-of-Experts layers"),
    ({"model_type": "phimoe", "num_local_experts": 16}, "family phimoe is not supported; supported: deepseek_v2"),
    ({"model_type": "ernie4_5_moe", "moe_num_experts": 16}, "family ernie4_5_moe is not supported"),
    ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, "family dbrx is not supported"),
    ({"model_type": PRUNED_TYPE}, "its layers keep different numbers of experts, which only moe_evo.load_pruned reads"),
    ({"num_local_experts": 8}, "config.json has no model_type"),
    ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "is quantised"),
]


@pytest.mark.parametrize(("raw_config", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_other_models_are_refused_in_one_line_before_weights_are_read(
    raw_config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_config))
    with pytest.raises(ModelError, match=message) as caught:
        ModelSource(ModelConfig(path=str(tmp_path)))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_supported_family_without_moe_layers_is_refused() -> None:
    model = tiny_model("qwen2_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(ModelError, match="no Mixture-of-Experts layers"):
        FAMILIES["qwen2_moe"].shape(model.config)


def test_family_is_found_by_model_type() -> None:
    assert family_of({"model_type": "olmoe"}, "here") is FAMILIES["olmoe"]
