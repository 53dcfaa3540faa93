"""Starts the tracking that a config asks for, while a search or a recovery runs, or from a search's journal."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_evo.config.recover import RecoveryConfig
from moe_evo.config.run import RunConfig
from moe_evo.config.task import fitness_label
from moe_evo.errors import ConfigError, RunError
from moe_evo.genomes.population import Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.plain import Plain, plain_fields
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, RANDOM, RECOVERED, REFERENCE, Journal
from moe_evo.records.make_result import software_versions
from moe_evo.searches.registry import search_parameters
from moe_evo.tasks.data import SCORINGS
from moe_evo.tasks.sources import task_name
from moe_evo.tracking.base import Tracker, Trackers
from moe_evo.tracking.wandb_run import Mode, WandbRun, wandb_mode
from moe_evo.tracking.wandb_tracker import wandb_tracker

_META_ID = "wandb/id"
_NAME_LENGTH = 120
_REPLAY_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Replay:
    """A W&B run that was written from a journal.

    replaced_id: of the W&B run that it replaces. where: its page, or the command that uploads it.
    """

    mode: Mode
    id: str
    replaced_id: str | None
    outcomes: int
    where: str


@contextmanager
def tracked(
    config: RunConfig, space: SearchSpace, journal: Journal, folder: RunFolder, terminal: Tracker
) -> Iterator[Tracker]:
    """The terminal's tracker, with W&B's if `config.tracking` asks for it, which gets the journal's outcomes first."""
    mode = wandb_mode(config.tracking)
    if mode == "disabled":
        yield terminal
        return
    if journal.meta(_META_ID) is None:
        journal.set_meta({_META_ID: secrets.token_hex(4)})
    run = _wandb_run(config, mode, journal, folder.path, space.shape.num_experts, space.num_kept)
    with wandb_tracker(run, terminal) as wandb:
        wandb.told(list(_history(journal)))
        yield Trackers(terminal, wandb)


@contextmanager
def tracked_recovery(
    config: RecoveryConfig, folder: Path, run_id: str, hashes: Mapping[str, str | None], terminal: Tracker
) -> Iterator[Tracker]:
    """The same for a recovery. folder: for W&B's files. run_id: the same when the recovery goes on.

    hashes: of the full model ('model') and of each task by its name.
    """
    mode = wandb_mode(config.tracking)
    if mode == "disabled":
        yield terminal
        return
    recover, path = config.recover, Path(config.model.path)
    tasks = "+".join(map(task_name, config.tasks))[:_NAME_LENGTH]
    settings: Plain = {
        "model": path.name if path.is_absolute() else config.model.path,
        "model_hash": hashes["model"],
        "tasks": tasks,
        "task_hashes": {task_name(task): hashes[task_name(task)] for task in config.tasks},
        **{name: value for name, value in plain_fields(recover).items() if name != "prompts"},  # which is a path
        "software": software_versions(),
    }
    name = f"{tasks}-recover-{'+'.join(recover.methods)}-seed{recover.seed}"[:_NAME_LENGTH]
    run = WandbRun(config.tracking, mode, run_id, name, folder, settings, num_rows=0, is_recovery=True)
    folder.mkdir(parents=True, exist_ok=True)
    with wandb_tracker(run, terminal) as wandb:
        yield Trackers(terminal, wandb)


def replay(folder: RunFolder, config: RunConfig) -> Replay:
    """Write a new W&B run from the journal of a search, finished or not; if the search continues, it uses that one."""
    mode = wandb_mode(config.tracking)
    if mode == "disabled":
        raise ConfigError("tracking.wandb: is disabled here; set WANDB_API_KEY or add --tracking.wandb offline")
    with Journal(folder.journal) as journal:
        history = list(_history(journal))
        if not history:
            raise RunError(f"{folder.path}: nothing was evaluated yet, so there is nothing to tell W&B")
        old = journal.meta(_META_ID)
        journal.set_meta({_META_ID: secrets.token_hex(4)})
        full = next(individual.genome for search, _, individual in history if search == REFERENCE)
        found = next((individual.genome for search, _, individual in history if search == MAIN), full)
        num_experts = [layer.num_experts for layer in full.layers]
        run = _wandb_run(config, mode, journal, folder.path, num_experts, found.num_kept)
        run = replace(
            run, tags=["replay"], begin_timeout_s=_REPLAY_TIMEOUT_S, finish_timeout_s=_REPLAY_TIMEOUT_S
        )  # a search does not wait so long for W&B, but a replay has nothing else to do
        with wandb_tracker(run, Trackers()) as wandb:
            wandb.told(history)
            if folder.result.is_file():
                wandb.finished(folder.read_result(), winner_files(folder))
    if wandb.failure is not None:
        raise RunError(f"W&B: {wandb.failure}; try again, or add --tracking.wandb offline and upload with wandb sync")
    return Replay(mode, run.id, old, len(history), wandb.where)


def winner_files(folder: RunFolder) -> list[Path]:
    """The genome files of a finished run."""
    return [path for path in folder.winners.values() if path.is_file()]


def _history(journal: Journal) -> Iterator[tuple[str, str, Individual]]:
    """All outcomes in a journal, as arguments of `Tracker.recorded`."""
    candidates = {
        search: {one.number: one for one in journal.candidates(search)} for search in (REFERENCE, MAIN, RANDOM)
    }
    for split in (*SCORINGS, RECOVERED):
        for search, known in candidates.items():
            outcomes = journal.told(search) if split == "search" else journal.outcomes(search, split)
            for number, outcome in outcomes.items():
                yield search, split, Individual(known[number], outcome)


def _wandb_run(
    config: RunConfig,
    mode: Mode,
    journal: Journal,
    folder: Path,
    num_experts: Sequence[int],
    num_kept: Sequence[int],
) -> WandbRun:
    run_id = journal.meta(_META_ID)
    assert run_id is not None
    search = config.search
    tasks = "+".join(map(task_name, config.tasks))[:_NAME_LENGTH]
    kept = f"{np.mean(num_kept):.2f}" if isinstance(search.num_kept, list) else search.kept_label
    name = f"{tasks}-keep{kept}-{search.algorithm}-seed{search.seed}"
    hashes = {"model": journal.meta("hash/model")}
    hashes |= {task_name(task): journal.meta(f"hash/task {task_name(task)}") for task in config.tasks}
    settings = _settings(config, num_experts, num_kept, hashes)
    num_rows = search.evaluations * (1 + config.selection.random_search)
    label = fitness_label(config.tasks)
    return WandbRun(config.tracking, mode, run_id, name, folder, settings, num_rows, label)


def _settings(
    config: RunConfig, num_experts: Sequence[int], num_kept: Sequence[int], hashes: Mapping[str, str | None]
) -> Plain:
    """The options by which W&B filters and groups runs, as a flat dict; of a path only its last part."""
    model, search, evaluation, selection = config.model, config.search, config.evaluation, config.selection
    path = Path(model.path)
    return {
        "model": path.name if path.is_absolute() else model.path,
        "model_hash": hashes["model"],
        "router": model.router,
        "dtype": model.dtype,
        "sharding": model.sharding,
        "gang_size": config.cluster.gang_size,
        "tasks": "+".join(map(task_name, config.tasks)),
        "metrics": "+".join(task.metric for task in config.tasks),
        "search_metrics": "+".join(task.search_metric for task in config.tasks),
        "task_hashes": {task_name(task): hashes[task_name(task)] for task in config.tasks},
        "fitness_rule": evaluation.fitness,
        "examples": evaluation.examples,
        "sample_size": evaluation.sample_size if evaluation.is_fresh else None,
        "num_layers": len(num_experts),
        "num_experts": float(np.mean(num_experts)),
        "num_kept": float(np.mean(num_kept)),
        "num_kept_by_layer": list(num_kept),
        "ratio": sum(num_kept) / sum(num_experts),
        "top_k": search.top_k,
        "num_layer_groups": search.num_layer_groups,
        "multiple_of": search.multiple_of,
        "objectives": "+".join(search.objectives),
        "algorithm": search.algorithm,
        "seed": search.seed,
        "budget": search.evaluations,
        "finalists": selection.finalists,
        "recover_finalists": selection.recover_finalists,
        "recover_steps": selection.recover_steps,
        "random_search": selection.random_search,
        **search_parameters(search),
        "software": software_versions(),
    }
