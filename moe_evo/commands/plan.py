"""What a run would take, told before weights are read: sizes, memory a rank, gangs, time, and all that is wrong.

`plan` answers with plain data. Gangs are counted in a `ClusterCapacity` that the caller brings, and the
time of an evaluation is measured by a function of the caller's, so nothing here knows Ray.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_evo.commands.memory import planned_memory
from moe_evo.config.cluster import num_ranks
from moe_evo.config.run import RunConfig
from moe_evo.config.search import RANDOM, SearchConfig
from moe_evo.errors import ClusterError, ConfigError, MoeEvoError, RunError
from moe_evo.gangs.capacity import ClusterCapacity, gangs_that_fit
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.records.folder import RunFolder, default_folder, with_absolute_paths
from moe_evo.runs.open_pool import open_pool
from moe_evo.runs.workload import estimate, evaluations_by_split, merges
from moe_evo.searches.enumeration import num_prunings
from moe_evo.searches.registry import build_space, check_search
from moe_evo.tasks.data import SPLITS, TaskData, check_tasks, read_task
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
) -> dict[str, Any]:
    """Everything that can be known of a run before it starts, as plain data; raises no MoeEvoError.

    capacity: the cluster's nodes, where there is a cluster. memory_gib: memory of the device of one rank;
    default: what is free here, for a run in this process. calibrate: measures the seconds that one
    evaluation on the search split takes on one gang; called where nothing is wrong.

    `problems` of the answer are what the search would refuse, or fail of; `notes` what may surprise.
    """
    problems: list[str] = []
    notes: list[str] = []
    data = _tasks(config, problems)
    size = _model(config, problems)
    space = None if size is None else _space(size.shape, config.search, problems)
    _check_methods(config, space, problems)
    device_bytes = _device_bytes(config, memory_gib, problems)
    _check_folder(config, problems, notes)
    answer: dict[str, Any] = {
        "model": None if size is None else _model_facts(config, size),
        "tasks": [_task_facts(one) for one in data],
        "search": None if space is None else _search_facts(config, space),
        "memory": None if size is None else planned_memory(config, data, size, space, device_bytes, problems, notes),
        "checkpoint": None if size is None or space is None else _checkpoint(size, space),
        "cluster": None if capacity is None else _cluster(config, capacity, problems, notes),
        "estimate": None,
        "problems": problems,
        "notes": notes,
    }
    if calibrate is not None and not problems and space is not None:
        with _Noted(problems):
            examples = {split: sum(len(one.splits[split]) for one in data) for split in SPLITS}
            counts = evaluations_by_split(config, can_prune=space.can_prune)
            gangs = 1 if answer["cluster"] is None else max(answer["cluster"]["gangs"], 1)
            answer["estimate"] = estimate(counts, examples, calibrate(), gangs)
    return answer


def planned(
    config: RunConfig, memory_gib: float | None, *, calibrate: bool, tracker: TerminalTracker
) -> dict[str, Any]:
    """`plan` with the cluster that the config names, and measured on it where `calibrate` says so.

    A cluster that cannot be reached is a problem among the others.
    """
    if memory_gib is not None and memory_gib <= 0:
        raise ConfigError(f"memory_gib: got {memory_gib:g}, expected more than 0")
    if config.cluster.address is None:
        return plan(config, memory_gib=memory_gib, calibrate=_stopwatch(config, tracker) if calibrate else None)
    from moe_evo.gangs.connection import cluster_capacity, connected

    try:
        with connected(config.cluster.address):
            capacity = cluster_capacity(config.model, config.cluster)
            measure = _stopwatch(config, tracker) if calibrate else None
            return plan(config, capacity=capacity, memory_gib=memory_gib, calibrate=measure)
    except ClusterError as error:
        answer = plan(config, memory_gib=memory_gib)
        return {**answer, "problems": [*answer["problems"], str(error)]}


def _stopwatch(config: RunConfig, tracker: TerminalTracker) -> Callable[[], float]:
    """Measures the seconds of an evaluation on the search split, on one gang, with random genomes of the space."""

    def measure() -> float:
        from moe_evo.evaluation.pool import Request
        from moe_evo.models.load import read_shape

        space = build_space(read_shape(config.model), config.search)
        is_local = config.cluster.address is None
        one_gang = config if is_local else replace(config, cluster=replace(config.cluster, num_gangs=1))
        genomes = [random_pruning(space, np.random.default_rng(seed)) for seed in range(1 + _CALIBRATIONS)]
        with open_pool(one_gang, check_tasks(config.tasks), tracker) as pool:
            pool.listener = tracker.pool
            durations = []
            for number, genome in enumerate(genomes):
                pool.submit([Request("calibration", number, genome, "search")])
                ((_, outcome),) = pool.next_outcomes()
                durations.append(outcome.duration_s)
        return sum(durations[1:]) / _CALIBRATIONS  # the first one also warms up

    return measure


def require_no_problems(answer: Mapping[str, Any]) -> None:
    """Raise ConfigError in one line where `plan` found problems."""
    problems = answer["problems"]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"this run cannot start: {problems[0]}{more}")


class _Noted:
    """Write an error of the block down, once, and go on after it."""

    def __init__(self, problems: list[str]) -> None:
        self._problems = problems

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, MoeEvoError):
            return False
        line = " ".join(str(error).split())
        if line not in self._problems:
            self._problems.append(line)
        return True


def _tasks(config: RunConfig, problems: list[str]) -> list[TaskData]:
    """The tasks whose data are good; each is tokenised too, where the model has a tokenizer."""
    data = []
    for task in config.tasks:
        with _Noted(problems):
            data.append(read_task(task))
    with _Noted(problems):
        check_tasks([one.config for one in data])
    if not data:
        return data
    from moe_evo.models.load import load_tokenizer
    from moe_evo.tasks.registry import build_task

    with _Noted(problems):
        tokenizer = load_tokenizer(config.model)
        for one in data:
            with _Noted(problems):
                build_task(one, tokenizer, config.evaluation.batch_tokens)
    return data


def _model(config: RunConfig, problems: list[str]) -> ModelSize | None:
    from moe_evo.models.load import model_hash
    from moe_evo.models.placement import check_placement
    from moe_evo.models.ranks import Ranks
    from moe_evo.models.size.size import read_config, read_size
    from moe_evo.models.variants.meo import check_experts
    from moe_evo.models.variants.skipping import check_skipping

    size = None
    with _Noted(problems):
        family, transformers_config = read_config(config.model)
        size = read_size(config.model, config.cluster.gang_size)
        with _Noted(problems):
            check_skipping(config.model.dynamic_skipping, family.shape(transformers_config))
        with _Noted(problems):
            check_experts(config.model.experts, family, transformers_config)
        with _Noted(problems):
            model_hash(config.model)  # reads the alignment
        if config.model.router == "eep":
            with _Noted(problems):
                family.check_eep_router(transformers_config)
        check_placement(config.model, family, transformers_config, Ranks(0, num_ranks(config.model, config.cluster)))
    return size


def _check_methods(config: RunConfig, space: SearchSpace | None, problems: list[str]) -> None:
    from moe_evo.criteria.registry import check_methods

    with _Noted(problems):
        check_search(config.search, space)
    with _Noted(problems):
        check_methods("selection.baselines", config.selection.baselines, space)
    with _Noted(problems):
        check_methods("search.init", config.search.init_methods, space, also=[RANDOM])


def _space(shape: ModelShape, config: SearchConfig, problems: list[str]) -> SearchSpace | None:
    space = None
    with _Noted(problems):
        space = build_space(shape, config)
    if space is None:  # that was the first complaint; layer groups have their own
        with _Noted(problems):
            build_space(shape, replace(config, num_kept=list(shape.num_experts), top_k=None, multiple_of=1))
        with _Noted(problems):
            build_space(shape, replace(config, num_layer_groups=None))
    return space


def _device_bytes(config: RunConfig, memory_gib: float | None, problems: list[str]) -> int | None:
    """Memory of one rank's device: what is given, or, for a run in this process, what is free."""
    from moe_evo.models.free_memory import free_bytes
    from moe_evo.models.load import resolve_device

    free = None
    if config.cluster.address is None:  # a cluster's devices are not those of this machine
        with _Noted(problems):
            free = free_bytes(resolve_device(config.model.device))
    return free if memory_gib is None else int(memory_gib * 2**30)


