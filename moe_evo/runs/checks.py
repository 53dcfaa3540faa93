"""What is wrong with a run, found before weights are read: one list, which `plan` shows and `search` raises."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.config.cluster import num_ranks
from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.config.search import QUALITY, RANDOM, SearchConfig
from moe_evo.errors import ConfigError, Problem, Problems, RunError, raise_first
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Population
from moe_evo.genomes.space import ModelShape, SearchSpace, check_fits
from moe_evo.records.folder import (
    RunFolder,
    RunState,
    check_inputs,
    default_folder,
    pinned,
    task_hashes,
    token_hashes,
    with_absolute_paths,
)
from moe_evo.records.journal import MAIN
from moe_evo.runs.recovery_cost import recovery_cost
from moe_evo.searches.registry import build_space, check_search
from moe_evo.tasks.data import TaskData, check_tasks, read_task
from moe_evo.tasks.sources import task_name

if TYPE_CHECKING:  # torch is imported when a model is looked at, not before
    from moe_evo.models.size.size import ModelSize
    from moe_evo.models.source import ModelSource
    from moe_evo.tasks.task import Task

_NUM_WIDER = 10


@dataclass(frozen=True)
class Inspection:
    """What is known of a run before weights are loaded.

    data: the tasks whose data are valid. tasks: those of them whose examples could be tokenised. source, size, space:
    None where the model, or the search space asked for, is invalid. hashes: of the model, the data and their tokens, by
    the names that `check_inputs` compares them under. wider: the prunings that a warm start
    begins from; they keep more experts. state: how far the run has come in its folder. problems: why the search would
    not start. absent: the same of files that a plan does without, weights and tokenizer.
    """

    data: tuple[TaskData, ...]
    tasks: tuple[Task, ...]
    source: ModelSource | None
    size: ModelSize | None
    space: SearchSpace | None
    hashes: dict[str, str]
    wider: tuple[Genome, ...]
    state: RunState
    problems: tuple[Problem, ...]
    absent: tuple[Problem, ...] = ()


def inspect(config: RunConfig) -> Inspection:
    """Check everything that can be checked before a model is loaded; writes nothing, raises no MoeEvoError."""
    problems, absent = Problems(), Problems()
    with problems.noted():
        config = pinned(config)
    data = _data(config, problems)
    source = _source(config, problems)
    if source is not None:
        with absent.noted():
            source.require_weights()
    tasks = _tasks(config, source, data, problems, absent)
    size = None if source is None else _size(config, source, problems)
    known_as = None if source is None else _hash(source, problems)
    space = None if size is None else _space(size.shape, config.search, problems)
    _add(problems, method_problems(config, space))
    if space is not None and len(data) == len(config.tasks):
        _check_recovery_cost(config, data, space, problems)
    if config.cluster.address is None:  # a cluster's devices are not those of this machine
        from moe_evo.models.load import resolve_device

        with problems.noted():
            resolve_device(config.model.device)
    hashes = task_hashes(data) | token_hashes({task.name: task.digest for task in tasks})
    hashes |= {} if known_as is None else {"model": known_as}
    state, wider = _folder(config, hashes, space, problems)
    return Inspection(
        tuple(data), tuple(tasks), source, size, space, hashes, wider, state, problems.found, absent.found
    )


def _add(problems: Problems, found: Sequence[Problem]) -> None:
    for one in found:
        problems.add(one.error)


def _data(config: RunConfig, problems: Problems) -> list[TaskData]:
    """The tasks whose data are valid; those of the others become problems."""
    data = []
    for task in config.tasks:
        with problems.noted():
            data.append(read_task(task))
    with problems.noted():
        check_tasks([one.config for one in data])
    for one in data:
        _check_samples(config, one, problems)
    return data


def _check_samples(config: RunConfig, data: TaskData, problems: Problems) -> None:
    size, number = config.evaluation.sample_size, len(data.splits["search"])
    if config.evaluation.is_fresh and 2 * size > number:
        problems.add(
            ConfigError(
                f"evaluation.sample_size: got {size}, expected at most half of the {number} search examples of task "
                f"{data.name}; give more examples, smaller samples, or evaluation.examples fixed"
            )
        )


def _check_recovery_cost(config: RunConfig, data: Sequence[TaskData], space: SearchSpace, problems: Problems) -> None:
    """Note a budget of which recovering finalists would leave nothing."""
    cost = recovery_cost(config, [len(one.splits["search"]) for one in data], space.shape.num_layers)
    if cost >= config.search.evaluations:
        problems.add(
            ConfigError(
                f"selection.recover_finalists: got {config.selection.recover_finalists}, whose recovery counts as "
                f"{cost} of {config.search.evaluations} evaluations; raise search.evaluations, recover fewer, or lower "
                "selection.recover_steps"
            )
        )


def _source(config: RunConfig, problems: Problems) -> ModelSource | None:
    """The model's files, or None where there is no model that moe_evo can load."""
    from moe_evo.models.source import ModelSource

    source = None
    with problems.noted():
        source = ModelSource(config.model, needs_weights=False)
    return source


def _tasks(
    config: RunConfig, source: ModelSource | None, data: Sequence[TaskData], problems: Problems, absent: Problems
) -> list[Task]:
    """The tasks whose examples are valid, tokenised; none where the model has no tokenizer."""
    if source is None:
        return []
    from moe_evo.tasks.registry import build_task

    tasks = []
    with problems.noted():
        tokenizer = source.tokenizer
        for one in data:
            with (problems if source.has_tokenizer else absent).noted():
                tasks.append(build_task(one, tokenizer, config.evaluation.batch_tokens))
    return tasks


def _size(config: RunConfig, source: ModelSource, problems: Problems) -> ModelSize | None:
    """The model's size, or None where the model cannot be searched."""
    from moe_evo.models.size.size import read_size

    size = None
    with problems.noted():
        size = read_size(source, config.cluster.gang_size)
    if size is not None:
        _add(problems, model_problems(config, source))
    return size


def _hash(source: ModelSource, problems: Problems) -> str | None:
    """The model's hash, which includes that of its alignment; None where it cannot be computed."""

    found = None
    with problems.noted():
        found = source.hash
    return found


def model_problems(config: ScoringConfig, source: ModelSource) -> tuple[Problem, ...]:
    """Why the model cannot compute, or be split among ranks, as the config asks; reads config.json and no weights."""
    from moe_evo.models.placement import check_placement
    from moe_evo.models.ranks import Ranks
    from moe_evo.models.rope_limit import check_row_lengths
    from moe_evo.models.variants.dynamic_routing import dynamic_routing_of
    from moe_evo.models.variants.meo import check_experts

    problems = Problems()
    with problems.noted():
        family, transformers_config = source.family, source.transformers_config
        with problems.noted():
            source.checked_headers()
        with problems.noted():
            check_row_lengths(transformers_config, [(task_name(task), task.max_length) for task in config.tasks])
        dynamic_routing = dynamic_routing_of(config.model)
        if dynamic_routing is not None:
            with problems.noted():
                dynamic_routing.check(family, source.shape)
        with problems.noted():
            check_experts(config.model.experts, family, transformers_config)
        if config.model.router == "eep":
            with problems.noted():
                family.check_eep_router(transformers_config)
        check_placement(config.model, family, transformers_config, Ranks(0, num_ranks(config.model, config.cluster)))
    return problems.found


def method_problems(config: RunConfig, space: SearchSpace | None) -> tuple[Problem, ...]:
    """Why the run cannot use the search or the one-shot methods that it names; space: None where it is not known."""
    from moe_evo.criteria.merges import Merge
    from moe_evo.criteria.registry import METHODS, check_methods, criteria_of

    problems = Problems()
    with problems.noted():
        check_search(config.search, space)
    with problems.noted():
        check_methods("selection.baselines", config.selection.baselines, space)
    with problems.noted():
        check_methods("search.init", config.search.init_methods, space, also=[RANDOM])
    with problems.noted():
        check_methods("search.surrogate.priors", criteria_of("search.surrogate.priors", config.search.priors), space)
    merges = [name for name in config.search.init_methods if name in METHODS and isinstance(METHODS[name], Merge)]
    if merges and config.search.algorithm == "surrogate":
        problems.add(
            ConfigError(f"search.init: {merges[0]} merges, but surrogate only prunes; use a method that prunes")
        )
    elif space is not None and any(len(numbers) > 1 for numbers in space.layer_groups):
        for name in merges:
            problems.add(
                ConfigError(
                    f"search.init: {name} gives each layer experts of its own, but search.num_layer_groups makes "
                    "layers share theirs; use a method that prunes, or leave num_layer_groups out"
                )
            )
    return problems.found


