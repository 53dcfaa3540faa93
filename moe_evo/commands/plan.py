"""What a run would need, computed before weights are read: sizes, memory a rank, gangs, time, and all problems.

`plan` does not use Ray: its caller gives the `ClusterCapacity` in which gangs are counted, and a function
that measures the time of an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moe_evo.commands.memory import planned_memory
from moe_evo.config.model import MOST_GIB
from moe_evo.config.recover import RecoverConfig
from moe_evo.config.run import RunConfig
from moe_evo.config.task import SPLITS
from moe_evo.errors import ClusterError, ConfigError, Problem, Problems
from moe_evo.gangs.capacity import ClusterCapacity, gangs_that_fit
from moe_evo.genomes.bounds import Bounds
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.records.folder import default_folder
from moe_evo.report.planned import CheckpointPlan, ClusterPlan, ModelPlan, Plan, RecoveryPlan, SearchPlan, TaskPlan
from moe_evo.runs.checks import Inspection, inspect
from moe_evo.runs.early_warnings import resolution_of, split_warnings
from moe_evo.runs.open_pool import open_pool
from moe_evo.runs.recovery_cost import recipe, recovery_cost
from moe_evo.runs.workload import estimate, evaluations_by_split, merges
from moe_evo.searches.enumeration import num_prunings
from moe_evo.searches.registry import build_space
from moe_evo.tasks.data import TaskData, check_tasks
from moe_evo.tracking.terminal import TerminalTracker

if TYPE_CHECKING:  # torch is imported when a model is looked at, not before
    from moe_evo.models.size.size import ModelSize

_CALIBRATIONS = 3


def plan(
    config: RunConfig,
    *,
    capacity: ClusterCapacity | None = None,
    memory_gib: float | None = None,
    calibrate: Callable[[], float] | None = None,
    recover: RecoverConfig | None = None,
) -> Plan:
    """The plan of a run: everything that can be known before it starts; raises no MoeEvoError.

    capacity: the cluster's nodes, where there is a cluster. memory_gib: memory of the device of one rank;
    default: what is free here, for a run in this process. calibrate: measures the seconds that one
    evaluation on the search split takes on one gang; called where nothing is wrong. recover: how the winner is to
    learn from the full model, if it is.

    `problems` of the returned plan would stop the search; `notes` are remarks on what the user may not expect.
    """
    found = inspect(config)
    data, size, space = found.data, found.size, found.space
    problems, notes = Problems(), _notes(config, found)
    for one in found.problems:
        problems.add(one.error)
    device_bytes = _device_bytes(config, memory_gib)
    memory = None if size is None else planned_memory(config, data, size, space, device_bytes, problems, notes)
    cluster = None if capacity is None else _cluster(config, capacity, problems, notes)
    time = None
    if calibrate is not None and not problems.found and not found.absent and space is not None:
        with problems.noted():
            examples = {split: sum(len(one.splits[split]) for one in data) for split in SPLITS}
            counts = evaluations_by_split(config, _sizes(data), can_prune=space.can_prune)
            time = estimate(counts, examples, calibrate(), 1 if cluster is None else max(cluster.gangs, 1))
    recovery = None
    if recover is not None:
        with problems.noted():
            recovery = _recovery(config, recover, size, space)
    return Plan(
        model=None if size is None else _model_plan(config, size),
        tasks=tuple(_task_plan(one) for one in data),
        search=None if space is None or size is None else _search_plan(config, data, space, size),
        memory=memory,
        checkpoint=None if size is None or space is None else _checkpoint(size, space),
        cluster=cluster,
        estimate=time,
        problems=problems.found,
        notes=tuple(notes),
        warnings=tuple(split_warnings(data, config.evaluation.fitness)) if data else (),
        recovery=recovery,
    )


def planned(
    config: RunConfig,
    memory_gib: float | None,
    recover: RecoverConfig | None = None,
    *,
    calibrate: bool,
    tracker: TerminalTracker,
) -> Plan:
    """`plan` for the cluster that the config names; calibrate: also measure the time of an evaluation there.

    A cluster that cannot be reached becomes one of the plan's problems.
    """
    if memory_gib is not None and not 0 < memory_gib <= MOST_GIB:
        raise ConfigError(f"--memory_gib: got {memory_gib:g}, expected more than 0, at most {MOST_GIB:,}")
    if config.cluster.address is None:
        measure = _stopwatch(config, tracker) if calibrate else None
        return plan(config, memory_gib=memory_gib, calibrate=measure, recover=recover)
    from moe_evo.gangs.connection import cluster_capacity, connected

    try:
        with connected(config.cluster.address):
            capacity = cluster_capacity(config.model, config.cluster)
            measure = _stopwatch(config, tracker) if calibrate else None
            return plan(config, capacity=capacity, memory_gib=memory_gib, calibrate=measure, recover=recover)
    except ClusterError as error:
        answer = plan(config, memory_gib=memory_gib, recover=recover)
        return replace(answer, problems=(*answer.problems, Problem.of(error)))


def _stopwatch(config: RunConfig, tracker: TerminalTracker) -> Callable[[], float]:
    """Measures the seconds of an evaluation on the search split, on one gang, with random genomes of the space."""

    def measure() -> float:
        from moe_evo.evaluation.pool import Request
        from moe_evo.models.source import ModelSource

        source = ModelSource(config.model)
        space = build_space(source.shape, config.search)
        is_local = config.cluster.address is None
        one_gang = config if is_local else replace(config, cluster=replace(config.cluster, num_gangs=1))
        genomes = [random_pruning(space, np.random.default_rng(seed)) for seed in range(1 + _CALIBRATIONS)]
        with open_pool(one_gang, source, check_tasks(config.tasks), tracker) as pool:
            pool.listener = tracker.pool
            durations = []
            for number, genome in enumerate(genomes):
                pool.submit([Request("calibration", number, genome, "search")])
                ((_, outcome),) = pool.next_outcomes()
                durations.append(outcome.duration_s)
        return sum(durations[1:]) / _CALIBRATIONS  # the first one also warms up

    return measure


def require_no_problems(answer: Plan) -> None:
    """Raise ConfigError in one line where `plan` found problems."""
    problems = answer.problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"this run cannot start: {problems[0]}{more}")


def _device_bytes(config: RunConfig, memory_gib: float | None) -> int | None:
    """Memory of one rank's device: `memory_gib`, or else, for a run in this process, the free memory."""
    from moe_evo.models.free_memory import free_bytes
    from moe_evo.models.load import resolve_device

    if memory_gib is not None:
        return int(memory_gib * 2**30)
    if config.cluster.address is not None:  # a cluster's devices are not those of this machine
        return None
    try:
        return free_bytes(resolve_device(config.model.device))
    except ConfigError:  # it is among the plan's problems already
        return None


