"""DeepSpeed ZeRO-3 inference: every rank holds a slice of every weight and gathers one module at a time.

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
from moe_evo.errors import ConfigError, ModelError
from moe_evo.models.ranks import join_ranks
from moe_evo.models.transformers_border import LIBRARY_ERRORS, HfDeepSpeedConfig, one_line, transformers
from moe_evo.versions import ADVICE

_ALONE_TIMEOUT_S = 60.0  # nobody to wait for


def check_deepspeed() -> None:
    """Raise ConfigError where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("model.sharding: 'zero3' needs DeepSpeed; pip install moe_evo[deepspeed]")


def load_zero3(load: Callable[[], Any], config: ModelConfig, transformers_config: Any, dtype: torch.dtype) -> Any:
    """The model that `load` reads with transformers, sharded among the ranks of the process group.

    Without a process group this process is the only rank: a single GPU, too, can offload. Raises
    ConfigError where disks cannot be read from, ModelError where DeepSpeed refuses the model.
    """
    # its gathers, in every pass, use a name that torch is about to drop
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what DeepSpeed deprecates in itself and in torch
        deepspeed = imported_deepspeed()
        on_gpu = torch.cuda.is_available()
        if not dist.is_initialized():
            join_ranks(0, 1, "127.0.0.1", 0, _ALONE_TIMEOUT_S)
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False)
        if config.offload == "nvme" and not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(
                "model.offload: 'nvme' needs DeepSpeed's async_io, which cannot be built here; "
                "install libaio-dev, or use 'cpu'"
            )
        settings = _settings(config, transformers_config, dtype, on_gpu=on_gpu)
        in_force: Any = HfDeepSpeedConfig(settings)  # type: ignore[no-untyped-call]
        try:
            language_model = load().eval()
        finally:
            del in_force  # while it lives, every model that this process loads goes through ZeRO-3
        try:
            engine = deepspeed.initialize(model=language_model, config=settings)[0]
        except LIBRARY_ERRORS as error:
            raise ModelError(f"{config.path}: DeepSpeed cannot shard it ({one_line(error)})") from error
    # an engine that is collected takes its hooks off the model; not a submodule, as that would be a cycle
    language_model.__dict__["zero3_engine"] = engine
    return language_model.eval()


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


def _settings(config: ModelConfig, transformers_config: Any, dtype: torch.dtype, *, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's config, in which all weights are sharded, however small."""
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if config.offload != "none":
        zero["offload_param"] = {"device": config.offload, "pin_memory": on_gpu}
    if config.offload == "nvme":
        largest = _largest_weight(transformers_config)
        zero["offload_param"] |= {"nvme_path": config.offload_folder, "buffer_size": largest}
    return {
        "train_micro_batch_size_per_gpu": 1,  # demanded, but means nothing without training
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def _largest_weight(transformers_config: Any) -> int:
    """Numbers in the model's largest weight: what a buffer between disk and memory must hold."""
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(transformers_config)
    return max(int(weight.numel()) for weight in shell.parameters())
