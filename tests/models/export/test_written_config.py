"""Every field of an exported config.json agrees with the weights, and older readers find the names that they know."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_pruning, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import moe_evo
from moe_evo.config.model import ModelConfig
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.export.written_config import tokenizer_readable_by_all
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel

YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
REPEATED = {
    "experts_per_token": 2, "moe_topk": [2, 2, 2], "moe_k": 2, "moe_num_experts": [8, 8, 8], "num_experts": 8,
    "num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 2,
    "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2, "moe_jitter_eps": 0.5},
    "num_shared_experts": 3, "top_k": 50,
}  # fmt: skip


def exported(source: Path, folder: Path, *, num_kept: int = 4, top_k: int = 2) -> dict[str, Any]:
    """config.json of a pruning of the checkpoint."""
    moe = load_model(ModelSource(ModelConfig(path=str(source), device="cpu")))
    export_checkpoint(moe, random_pruning(moe.shape, num_kept, top_k=top_k), folder, provenance={})
    written: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return written


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_numbers_that_a_config_repeats_are_those_of_the_export(
    checkpoint: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    source = Path(shutil.copytree(checkpoint(model_type), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, **{n: v for n, v in REPEATED.items() if n not in raw}}))
    written = exported(source, tmp_path / "small", num_kept=4, top_k=1)
    assert (written["experts_per_token"], written["moe_topk"], written["moe_k"]) == (1, [1, 1, 1], 1)
    assert (written["moe_num_experts"], written.get("num_experts", 4)) == ([4, 4, 4], 4)
    assert (written["num_nextn_predict_layers"], written["mtp_num_hidden_layers"]) == (0, 0)
    assert written["ffn_config"] == {"moe_num_experts": 4, "moe_top_k": 1, "moe_jitter_eps": 0.5}
    assert written["num_shared_experts"] == 3, "those are not routed to"
    assert 8 not in [value for name, value in written.items() if "expert" in name]


def test_infinity_in_a_config_is_read_as_transformers_does_and_every_release_reads_the_export(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    limits = {"time_step_limit": [0.0, math.inf], "ssm": {"least": -math.inf}}
    (source / "config.json").write_text(json.dumps(raw | limits))
    written = exported(source, tmp_path / "small")
    assert written | limits == written  # as release 4 reads it, with Python's json
    config = AutoConfig.from_pretrained(tmp_path / "small")
    assert (config.time_step_limit, config.ssm) == tuple(limits.values())
    moe = load_model(ModelSource(ModelConfig(path=str(source), device="cpu")))
    first, *others = random_pruning(moe.shape, 4).layers
    unequal = Genome((LayerGenome.from_kept([0, 1, 2], first.num_experts, first.top_k), *others))
    export_checkpoint(moe, unequal, tmp_path / "unequal", provenance={})
    assert moe_evo.load_pruned(tmp_path / "unequal").config.time_step_limit == [0.0, math.inf]


def test_a_checkpoint_of_our_own_loader_repeats_no_other_numbers(mixtral: MoEModel, tmp_path: Path) -> None:
    mixtral.language_model.config.experts_per_token = 2
    try:
        genome = random_pruning(mixtral.shape, 4, top_k=1)
        other = random_pruning(mixtral.shape, 6, top_k=1)
        mixed = type(genome)((*genome.layers[:-1], other.layers[-1]))
        export_checkpoint(mixtral, mixed, tmp_path / "small", provenance={})
    finally:
        del mixtral.language_model.config.experts_per_token
    config = moe_evo.load_pruned(tmp_path / "small", device="cpu").config
    assert (config.experts_per_token, config.num_experts_per_tok, config.num_local_experts) == (1, 1, 6)


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, (7e4, None, None)),
        ("qwen3_moe", {"rope_parameters": YARN}, (5e5, {**YARN, "type": "yarn"}, None)),
        ("qwen2_moe", {"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0}},
         (2e4, {"rope_type": "linear", "type": "linear", "factor": 2.0}, None)),
        ("glm4_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
         (1e6, None, 0.5)),
        ("granitemoe", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, (3e4, None, None)),
    ],
)  # fmt: skip
def test_rotary_embeddings_and_dtype_stand_under_their_older_names_too(
    tmp_path: Path, model_type: str, changes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    tiny_model(model_type, **changes).save_pretrained(tmp_path / "source")
    written = exported(tmp_path / "source", tmp_path / "small")
    theta, scaling, partial = expected
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == theta
    found = written["rope_scaling"]
    assert found == scaling or {name: found[name] for name in scaling if name != "rope_theta"} == {
        name: value for name, value in scaling.items() if name != "rope_theta"
    }
    assert written.get("partial_rotary_factor") == partial
    assert written["torch_dtype"] == written["dtype"] == "float32"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.rope_parameters
    assert again == {**again, **changes["rope_parameters"]}, "transformers reads the same out of both"


def test_a_router_of_deepseek_v3_chooses_the_same_where_masked_experts_score_zero(
    load: Callable[[str], MoEModel], tmp_path: Path
) -> None:
    """As transformers 4 does, where an expert of a group that is not used could be chosen before one below 0."""
    moe = load("deepseek_v3")
    genome = random_pruning(moe.shape, 4)
    export_checkpoint(moe, genome, tmp_path / "small", provenance={})
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (written["topk_method"], written["scoring_func"]) == ("noaux_tc", "sigmoid")
    weights = load_file(tmp_path / "small" / "model.safetensors")
    biases = [one for name, one in weights.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and all(one.min() >= 0 for one in biases)
    assert any((one < 0).any() for name, one in moe.language_model.state_dict().items() if "correction_bias" in name)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    gate = stock.model.layers[1].mlp.gate
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    chosen = gate(hidden)[2]
    scores = torch.nn.functional.linear(hidden, gate.weight).sigmoid() + gate.e_score_correction_bias
    groups = scores.view(-1, 2, 2)
    used = torch.nn.functional.one_hot(groups.sum(-1).argmax(-1), 2).bool()
    old = groups.masked_fill(~used[..., None], 0.0).flatten(1).topk(2).indices
    assert torch.equal(old.sort(-1).values, chosen.sort(-1).values)


def test_original_configs_of_deepseek_v3_have_groups(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("deepseek_v3"), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}))
    shapes = [ModelSource(ModelConfig(path=str(one))).shape for one in (source, checkpoint("deepseek_v3"))]
    assert shapes[0] == shapes[1] and shapes[0].num_expert_groups == 2
    exported(source, tmp_path / "small")
    assert ModelSource(ModelConfig(path=str(tmp_path / "small"))).shape.num_expert_groups == 2


def test_the_tokenizer_is_of_a_class_that_older_readers_know(tmp_path: Path) -> None:
    moe = load_model(ModelSource(ModelConfig(device="cpu", self_check=False)))
    export_checkpoint(moe, random_pruning(moe.shape, 4), tmp_path / "small", provenance={})
    told = json.loads((tmp_path / "small" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = ModelSource(ModelConfig(path=str(tmp_path / "small"))).tokenizer
    assert again("A good film.\n")["input_ids"] == moe.tokenizer("A good film.\n")["input_ids"]
    assert again.special_tokens_map == moe.tokenizer.special_tokens_map
    assert tokenizer_readable_by_all({"extra_special_tokens": ["<x>"], "tokenizer_class": "Qwen2Tokenizer"}) == {
        "additional_special_tokens": ["<x>"], "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip
