"""The result of `moe-evo plan` as frozen values. Sizes are in bytes; a part that could not be planned is None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_evo.config.model import Offload, Sharding
from moe_evo.errors import Problem
from moe_evo.plain import Plain


@dataclass(frozen=True)
class ModelPlan:
    """Sizes of the model, read from its config and weight headers. num_experts, top_k: one number a MoE layer."""

    path: str
    family: str
    dtype: str
    decoder_layers: int
    moe_layers: int
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    parameters: int
    expert_parameters: int
    active_parameters: int
    bytes: int


@dataclass(frozen=True)
class TaskPlan:
    """A task whose data are valid.

    metric: what is reported. search_metric: what the search maximises. examples: how many, by split. resolution: in
    words, what the test split can tell.
    """

    name: str
    kind: str
    metric: str
    search_metric: str
    examples: Mapping[str, int] = field(hash=False)
    resolution: str


@dataclass(frozen=True)
class SearchPlan:
    """The search. log10_prunings: logarithm of the number of prunings in the space. evaluations: at most, by split.

    num_kept, top_k: one number a MoE layer. num_kept_range: the fewest and the most experts that a layer may keep,
    where the search chooses; then `num_kept` is what each keeps where all keep as many. top_k_range: the same of top_k.
    objectives: what is maximised. recovered_finalists: how many are recovered before the winner is chosen.
    recovery_evaluations: the part of the budget that this is counted as. recovery_bytes: memory that a finalist takes
    meanwhile, beside the full model and activations.
    """

    algorithm: str
    num_kept: tuple[int, ...]
    top_k: tuple[int, ...]
    log10_prunings: float
    merges: bool
    evaluations: Mapping[str, int] = field(hash=False)
    num_kept_range: tuple[int, int] | None = None
    top_k_range: tuple[int, int] | None = None
    objectives: tuple[str, ...] = ("quality",)
    recovered_finalists: int = 0
    recovery_evaluations: int = 0
    recovery_bytes: int = 0


@dataclass(frozen=True)
class ModeMemory:
    """The memory that one mode of sharding needs on the rank that needs most.

    chosen: whether it is the config's mode. device, gathered, host, disk: weights on the device, weights gathered
    there for a layer, and weights in host memory and on disk. merged: the merged layers of one genome. needed: weights
    and a batch. fits, merged_fit: None where the device's memory is not known. refusal: why the mode is not possible.
    """

    sharding: Sharding
    offload: Offload
    chosen: bool
    ranks: int
    device_bytes: int
    gathered_bytes: int
    host_bytes: int
    disk_bytes: int
    merged_bytes: int
    needed_bytes: int
    fits: bool | None
    merged_fit: bool | None
    refusal: str | None


@dataclass(frozen=True)
class MemoryPlan:
    """Memory for each mode of sharding. device_bytes: of one rank. logits, activations: upper bounds for a batch."""

    gang_size: int
    device_bytes: int | None
    modes: tuple[ModeMemory, ...]
    logits_bytes: int
    activations_bytes: int

    @property
    def chosen(self) -> ModeMemory:
        """The config's mode of sharding."""
        return next(mode for mode in self.modes if mode.chosen)


@dataclass(frozen=True)
class CheckpointPlan:
    """What the exported checkpoint will be; loader: 'transformers', or 'moe_evo' where layers differ.

    most_parameters: of the largest point of a front, where sizes differ; `parameters` and `bytes` are the smallest's.
    """

    parameters: int
    bytes: int
    loader: str
    most_parameters: int | None = None


@dataclass(frozen=True)
class ClusterPlan:
    """How many gangs fit on the free resources and on the whole cluster; gangs: how many would run."""

    nodes: int
    needs: str
    gangs_free: int
    gangs_whole: int
    gangs: int


@dataclass(frozen=True)
class Estimate:
    """The time of a run whose evaluations take `evaluation_s` seconds on one gang; hours: by split."""

    evaluation_s: float
    gangs: int
    evaluations_per_h: float
    hours: Mapping[str, float] = field(hash=False)
    total_h: float

    def to_plain(self) -> Plain:
        """A flat dict, with the hours of a split under a key such as `search_h`."""
        hours = {f"{split}_h": hours for split, hours in self.hours.items()}
        head = {name: getattr(self, name) for name in ("evaluation_s", "gangs", "evaluations_per_h")}
        return {**head, **hours, "total_h": self.total_h}


@dataclass(frozen=True)
class RecoveryPlan:
    """What `--recover` takes at most.

    prompts: how many are learned from. positions: tokens of these and of the validation split's, with answers of full
    length. lesson_bytes: on disk, what the full model says of them. block_bytes: on disk, what its layers put out.
    trained_numbers: how many numbers gradient steps change; 0 without such steps. training_bytes: memory of weights,
    gradients and moments in training, beside activations; of one worker's device where workers train. workers: that
    train together; 1 where this process trains. host_bytes, disk_bytes: of what one worker offloads.
    """

    prompts: int
    positions: int
    lesson_bytes: int
    block_bytes: int
    trained_numbers: int
    training_bytes: int
    workers: int = 1
    host_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that can be known of a run before it starts.

    problems: why the search would not start, or would fail. notes: remarks on what the user may not expect. warnings:
    of splits with few examples. cluster: None for a run in one process. estimate: None where no evaluation was
    measured. recovery: None where none is asked for.
    """

    model: ModelPlan | None
    tasks: tuple[TaskPlan, ...]
    search: SearchPlan | None
    memory: MemoryPlan | None
    checkpoint: CheckpointPlan | None
    cluster: ClusterPlan | None
    estimate: Estimate | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    recovery: RecoveryPlan | None = None
    warnings: tuple[str, ...] = ()
