"""DeepSpeed's ZeRO-3: every rank holds a slice of every weight and gathers one module at a time.

Each rank runs its own inputs, and all must run equally many forward passes. This is the only file that imports
DeepSpeed; it does so when a model is loaded.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import Stage
from moe_evo.errors import ConfigError, ModelError
from moe_evo.models.ranks import join_ranks
from moe_evo.models.transformers_border import LIBRARY_ERRORS, HfDeepSpeedConfig, one_line, transformers
from moe_evo.versions import ADVICE

_ALONE_TIMEOUT_S = 60.0  # nobody to wait for
BUCKET = 50_000_000
"""Numbers of gradients that are summed over the ranks at a time, at most; the library's 5e8 would take gigabytes."""


def check_deepspeed(what: str = "model.sharding: 'zero3'") -> None:
    """Raise ConfigError where DeepSpeed is not installed; what: the option that needs it, and its value."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{what} needs DeepSpeed; pip install moe_evo[deepspeed]")


def load_zero3(load: Callable[[], Any], config: ModelConfig, transformers_config: Any, dtype: torch.dtype) -> Any:
    """The model that `load` reads with transformers, sharded among the ranks of the process group.

    Without a process group this process is the only rank: a single GPU, too, can offload. Raises
    ConfigError where disks cannot be read from, ModelError where DeepSpeed refuses the model.
    """
    settings = zero3_settings(config, transformers_config, dtype)
    language_model = load_slices(load, config, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            engine = imported_deepspeed().initialize(model=language_model, config=settings)[0]
        except LIBRARY_ERRORS as error:
            raise ModelError(f"{config.path}: DeepSpeed cannot shard it ({one_line(error)})") from error
    # an engine that is collected takes its hooks off the model; not a submodule, as that would be a cycle
    language_model.__dict__["zero3_engine"] = engine
    return language_model.eval()


def load_slices(load: Callable[[], Any], config: ModelConfig, settings: dict[str, Any]) -> Any:
    """The model that `load` reads, of whose weights each rank holds a slice; it computes with an engine only.

    settings: DeepSpeed's config, of `zero3_settings`.
    """
    join_deepspeed(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_force: Any = HfDeepSpeedConfig(settings)  # type: ignore[no-untyped-call]
        try:
            return load().eval()
        finally:
            del in_force  # while it lives, every model that this process loads goes through ZeRO-3


def join_deepspeed(config: ModelConfig) -> None:
    """Let DeepSpeed use the process group, or one of this process alone where there is none."""
    # its gathers, in every pass, use a name that torch is about to drop
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what DeepSpeed deprecates in itself and in torch
        deepspeed = imported_deepspeed()
        if not dist.is_initialized():
            join_ranks(0, 1, "127.0.0.1", 0, _ALONE_TIMEOUT_S)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
        if config.offload == "nvme" and not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(
                "model.offload: 'nvme' needs DeepSpeed's async_io, which cannot be built here; "
                "install libaio-dev, or use 'cpu'"
            )


def imported_deepspeed() -> Any:
    """The library; without a GPU with a kernel switched off that compiles for minutes, then crashes.

    Raises ModelError where this version has no such switch.
    """
    import deepspeed  # type: ignore[import-untyped]

    if not torch.cuda.is_available():  # the kernel, for shared memory, works with DeepSpeed's own launcher only
        try:
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        except AttributeError as error:
            raise ModelError(
                f"DeepSpeed {deepspeed.__version__} has no ops.__compatible_ops__, where the switches of its kernels "
                f"were expected; {ADVICE}"
            ) from error
    return deepspeed


def zero3_settings(config: ModelConfig, transformers_config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's config, in which all weights are sharded, however small."""
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if config.offload != "none":
        zero["offload_param"] = offload_settings(config)
    if config.offload == "nvme":
        zero["offload_param"]["buffer_size"] = _largest_weight(transformers_config)
    return precision_settings(dtype) | {
        "train_micro_batch_size_per_gpu": 1,  # demanded; it only scales DeepSpeed's own reports
        "zero_optimization": zero,
    }


def training_settings(
    config: ModelConfig, transformers_config: Any, dtype: torch.dtype, stage: Stage
) -> dict[str, Any]:
    """DeepSpeed's config for training with any of torch's optimizers.

    stage: 2 divides gradients, float32 weights and moments among the ranks, 3 the model's weights, too. These lie where
    `config.offload` says; under stage 2 the weights stay on the device.
    """
    settings = zero3_settings(config, transformers_config, dtype)
    zero = settings["zero_optimization"]
    if stage == 2:
        zero = {"stage": 2}
    if config.offload != "none":
        zero["offload_optimizer"] = offload_settings(config)
    return settings | {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's own
        "zero_force_ds_cpu_optimizer": False,  # which would be compiled; torch's is fused on a CPU, too
    }


def offload_settings(config: ModelConfig) -> dict[str, Any]:
    """DeepSpeed's config of a place beside the GPU."""
    place = {"nvme_path": config.offload_folder} if config.offload == "nvme" else {}
    return {"device": config.offload, "pin_memory": torch.cuda.is_available(), **place}


def precision_settings(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's config of the number format that weights have."""
    return {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}


def _largest_weight(transformers_config: Any) -> int:
    """Numbers in the model's largest weight: what a buffer between disk and memory must hold."""
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(transformers_config)
    return max(int(weight.numel()) for weight in shell.parameters())