def _notes(config: RunConfig, found: Inspection) -> list[str]:
    """What the search would do if its folder holds the run already, what its prompts are, and which files it lacks."""
    folder = config.folder or default_folder(config)
    notes = {
        "new": [],
        "begun": [f"{folder}: holds this run; the search goes on where it stands"],
        "finished": [f"{folder}: this run is finished; the search would only show it"],
    }
    prompts = [note for task in found.tasks for note in task.notes]
    absent = [f"{one}; this plan does without, a search does not" for one in found.absent]
    return [*notes[found.state], *prompts, *absent]


def _model_plan(config: RunConfig, size: ModelSize) -> ModelPlan:
    shape = size.shape
    return ModelPlan(
        path=config.model.path,
        family=shape.family,
        dtype=size.dtype,
        decoder_layers=size.num_decoder_layers,
        moe_layers=shape.num_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        parameters=size.parameters,
        expert_parameters=size.expert_parameters,
        active_parameters=size.active_parameters,
        bytes=size.size,
    )


def _task_plan(data: TaskData) -> TaskPlan:
    examples = {split: len(data.splits[split]) for split in SPLITS}
    return TaskPlan(data.name, data.kind, data.metric, data.search_metric, examples, resolution_of(data))


def _sizes(data: Sequence[TaskData]) -> dict[str, list[int]]:
    """By split, how many examples each task has; one where no task can be read."""
    return {split: [len(one.splits[split]) for one in data] or [1] for split in SPLITS}