def _check_folder(config: RunConfig, problems: list[str], notes: list[str]) -> None:
    """What `RunFolder.claim` would refuse, without writing."""
    folder = RunFolder(Path(config.folder) if config.folder else default_folder(config))
    with _Noted(problems):
        if folder.config.is_file():
            absolute_config = with_absolute_paths(replace(config, folder=str(folder.path)))
            notes += _resumed(folder, absolute_config)
            return
        folder.check_foreign()
        absolute = folder.path.absolute()
        parent = next(one for one in (absolute, *absolute.parents) if one.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise RunError(f"{folder.path}: cannot be written; choose another folder with --folder")


def _resumed(folder: RunFolder, config: RunConfig) -> list[str]:
    """What the search would do with a folder that holds a run; raises RunError where it would refuse."""
    if not folder.journal.is_file():
        return []
    with folder.open_journal() as journal:
        state = folder.state(config, journal)
    return {
        "new": [],
        "begun": [f"{folder.path}: holds this run; the search goes on where it stands"],
        "finished": [f"{folder.path}: this run is finished; the search would only show it"],
    }[state]


def _model_facts(config: RunConfig, size: ModelSize) -> dict[str, Any]:
    shape = size.shape
    return {
        "path": config.model.path,
        "family": shape.family,
        "dtype": size.dtype,
        "decoder_layers": size.num_decoder_layers,
        "moe_layers": shape.num_layers,
        "num_experts": list(shape.num_experts),
        "top_k": list(shape.top_k),
        "parameters": size.parameters,
        "expert_parameters": size.expert_parameters,
        "active_parameters": size.active_parameters,
        "bytes": size.size,
    }


def _task_facts(data: TaskData) -> dict[str, Any]:
    examples = {split: len(data.splits[split]) for split in SPLITS}
    return {"name": data.name, "kind": data.kind, "metric": data.metric, "examples": examples}


def _search_facts(config: RunConfig, space: SearchSpace) -> dict[str, Any]:
    return {
        "algorithm": config.search.algorithm,
        "num_kept": list(space.num_kept),
        "top_k": list(space.top_k),
        "log10_prunings": math.log10(num_prunings(space)),  # the number itself can have thousands of digits
        "merges": merges(config.search, can_prune=space.can_prune),
        "evaluations": evaluations_by_split(config, can_prune=space.can_prune),
    }


def _checkpoint(size: ModelSize, space: SearchSpace) -> dict[str, Any]:
    from moe_evo.models.size.memory import exported_size

    parameters, total = exported_size(size, space.num_kept)
    is_uniform = len(set(space.num_kept)) == 1 and len(set(space.top_k)) == 1
    return {"parameters": parameters, "bytes": total, "loader": "transformers" if is_uniform else "moe_evo"}


def _cluster(config: RunConfig, capacity: ClusterCapacity, problems: list[str], notes: list[str]) -> dict[str, Any]:
    """Gangs that fit on the whole cluster, and on what is free of it now; `gangs` is how many would run."""
    cluster, ranks = config.cluster, 1 if config.model.sharding == "device_map" else config.cluster.gang_size
    whole, free = (
        gangs_that_fit(capacity.nodes, capacity.bundle, ranks, cluster.strategy, cluster.labels, of=of)
        for of in ("total", "available")
    )
    amounts = ", ".join(f"{name} {amount:g}" for name, amount in capacity.bundle.items())
    labels = f" on nodes with {cluster.labels}" if cluster.labels else ""
    needs = f"{ranks} x ({amounts}){labels}, {cluster.strategy}"
    if whole == 0:
        (notes if capacity.can_grow else problems).append(
            f"cluster: no gang of {needs} fits on the {len(capacity.nodes)} nodes; "
            + (
                "the run waits for larger ones"
                if capacity.can_grow
                else "change cluster.gang_size, resources or labels"
            )
        )
    elif free == 0:
        notes.append(f"cluster: all of it is busy; {whole} gangs of {needs} fit when it is free")
    if cluster.num_gangs != "auto" and whole and cluster.num_gangs > free:
        notes.append(f"cluster.num_gangs: asks for {cluster.num_gangs}, {free} fit now and {whole} when all is free")
    wanted = whole if cluster.num_gangs == "auto" else min(cluster.num_gangs, whole)
    return {
        "nodes": len(capacity.nodes),
        "needs": needs,
        "gangs_free": free,
        "gangs_whole": whole,
        "gangs": min(wanted, free) or wanted,
    }
