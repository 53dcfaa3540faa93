"""Where weights are put: the arguments of transformers for each `model.sharding`, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import get_max_memory  # type: ignore[import-untyped]

from moe_evo.config.model import ModelConfig
from moe_evo.errors import ConfigError
from moe_evo.models.families import Family
from moe_evo.models.ranks import Ranks
from moe_evo.models.transformers_border import ALL_EXPERTS_FUNCTIONS, DistributedConfig, ExpertsInterface
from moe_evo.models.weight_shapes import local_shape, local_slice, whole_shape
from moe_evo.models.zero3 import check_deepspeed

GROUPED_MM = "moe_evo_grouped_mm"
"""transformers' grouped_mm under a name that its `generate` does not exchange, off the CPU, for batched_mm.

That copies the weights of every chosen expert for every row: gigabytes that no memory plan counts. At 32 rows this
one ran at 0.83 to 1.35 times the speed of that (docs/gpu.md).
"""
ExpertsInterface.register(GROUPED_MM, ALL_EXPERTS_FUNCTIONS["grouped_mm"])


def check_placement(config: ModelConfig, family: Family, transformers_config: Any, ranks: Ranks) -> None:
    """Raise ConfigError for what can be known to fail before weights are read."""
    if config.sharding == "tensor_parallel":
        family.check_tensor_parallel(transformers_config, ranks.size)
    elif config.sharding == "zero3":
        check_deepspeed()
        weights_dtype(config, transformers_config)
    elif ranks.size > 1:
        raise ConfigError(
            f"model.sharding: got {config.sharding!r}, which is for one process, with {ranks.size} ranks; "
            "use tensor_parallel or zero3"
        )


def check_device(config: ModelConfig, device: torch.device, ranks: Ranks) -> None:
    """Raise ConfigError where the libraries would put weights elsewhere than on `device`."""
    takes_gpus = config.sharding == "zero3" or ranks.size > 1
    if takes_gpus and device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            f"model.device: got {config.device!r}, but {config.sharding} takes the GPUs that are here; use 'auto', "
            "or hide them with CUDA_VISIBLE_DEVICES="
        )


def placement_options(
    config: ModelConfig, family: Family, transformers_config: Any, device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put weights in their places."""
    if config.sharding == "device_map":
        return {
            "device_map": "auto",
            "max_memory": _max_memory(config, device),
            "offload_folder": config.offload_folder,
        }
    if config.sharding == "zero3":
        return {}  # DeepSpeed takes each weight as it is made
    if config.sharding == "tensor_parallel" and ranks.size > 1:
        plan = family.tensor_parallel_plan(transformers_config, ranks.size)
        return {"distributed_config": DistributedConfig(tp_size=ranks.size, tp_plan=plan or None)}
    return {} if device.type == "cpu" else {"device_map": {"": device}}


def weights_dtype(config: ModelConfig, transformers_config: Any) -> torch.dtype:
    """The dtype that all weights will have; ConfigError where only the weights themselves tell it."""
    dtype = transformers_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError("model.dtype: got 'auto', but config.json names no dtype; with zero3 give one")
    return dtype


def input_device(language_model: Any, device: torch.device) -> torch.device:
    """Where inputs go: `device`, or with a device map the first device that computes."""
    places = [place for place in getattr(language_model, "hf_device_map", {}).values() if place != "disk"]
    computing = [place for place in places if place not in ("cpu", torch.device("cpu"))] or places
    return torch.device(computing[0]) if computing else device


def drop_repeated_biases(language_model: Any, family: Family, ranks: Ranks) -> None:
    """Keep biases of the experts' outputs on rank 0 only: under tensor parallelism ranks' outputs are summed."""
    if ranks.rank == 0:
        return
    with torch.no_grad():
        for name, weight in language_model.named_parameters():
            if name.rpartition(".")[2] in family.output_biases:
                local_slice(weight).zero_()


def suit_device(language_model: Any, device: torch.device) -> None:
    """Choose the kernels of attention and experts that are fast on `device` for batches of many shapes."""
    if device.type == "cuda":  # cuDNN's attention builds a plan for each new shape, which takes 70 ms on an H200
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not _suits_grouped_mm(language_model, device):
        language_model.set_experts_implementation("eager")
    elif device.type != "cpu":
        language_model.set_experts_implementation(GROUPED_MM)


def _suits_grouped_mm(language_model: Any, device: torch.device) -> bool:
    """Whether grouped_mm, the default of transformers, can compute the experts on `device` and is fast there.

    It needs weights whose rows are multiples of 16 bytes. On a CPU it is slow in 16 bits: computing one expert after
    the other ('eager') takes 0.55 to 0.9 of its time.
    """
    stacked = [weight for weight in language_model.parameters() if len(whole_shape(weight)) == 3]
    is_slow = device.type == "cpu" and any(weight.element_size() < 4 for weight in stacked)
    return not is_slow and all(local_shape(weight)[-1] * weight.element_size() % 16 == 0 for weight in stacked)


def _max_memory(config: ModelConfig, device: torch.device) -> dict[int | str, Any] | None:
    if config.max_memory is not None:  # keys from the command line are text
        return {int(key) if str(key).isdigit() else key: limit for key, limit in config.max_memory.items()}
    if device.type == "cpu":  # 'cpu' was asked for, though there may be GPUs
        return {"cpu": get_max_memory()["cpu"]}
    return None