def _search_plan(config: RunConfig, data: Sequence[TaskData], space: SearchSpace, size: ModelSize) -> SearchPlan:
    recovered, sizes = config.selection.recover_finalists, _sizes(data)
    return SearchPlan(
        algorithm=config.search.algorithm,
        num_kept=space.num_kept,
        top_k=space.top_k,
        log10_prunings=math.log10(num_prunings(space)),  # the number itself can have thousands of digits
        merges=merges(config.search, can_prune=space.can_prune),
        evaluations=evaluations_by_split(config, sizes, can_prune=space.can_prune),
        num_kept_range=_range(space.kept_bounds),
        top_k_range=_range(space.top_k_bounds),
        objectives=tuple(config.search.objectives),
        recovered_finalists=recovered,
        recovery_evaluations=recovery_cost(config, sizes["search"], space.shape.num_layers),
        recovery_bytes=_finalist_bytes(config, size, space) if recovered else 0,
    )


def _finalist_bytes(config: RunConfig, size: ModelSize, space: SearchSpace) -> int:
    """Memory of a finalist that is recovered: its weights, and what is trained of them."""
    from moe_evo.recovery.methods import RECOVERY_METHODS, Distillation
    from moe_evo.recovery.training_size import training_bytes

    recover = recipe(config.selection)
    methods = [RECOVERY_METHODS.get(name, "selection.recover_finalists") for name in recover.methods]
    parts = [method.trained(recover) for method in methods if isinstance(method, Distillation)]
    return max(training_bytes(size, space.num_kept, one, recover.rank, checkpointing=False) for one in [(), *parts])


def _recovery(
    config: RunConfig, recover: RecoverConfig, size: ModelSize | None, space: SearchSpace | None
) -> RecoveryPlan | None:
    """What the recovery of the winner takes; raises where it could not be done. None where the model is invalid."""
    from moe_evo.commands.recovery_input import of_winner, planned_recovery

    aim, _ = of_winner(config, recover)
    return None if size is None or space is None else planned_recovery(aim, size, space.num_kept)


def _range(bounds: Bounds | None) -> tuple[int, int] | None:
    return None if bounds is None else (min(bounds.fewest), max(bounds.most))


def _checkpoint(size: ModelSize, space: SearchSpace) -> CheckpointPlan:
    from moe_evo.models.size.memory import exported_size

    is_uniform = len(set(space.num_kept)) == 1 and len(set(space.top_k)) == 1
    may_differ = space.kept.varies or space.active.varies
    loader = "transformers" if is_uniform and not may_differ else "moe_evo"
    if space.kept_bounds is None or space.kept_bounds.total is not None:
        return CheckpointPlan(*exported_size(size, space.num_kept), loader)
    layers = space.shape.num_layers
    smallest, largest = (exported_size(size, [one] * layers) for one in _range(space.kept_bounds) or ())
    return CheckpointPlan(*smallest, loader, largest[0])


def _cluster(config: RunConfig, capacity: ClusterCapacity, problems: Problems, notes: list[str]) -> ClusterPlan:
    """How many gangs fit on the whole cluster, and on its free resources; `gangs` is how many would run."""
    cluster, ranks = config.cluster, 1 if config.model.sharding == "device_map" else config.cluster.gang_size
    whole, free = (
        gangs_that_fit(capacity.nodes, capacity.bundle, ranks, cluster.strategy, cluster.labels, of=of)
        for of in ("total", "available")
    )
    amounts = ", ".join(f"{name} {amount:g}" for name, amount in capacity.bundle.items())
    labels = f" on nodes with {cluster.labels}" if cluster.labels else ""
    needs = f"{ranks} x ({amounts}){labels}, {cluster.strategy}"
    if whole == 0:
        what = f"cluster: no gang of {needs} fits on the {len(capacity.nodes)} nodes"
        if capacity.can_grow:
            notes.append(f"{what}; the run waits for larger ones")
        else:
            problems.add(ConfigError(f"{what}; change cluster.gang_size, resources or labels"))
    elif free == 0:
        notes.append(f"cluster: all of it is busy; {whole} gangs of {needs} fit when it is free")
    if cluster.num_gangs != "auto" and whole and cluster.num_gangs > free:
        notes.append(f"cluster.num_gangs: asks for {cluster.num_gangs}, {free} fit now and {whole} when all is free")
    wanted = whole if cluster.num_gangs == "auto" else min(cluster.num_gangs, whole)
    return ClusterPlan(len(capacity.nodes), needs, free, whole, min(wanted, free) or wanted)
