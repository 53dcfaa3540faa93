"""Sizes told from config.json alone, against models that are really built, sharded, run and exported."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import CONFIGS, random_merge, tiny_model, tokens
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_evo.config.model import ModelConfig
from moe_evo.errors import ModelError
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.families import FAMILIES
from moe_evo.models.size.memory import (
    exported_size,
    largest_block,
    memory_per_rank,
    merged_bytes,
    tensor_parallel_bytes,
)
from moe_evo.models.size.size import ModelSize, read_size, size_of
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel

PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "mixtral": (
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        46.70, 12.88,
    ),
    "qwen3_moe": (
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
         "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
         "num_experts": 128, "num_experts_per_tok": 8},
        30.53, 3.35,
    ),
    "olmoe": (
        {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
         "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
        6.92, 1.28,
    ),
}  # fmt: skip
"""Config, and billions of parameters: all, and those that one token meets."""

ODD = {
    "mixtral": {"vocab_size": 97},  # the last rank has fewer rows of the embeddings
    "qwen3_moe": {"num_key_value_heads": 1},  # attention stays whole
}


def tiny_size(model_type: str, *, ranks: int = 1, **changes: Any) -> ModelSize:
    model = tiny_model(model_type, **changes)
    return size_of(FAMILIES[model_type], model.config, torch.float32, ranks)


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_the_parameters_of_published_models_are_the_published_ones(model_type: str) -> None:
    values, total, active = PUBLISHED[model_type]
    config = AutoConfig.for_model(model_type, **values, tie_word_embeddings=False)
    size = size_of(FAMILIES[model_type], config, torch.bfloat16, 1)
    assert round(size.parameters / 1e9, 2) == total
    assert round(size.active_parameters / 1e9, 2) == active
    assert size.size == 2 * size.parameters


@pytest.mark.parametrize("model_type", CONFIGS)
def test_sizes_are_those_of_the_loaded_model(model_type: str, checkpoint: Callable[[str], Path]) -> None:
    size = read_size(ModelSource(ModelConfig(path=str(checkpoint(model_type)))), 1)
    state = tiny_model(model_type).state_dict()
    distinct = {tensor.data_ptr(): tensor for tensor in state.values()}.values()
    assert size.parameters == sum(tensor.numel() for tensor in distinct)
    assert size.size == sum(tensor.numel() * tensor.element_size() for tensor in distinct)
    experts = sum(tensor.numel() for name, tensor in state.items() if ".experts." in name)
    assert size.expert_parameters == experts
    assert memory_per_rank(size, "single").device == size.size


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_that_the_library_keeps_in_float32_count_as_such(
    model_type: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    path = str(checkpoint(model_type))
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    distinct = {tensor.data_ptr(): tensor for tensor in loaded.state_dict().values()}.values()
    expected = sum(tensor.numel() * tensor.element_size() for tensor in distinct)
    assert read_size(ModelSource(ModelConfig(path=path, dtype=dtype)), 1).size == expected


def test_a_config_without_a_dtype_takes_that_of_the_weights(tmp_path: Path) -> None:
    tiny_model("mixtral").bfloat16().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    lines = [line for line in file.read_text().splitlines() if '"dtype"' not in line]
    file.write_text("\n".join(lines))
    assert read_size(ModelSource(ModelConfig(path=str(tmp_path))), 1).dtype == "bfloat16"


def test_a_config_from_which_no_model_can_be_built_is_a_model_error(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("mixtral")
    broken = path.parent / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"")
    text = (path / "config.json").read_text().replace('"hidden_act": "silu"', '"hidden_act": "sliu"')
    (broken / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be used"):
        read_size(ModelSource(ModelConfig(path=str(broken))), 1)


def _sharded_bytes(rank: int, folder: Path) -> None:
    """Load each checkpoint in `folder` on one of two ranks; write the bytes of its local slices."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    lines = []
    for path in sorted(one for one in folder.iterdir() if one.is_dir()):
        config = AutoConfig.from_pretrained(path)
        plan = FAMILIES[config.model_type].tensor_parallel_plan(config, 2)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=2, tp_plan=plan or None)
        )
        transient = {name for name, _ in model.named_non_persistent_buffers()}
        tensors = [*model.parameters(), *(one for name, one in model.named_buffers() if name not in transient)]
        local = [one.to_local() if hasattr(one, "to_local") else one for one in tensors]
        lines.append(f"{path.name} {sum(one.numel() * one.element_size() for one in local)}\n")
    (folder / f"bytes-{rank}").write_text("".join(lines))
    dist.destroy_process_group()


