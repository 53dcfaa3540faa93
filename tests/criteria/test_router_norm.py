"""Router-norm change against rows of the state dicts, for checkpoints as every family saves them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, tiny_model

from moe_evo.config.model import ModelConfig
from moe_evo.criteria.answering import answer
from moe_evo.criteria.observer import Observer
from moe_evo.criteria.registry import CRITERIA, check_methods
from moe_evo.errors import ConfigError, ModelError
from moe_evo.models.router_rows import check_comparable, router_lengths
from moe_evo.models.source import ModelSource


def saved(folder, family, **options):
    model = tiny_model(family, **options)
    model.save_pretrained(folder)
    return ModelConfig(path=str(folder)), model


def rows_of(model):
    """||w_j|| of all routers, one row after the other."""
    routers = [
        tensor
        for name, tensor in model.state_dict().items()
        if name.endswith((".gate.weight", ".router.weight")) and tensor.shape[0] == 8
    ]
    return np.array([[float(row.double().norm()) for row in router] for router in routers])


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_scores_are_the_change_of_length_of_router_rows(tmp_path, family):
    tuned, model = saved(tmp_path / "tuned", family, seed=1)
    base, before = saved(tmp_path / "base", family, seed=2)
    change = rows_of(model) - rows_of(before)
    assert (change > 0).any() and (change < 0).any()

    def ask(questions):
        return ((question, answer(question, None)) for question in questions)

    observer = Observer(ask, {"task": "task"}, "model")
    for name, expected in (("router_norm", change), ("router_norm_absolute", np.abs(change))):
        criterion = CRITERIA[name].comparing_with(base, "hash", tuned)
        assert criterion.name == name and not criterion.needs_base_model
        np.testing.assert_allclose(criterion.scores(observer), expected, rtol=1e-6, atol=1e-12)
    check_comparable(ModelSource(tuned), ModelSource(base))


def test_only_router_tensors_are_read(tmp_path, monkeypatch):
    config, _ = saved(tmp_path, "qwen2_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    assert any("shared_expert_gate" in name for name in tensors)
    for name, tensor in tensors.items():
        if not name.endswith("mlp.gate.weight"):
            tensors[name] = torch.zeros(1, dtype=tensor.dtype)
    expected = router_lengths(ModelSource(config))
    save_file(tensors, tmp_path / "model.safetensors")
    assert all(map(np.array_equal, router_lengths(ModelSource(config)), expected))


def test_a_checkpoint_in_several_files_is_read(tmp_path):
    one, model = saved(tmp_path / "one", "mixtral")
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    several = router_lengths(ModelSource(ModelConfig(path=str(tmp_path / "several"))))
    assert all(map(np.array_equal, several, router_lengths(ModelSource(one))))


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path):
    tuned, _ = saved(tmp_path / "tuned", "mixtral")
    other, _ = saved(tmp_path / "other", "mixtral", num_local_experts=4)
    fewer, _ = saved(tmp_path / "fewer", "mixtral", num_hidden_layers=2)
    with pytest.raises(ModelError, match="has 3 MoE layers with 4 experts, the model has 3 with 8; give the"):
        check_comparable(ModelSource(tuned), ModelSource(other))
    with pytest.raises(ModelError, match="has 2 MoE layers with 8 experts, the model has 3 with 8; give the"):
        check_comparable(ModelSource(tuned), ModelSource(fewer))
    with pytest.raises(ModelError, match="no such folder"):
        check_comparable(ModelSource(tuned), ModelSource(ModelConfig(path=str(tmp_path / "none"))))
    file = tmp_path / "other" / "model.safetensors"
    tensors = {name: one for name, one in load_file(file).items() if "layers.1." not in name}
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"has no router of 4 experts in decoder layer 1; give the checkpoint"):
        router_lengths(ModelSource(other))
    file.write_bytes(b"broken")
    with pytest.raises(ModelError, match="its router weights cannot be read"):
        router_lengths(ModelSource(other))


def test_methods_that_need_a_base_model_are_refused_where_none_can_be_given():
    check_methods("search.init", ["reap", "naee"])
    check_methods("--method", ["router_norm"], has_base_model=True)
    for name in ("router_norm", "router_norm_absolute"):
        with pytest.raises(ConfigError, match=rf"^search.init: {name} compares with the checkpoint before [^\n]*$"):
            check_methods("search.init", ["reap", name])
