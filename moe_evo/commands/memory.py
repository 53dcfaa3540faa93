"""The memory that each mode of sharding needs on each rank of a gang, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_evo.config.model import Offload, Sharding
from moe_evo.config.run import RunConfig
from moe_evo.errors import ConfigError, Problems
from moe_evo.genomes.space import SearchSpace
from moe_evo.report.planned import MemoryPlan, ModeMemory
from moe_evo.runs.workload import merges
from moe_evo.tasks.data import TaskData

if TYPE_CHECKING:  # torch is imported when a model is looked at, not before
    from moe_evo.models.size.size import ModelSize

MODES: tuple[tuple[Sharding, Offload], ...] = (
    ("single", "none"),
    ("device_map", "none"),
    ("tensor_parallel", "none"),
    ("zero3", "none"),
    ("zero3", "cpu"),
    ("zero3", "nvme"),
)


def planned_memory(
    config: RunConfig,
    data: Sequence[TaskData],
    size: ModelSize,
    space: SearchSpace | None,
    device_bytes: int | None,
    problems: Problems,
    notes: list[str],
) -> MemoryPlan:
    """For each mode of sharding, the memory of a rank for weights, caches and a batch, and whether it fits."""
    batch = _batch_bytes(config, data, size)
    modes = [_mode(config, size, space, sharding, offload, batch, device_bytes) for sharding, offload in MODES]
    chosen = next(mode for mode in modes if mode.chosen)
    if device_bytes is not None and chosen.fits is False:
        weights = chosen.device_bytes + chosen.gathered_bytes
        would = [_mode_name(mode) for mode in modes if mode.fits]
        line = (
            f"model.sharding: {_mode_name(chosen)} needs {_gib(weights)} a rank for weights and "
            f"{_gib(sum(batch.values()))} for a batch, the device has {_gib(device_bytes)}"
        )
        if weights <= device_bytes:
            notes.append(f"{line}; lower evaluation.batch_tokens if memory runs out")
        elif chosen.sharding == "device_map":
            notes.append(f"{line}; what finds no room goes to the CPU's memory or to disk, which is slow")
        elif would:
            problems.add(ConfigError(f"{line}; with gangs of {size.ranks} these fit: {', '.join(would)}"))
        else:
            problems.add(
                ConfigError(f"{line}; give a larger cluster.gang_size, or model.sharding zero3 with model.offload cpu")
            )
    if device_bytes is not None and chosen.merged_fit is False and chosen.fits:
        notes.append(
            "the merged layers of one genome may not fit beside the weights: what does not is merged anew in every "
            "forward pass; keep fewer experts, or only prune"
        )
    return MemoryPlan(size.ranks, device_bytes, tuple(modes), **batch)


def _batch_bytes(config: RunConfig, data: Sequence[TaskData], size: ModelSize) -> dict[str, int]:
    """Upper bounds of a batch's memory: its logits in float32, and its activations.

    A row longer than the limit on a batch's tokens is a batch of its own.
    """
    from moe_evo.tasks.batches import MAX_LOGITS

    longest = max(task.max_length for task in config.tasks)
    tokens = max(config.evaluation.batch_tokens, longest)
    whole_texts = [one.config.max_length for one in data if one.kind in ("perplexity", "distillation")]
    numbers = max(min(tokens * size.vocabulary, MAX_LOGITS), max(whole_texts, default=1) * size.vocabulary)
    generates = any(one.kind == "generation" for one in data)
    activations = size.activations.bound(tokens, longest, size.itemsize, generates=generates)
    return {"logits_bytes": 4 * numbers, "activations_bytes": activations}


def _mode(
    config: RunConfig,
    size: ModelSize,
    space: SearchSpace | None,
    sharding: Sharding,
    offload: Offload,
    batch: Mapping[str, int],
    device_bytes: int | None,
) -> ModeMemory:
    from moe_evo.models.size.memory import memory_per_rank, merged_bytes

    memory = memory_per_rank(size, sharding, offload)
    is_merged = space is not None and merges(config.search, can_prune=space.can_prune)
    merged = merged_bytes(size, space.num_kept, sharding) if space is not None and is_merged else 0
    refusal = size.tensor_parallel_refusal or None if sharding == "tensor_parallel" else None
    needed = memory.device + memory.gathered + sum(batch.values())
    fits = None if device_bytes is None or refusal else needed <= device_bytes
    limit = config.model.merged_cache_gib
    budget = None if device_bytes is None else (device_bytes - memory.device) // 2  # the cache's own default
    cache_bytes = budget if limit is None else int(limit * 2**30)
    return ModeMemory(
        sharding=sharding,
        offload=offload,
        chosen=(sharding, offload) == (config.model.sharding, config.model.offload),
        ranks=1 if sharding == "single" else size.ranks,
        device_bytes=memory.device,
        gathered_bytes=memory.gathered,
        host_bytes=memory.host,
        disk_bytes=memory.disk,
        merged_bytes=merged,
        needed_bytes=needed,
        fits=fits,
        merged_fit=None if cache_bytes is None else merged <= cache_bytes,
        refusal=refusal,
    )


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"


def _mode_name(mode: ModeMemory) -> str:
    return mode.sharding if mode.offload == "none" else f"{mode.sharding} with offload {mode.offload}"