def test_tensor_parallel_ranks_hold_exactly_the_bytes_that_are_told(tmp_path: Path) -> None:
    changes = {model_type: {} for model_type in CONFIGS} | {f"{name}-odd": odd for name, odd in ODD.items()}
    predicted = {}
    for name, changed in changes.items():
        model_type = name.removesuffix("-odd")
        tiny_model(model_type, **changed).save_pretrained(tmp_path / name)
        predicted[name] = tiny_size(model_type, ranks=2, **changed)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_sharded_bytes, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=250)
    assert [process.exitcode for process in ranks] == [0, 0]
    for rank in (0, 1):
        found = dict(line.split() for line in (tmp_path / f"bytes-{rank}").read_text().splitlines())
        told = {name: str(tensor_parallel_bytes(size, rank)) for name, size in predicted.items()}
        assert found == told
    fullest = {name: memory_per_rank(size, "tensor_parallel").device for name, size in predicted.items()}
    assert all(fullest[name] < 0.8 * size.size for name, size in predicted.items())


def test_experts_that_ranks_cannot_share_evenly_are_a_refusal() -> None:
    assert tiny_size("mixtral", ranks=2).tensor_parallel_refusal == ""
    assert "24 wide" in tiny_size("mixtral", ranks=5).tensor_parallel_refusal


@pytest.mark.parametrize("model_type", CONFIGS)
def test_zero3_divides_every_parameter_and_gathers_module_after_module(model_type: str) -> None:
    model = tiny_model(model_type)
    size = tiny_size(model_type, ranks=3)
    slices = sum(-(-one.numel() // 3) * 4 for one in model.parameters())
    transient = {name for name, _ in model.named_non_persistent_buffers()}
    buffers = sum(one.numel() * 4 for name, one in model.named_buffers() if name not in transient)
    own = (sum(one.numel() * 4 for one in module.parameters(recurse=False)) for module in model.modules())
    on_device, on_host, on_disk = (memory_per_rank(size, "zero3", offload) for offload in ("none", "cpu", "nvme"))
    assert (on_device.device, on_device.host, on_device.disk) == (slices + buffers, 0, 0)
    assert (on_host.device, on_host.host, on_host.disk) == (buffers, slices, 0)
    largest = max(one.numel() * 4 for one in model.parameters())
    assert (on_disk.device, on_disk.host, on_disk.disk) == (buffers, 5 * largest, slices)
    assert {on_device.gathered, on_host.gathered, on_disk.gathered} == {2 * max(own)}


def test_a_device_map_may_give_one_device_a_block_more_than_its_share() -> None:
    size = tiny_size("mixtral", ranks=2)
    layer = tiny_model("mixtral").model.layers[0]
    assert largest_block(size) == sum(one.numel() * 4 for one in layer.parameters())
    assert memory_per_rank(size, "device_map").device == size.size // 2 + largest_block(size)
    assert memory_per_rank(tiny_size("mixtral"), "device_map").device == size.size


@pytest.mark.parametrize("model_type", CONFIGS)
def test_merged_layers_and_the_checkpoint_are_as_large_as_told(
    model_type: str, load: Callable[[str], MoEModel], tmp_path: Path
) -> None:
    moe = load(model_type)
    genome = random_merge(moe.shape, 4)
    size = tiny_size(model_type)
    needed = sum(layer.merged_bytes(gene.expert_merging) for layer, gene in zip(moe.layers, genome.layers, strict=True))
    assert merged_bytes(size, genome.num_kept, "single") == needed
    report = export_checkpoint(moe, genome, tmp_path / "exported", provenance={})
    assert exported_size(size, genome.num_kept) == (report.parameters_after, report.bytes_after)


def test_tensor_parallel_ranks_merge_their_own_slices() -> None:
    size = tiny_size("mixtral", ranks=2)
    kept = (4,) * 3
    assert 2 * merged_bytes(size, kept, "tensor_parallel") == merged_bytes(size, kept, "zero3")


WIDER = {
    "hidden_size": 128, "intermediate_size": 320, "moe_intermediate_size": 32, "num_attention_heads": 8,
    "num_key_value_heads": 8, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "n_routed_experts": 32, "num_experts_per_tok": 8, "n_group": 4, "topk_group": 2,
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "changes"), [*((name, {}) for name in CONFIGS), ("deepseek_v3", WIDER)])
def test_activations_stay_within_the_bound_and_the_bound_within_reason(
    model_type: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(model_type, **changes)
    size = size_of(FAMILIES[model_type], model.config, torch.float32, 1)
    batch = tokens(batch=8, length=64)
    tracker = MemTracker()
    tracker.track_external(model)
    with torch.inference_mode(), tracker:
        model(input_ids=batch, use_cache=False, logits_to_keep=1)
    weights = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Parameter"]
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - weights
    bound = size.activations.bound(batch.numel(), batch.shape[1], 4)
    assert peak <= bound <= 3 * peak, (peak, bound)