def _space(shape: ModelShape, config: SearchConfig, problems: Problems) -> SearchSpace | None:
    space = None
    with problems.noted():
        space = build_space(shape, config)
    if space is None:  # its problem is noted already; layer groups can have another one
        with problems.noted():
            build_space(
                shape,
                replace(config, num_kept=list(shape.num_experts), top_k=None, multiple_of=1, objectives=[QUALITY]),
            )
        with problems.noted():
            build_space(shape, replace(config, num_layer_groups=None))
    return space


def _folder(
    config: RunConfig, hashes: dict[str, str], space: SearchSpace | None, problems: Problems
) -> tuple[RunState, tuple[Genome, ...]]:
    """How far the run has come in its folder, and the prunings that a warm start begins from.

    hashes: of the model, the data and their tokens, as far as they are known. A finished run has no such prunings.
    Notes as problems whatever `RunFolder.claim` would refuse.
    """
    folder = RunFolder(Path(config.folder) if config.folder else default_folder(config))
    config = with_absolute_paths(replace(config, folder=str(folder.path)))
    state: RunState = "new"
    with problems.noted():
        if folder.config.is_file():
            state = _state(folder, config, hashes)
        else:
            folder.check_foreign()
            _check_writable(folder)
    wider: tuple[Genome, ...] = ()
    if space is not None and state != "finished":
        with problems.noted():
            wider = _wider_prunings(config.search.warm_start, space)
            if wider and state == "begun":
                with folder.open_journal() as journal:
                    check_inputs(journal, warm_start_hash(wider))
    return state, wider


def _state(folder: RunFolder, config: RunConfig, hashes: dict[str, str]) -> RunState:
    """Raises RunError where the folder holds another run, or one of another model or other data."""
    if not folder.journal.is_file():
        return "new"
    with folder.open_journal() as journal:
        state = folder.state(config, journal)
        if state != "new":
            check_inputs(journal, hashes)
    return state


def _check_writable(folder: RunFolder) -> None:
    absolute = folder.path.absolute()
    parent = next(one for one in (absolute, *absolute.parents) if one.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise RunError(f"{folder.path}: cannot be written; choose another folder with --folder")


def warm_start_hash(wider: Sequence[Genome]) -> dict[str, str]:
    """The hash of the prunings that a search begins from, by the name that `check_inputs` compares it under."""
    return {"warm_start": " ".join(one.digest for one in wider)} if wider else {}


def _wider_prunings(warm_start: str | None, space: SearchSpace) -> tuple[Genome, ...]:
    """The best prunings of the run that a search begins from; raises RunError where it cannot."""
    if warm_start is None:
        return ()
    folder = RunFolder.existing(warm_start)
    folder.read_result()  # raises RunError where the run is not finished
    with folder.open_journal() as journal:
        prunings = Population().with_outcomes(journal.individuals(MAIN)).prunings
    genomes = tuple(one.genome for one in prunings.ranked[:_NUM_WIDER])
    for genome in genomes[:1]:
        check_fits(genome, space.shape)
    fewest = space.num_kept if space.kept_bounds is None else (min(space.kept_bounds.fewest),) * space.shape.num_layers
    pairs = zip(genomes[0].num_kept, fewest, strict=True) if genomes else ()
    if not genomes or any(has < wanted for has, wanted in pairs):
        raise RunError(
            f"search.warm_start: {warm_start} has no pruning that keeps at least {list(fewest)} experts; give "
            "a run that kept more"
        )
    return genomes


def check_methods_of(config: RunConfig, space: SearchSpace) -> None:
    """Raise the first of `method_problems`."""
    raise_first(method_problems(config, space))


def check_model(config: ScoringConfig, source: ModelSource) -> None:
    """Raise the first of `model_problems`."""
    raise_first(model_problems(config, source))
