"""One model held by several real processes, and one that lies on disk in part, against one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import run_gang
from tiny_models import CONFIGS, largest_difference, logits, random_merge, random_pruning, tiny_model, tokens
from transformers import MixtralConfig

from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError, ExportError
from moe_evo.models import zero3
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.families import FAMILIES
from moe_evo.models.load import load_model
from moe_evo.models.placement import placement_options
from moe_evo.models.ranks import ALONE, Ranks
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel
from moe_evo.models.weight_shapes import is_whole, local_shape

MATCH = 2e-6
STEPS = ("base", "pruned", "merged", "base again")

Case = tuple[str, str, str]
"""Checkpoint, sharding and offload."""

Found = dict[str, torch.Tensor]
"""Logits by step."""


@dataclass(frozen=True)
class Loaded:
    """What a rank computes, the shapes of its slices of the experts, and by which implementation."""

    found: Found
    slices: dict[str, tuple[int, ...]]
    experts_implementation: str


def config(folder: Path, **options: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", **options)


def match(step: str, expected: torch.Tensor) -> float:
    """Ranks add up partial sums in another order, which rounds in proportion to the logits; merges twice as often."""
    return MATCH * (4 if step == "merged" else 1) * max(1.0, float(expected.abs().max()))


def function_of(moe: MoEModel) -> Found:
    genomes = (None, random_pruning(moe.shape, 4), random_merge(moe.shape, 4), None)
    found = {}
    for step, genome in zip(STEPS, genomes, strict=True):
        with nullcontext() if genome is None else moe.applied(genome):
            found[step] = logits(moe.language_model, tokens()).clone()
            if step == "merged":
                genes = zip(moe.layers, genome.layers, strict=True)
                needed = sum(layer.merged_bytes(gene.expert_merging) for layer, gene in genes)
                assert moe.merged_cache.size_bytes == needed > 0
    assert [layer.num_experts for layer in moe.layers] == list(moe.shape.num_experts)
    return found


def load_on(ranks: Ranks, cases: list[Case]) -> dict[Case, Loaded]:
    loaded = {}
    for case in cases:
        path, sharding, offload = case
        moe = load_model(ModelSource(config(Path(path), sharding=sharding, offload=offload)), ranks)
        assert moe.ranks == ranks and moe.splits_examples == (sharding == "zero3")
        assert moe.device == torch.device("cpu") and moe.dtype == torch.float32
        slices = {name: local_shape(tensor) for name, tensor in moe.layers[0].expert_tensors().items()}
        loaded[case] = Loaded(function_of(moe), slices, moe.language_model.config._experts_implementation)
    return loaded


@pytest.fixture(scope="module")
def one_process(load: Callable[[str], MoEModel]) -> Callable[[str], Found]:
    found: dict[str, Found] = {}

    def function(model_type: str) -> Found:
        if model_type not in found:
            found[model_type] = function_of(load(model_type))
        return found[model_type]

    return function


@pytest.fixture(scope="module")
def two_ranks(checkpoint: Callable[[str], Path]) -> list[dict[Case, Loaded]]:
    places = [("tensor_parallel", "none"), ("zero3", "none"), ("zero3", "cpu")]
    return run_gang(load_on, 2, [(str(checkpoint(one)), *place) for one in sorted(CONFIGS) for place in places])


@pytest.fixture(scope="module")
def four_ranks(checkpoint: Callable[[str], Path]) -> list[dict[Case, Loaded]]:
    families = ("deepseek_v2", "gpt_oss", "mixtral", "qwen3_moe")
    places = [("tensor_parallel", "none"), ("zero3", "none")]
    return run_gang(load_on, 4, [(str(checkpoint(one)), *place) for one in families for place in places])


def check(loaded: list[dict[Case, Loaded]], case: Case, expected: Found) -> None:
    first, *others = (on_rank[case].found for on_rank in loaded)
    for step in STEPS:
        assert largest_difference(first[step], expected[step]) <= match(step, expected[step]), step
        assert all(torch.equal(other[step], first[step]) for other in others), step
    assert torch.equal(first["base"], first["base again"])


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize(("sharding", "offload"), [("tensor_parallel", "none"), ("zero3", "none"), ("zero3", "cpu")])
def test_two_ranks_compute_what_one_process_does(
    two_ranks, checkpoint, one_process, model_type: str, sharding: str, offload: str
) -> None:
    check(two_ranks, (str(checkpoint(model_type)), sharding, offload), one_process(model_type))


@pytest.mark.parametrize("model_type", ["deepseek_v2", "gpt_oss", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("sharding", ["tensor_parallel", "zero3"])
def test_four_ranks_compute_what_one_process_does(
    four_ranks, checkpoint, one_process, model_type: str, sharding: str
) -> None:
    check(four_ranks, (str(checkpoint(model_type)), sharding, "none"), one_process(model_type))


def test_tensor_parallel_ranks_hold_a_slice_of_every_expert(two_ranks, checkpoint) -> None:
    for on_rank in two_ranks:
        loaded = on_rank[str(checkpoint("mixtral")), "tensor_parallel", "none"]
        assert loaded.slices == {"gate_up_proj": (8, 24, 32), "down_proj": (8, 32, 12)}
        assert loaded.experts_implementation == "grouped_mm"


def test_slices_that_grouped_mm_cannot_take_are_computed_eagerly(four_ranks, checkpoint) -> None:
    for on_rank in four_ranks:
        loaded = on_rank[str(checkpoint("mixtral")), "tensor_parallel", "none"]
        assert loaded.slices["down_proj"] == (8, 32, 6)  # rows of 24 bytes
        assert loaded.experts_implementation == "eager"


def test_one_rank_loads_as_one_process_does(checkpoint, one_process) -> None:
    moe = load_model(ModelSource(config(checkpoint("mixtral"), sharding="tensor_parallel")), ALONE)
    assert all(torch.equal(found, one_process("mixtral")[step]) for step, found in function_of(moe).items())


ALONE_WITH_ZERO3 = """
import sys, torch
sys.path.append(sys.argv[1])
from tiny_models import logits, tokens
from moe_evo.config.model import ModelConfig
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
config = ModelConfig(path=sys.argv[2], device="cpu", sharding="zero3", offload="cpu")
moe = load_model(ModelSource(config))
assert not moe.splits_examples
torch.save(logits(moe.language_model, tokens()), sys.argv[3])
again = load_model(ModelSource(ModelConfig(path=sys.argv[2], device="cpu")))  # must not go through ZeRO-3
assert again.layers[0].expert_tensors()["down_proj"].shape == (8, 32, 24)
"""


def test_one_process_can_offload_with_zero3_in_silence(checkpoint, one_process, tmp_path) -> None:
    script = [sys.executable, "-c", ALONE_WITH_ZERO3, str(Path(__file__).parents[1]), str(checkpoint("mixtral"))]
    done = subprocess.run([*script, str(tmp_path / "logits")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert torch.equal(torch.load(tmp_path / "logits"), one_process("mixtral")["base"])


def kept_on_disk(ranks: Ranks, path: str, folder: str) -> Found:
    return function_of(
        load_model(ModelSource(config(Path(path), sharding="zero3", offload="nvme", offload_folder=folder)), ranks)
    )


def can_read_disks(ranks: Ranks) -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def test_weights_on_disk_under_zero3(checkpoint, one_process, tmp_path) -> None:
    arguments = (kept_on_disk, 2, str(checkpoint("mixtral")), str(tmp_path))
    if not all(run_gang(can_read_disks, 1)):
        with pytest.raises(AssertionError, match=r"ConfigError: model\.offload: 'nvme' needs"):
            run_gang(*arguments)
        pytest.skip("DeepSpeed's async_io cannot be built here: it needs libaio-dev")
    for found in run_gang(*arguments, timeout_s=600):
        assert all(torch.equal(found[step], one_process("mixtral")[step]) for step in STEPS)


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_weights_on_disk_under_a_device_map(checkpoint, one_process, tmp_path, model_type: str) -> None:
    options = {"sharding": "device_map", "max_memory": {"cpu": "150KB"}, "offload_folder": str(tmp_path / "off")}
    moe = load_model(ModelSource(config(checkpoint(model_type), **options)))
    assert any(weight.is_meta for weight in moe.language_model.parameters())
    assert moe.device == torch.device("cpu") and not moe.splits_examples
    found = function_of(moe)
    assert all(torch.equal(found[step], one_process(model_type)[step]) for step in STEPS)
    with pytest.raises(ExportError, match="not in this process"):
        export_checkpoint(moe, moe.shape.identity(), tmp_path / "export", provenance={})


def test_a_device_map_without_limits_keeps_all_in_memory(checkpoint, one_process) -> None:
    moe = load_model(ModelSource(config(checkpoint("mixtral"), sharding="device_map")))
    assert all(is_whole(weight) for weight in moe.language_model.parameters())
    assert torch.equal(function_of(moe)["merged"], one_process("mixtral")["merged"])


def test_limits_may_name_gpus_by_number_or_text() -> None:
    limits = {0: "1GiB", "1": "2GiB", "cpu": "3GiB"}
    family, device = FAMILIES["mixtral"], torch.device("cpu")
    chosen = config(Path("x"), sharding="device_map", max_memory=limits)
    options = placement_options(chosen, family, None, device, ALONE)
    assert options["max_memory"] == {0: "1GiB", 1: "2GiB", "cpu": "3GiB"}


def test_experts_that_ranks_cannot_divide_are_refused_before_weights_are_read(tmp_path) -> None:
    tiny_model("mixtral", intermediate_size=15).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="15 wide, which 2 does not divide") as caught:
        load_model(ModelSource(config(tmp_path, sharding="tensor_parallel")), Ranks(0, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sharding", ["single", "device_map"])
def test_ranks_need_a_sharding_that_divides_the_model(checkpoint, sharding: str) -> None:
    with pytest.raises(ConfigError, match=f"got '{sharding}', which is for one process, with 2 ranks"):
        load_model(ModelSource(config(checkpoint("mixtral"), sharding=sharding)), Ranks(0, 2))


@pytest.mark.parametrize("sharding", ["tensor_parallel", "zero3"])
def test_ranks_with_gpus_cannot_be_asked_for_the_cpu(checkpoint, monkeypatch, sharding: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=f"got 'cpu', but {sharding} takes the GPUs"):
        load_model(ModelSource(config(checkpoint("mixtral"), sharding=sharding)), Ranks(0, 2))


def test_zero3_without_deepspeed_says_what_to_install(checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(zero3.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install moe_evo\[deepspeed\]"):
        load_model(ModelSource(config(checkpoint("mixtral"), sharding="zero3")), Ranks(0, 2))


def test_zero3_needs_to_know_the_dtype(checkpoint, tmp_path) -> None:
    folder = Path(shutil.copytree(checkpoint("mixtral"), tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("dtype")
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"config\.json names no dtype"):
        load_model(ModelSource(config(folder, sharding="zero3")), Ranks(0, 2))


def test_attention_is_whole_on_each_rank_where_heads_cannot_be_divided() -> None:
    family = FAMILIES["mixtral"]
    transformers_config = MixtralConfig(num_attention_heads=4, num_key_value_heads=2)
    assert family.tensor_parallel_plan(transformers_config, 2) == {}
    whole = family.tensor_parallel_plan(transformers_config, 4)
    assert set(whole.values()) == {"replicate"}
    assert {rule.rpartition(".")[2] for rule in whole} == {"q_proj", "k_proj", "v_proj", "o_proj"}
