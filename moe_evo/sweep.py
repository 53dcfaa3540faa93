"""Sweeps: one search for every combination of options, all on the same gangs.

Every run has its own folder and journal, so whatever dies goes on where it stood, and the same command
does what is missing and nothing twice. Ray Tune starts the runs; `one_by_one` needs no Ray.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from moe_evo import commands
from moe_evo.config import RunConfig, SweepConfig, TaskConfig
from moe_evo.errors import ClusterError, MoeEvoError, RunError
from moe_evo.population import Individual
from moe_evo.run_folder import RunFolder, asdict_plain, with_absolute_paths, write_whole
from moe_evo.space import ModelShape
from moe_evo.tasks.data import check_tasks, task_name
from moe_evo.tracking.terminal import TerminalTracker

_REPORT_INTERVAL_S = 1.0


class SweepFolder:
    """A folder with one folder a run, the config of the sweep, and what came of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "sweep.yaml"
        self.result = path / "sweep.json"
        self.figure = path / "sweep.png"
        self.tune = path / "tune"
        self.logs = path / "logs"

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.path / "runs" / name)

    def read_result(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.result.read_text("utf-8"))
        return result


def grid(config: SweepConfig, shape: ModelShape, folder: SweepFolder) -> dict[str, RunConfig]:
    """The runs of a sweep by name; raises ConfigError where one of them is impossible.

    Where fewer experts are kept than a token may use, a run lowers top_k to that number.
    """
    swept = config.sweep
    num_kept: Sequence[int | list[int]] = swept.num_kept or [config.search.num_kept]
    choices = product(
        [[TaskConfig(data=data)] for data in swept.tasks] or [config.tasks],
        swept.algorithms or [config.search.algorithm],
        num_kept,
        swept.seeds or [config.search.seed],
    )
    plain = {one.name: getattr(config, one.name) for one in fields(RunConfig)}
    if config.tracking.group is None:
        plain["tracking"] = replace(config.tracking, group=folder.path.name)
    runs = {}
    for tasks, algorithm, kept, seed in choices:
        tasks = [_like(task, config.tasks) for task in tasks] if swept.tasks else tasks
        search = replace(config.search, algorithm=algorithm, num_kept=kept, seed=seed)
        if search.top_k is None and isinstance(kept, int) and kept < max(shape.top_k):
            search = replace(search, top_k=kept)
        commands.build_space(shape, search)
        label = kept if isinstance(kept, int) else "-".join(map(str, kept))
        parts = [f"keep{label}", f"seed{seed}"]
        if len(swept.algorithms) > 1:
            parts.insert(0, algorithm)
        if len(swept.tasks) > 1:
            parts.insert(0, task_name(tasks[0]))
        name = "-".join(parts)
        run = RunConfig(**{**plain, "tasks": tasks, "search": search, "folder": str(folder.run(name).path)})
        runs[name] = with_absolute_paths(run)
    return _linked(runs) if swept.warm_start else runs


def _linked(runs: Mapping[str, RunConfig]) -> dict[str, RunConfig]:
    """The runs, from most experts to fewest, each to begin from the next larger one of its kind."""
    linked: dict[str, RunConfig] = {}
    larger: dict[str, str | None] = {}
    for name, run in sorted(runs.items(), key=lambda one: -_num_kept(one[1])):
        kind = json.dumps([[task.data for task in run.tasks], run.search.algorithm, run.search.seed])
        if run.search.algorithm != "random":
            run = replace(run, search=replace(run.search, warm_start=larger.get(kind)))
            larger[kind] = run.folder
        linked[name] = run
    return linked


def _num_kept(run: RunConfig) -> float:
    kept = run.search.num_kept
    return kept if isinstance(kept, int) else sum(kept) / len(kept)


def _like(task: TaskConfig, configured: Sequence[TaskConfig]) -> TaskConfig:
    """A task with the options of the configured one of the same data, or else of the first."""
    same = [one for one in configured if one.data == task.data]
    return same[0] if same else replace(configured[0], data=task.data, name="", kind="auto", metric="default")


def sweep(config: SweepConfig, tracker: TerminalTracker, *, use_tune: bool) -> SweepFolder:
    """Make all runs of a sweep, or those that are missing; afterwards the folder holds table and figure."""
    from moe_evo.models.loading import read_shape
    from moe_evo.report.sweep import sweep_figure, sweep_result

    folder = SweepFolder(Path(config.folder or _default_folder(config)).absolute())
    runs = grid(config, read_shape(config.model), folder)
    for tasks in {json.dumps([task.data for task in run.tasks]): run.tasks for run in runs.values()}.values():
        check_tasks(tasks)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_whole(folder.config, yaml.safe_dump(asdict_plain(config), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise RunError(f"{folder.path}: cannot be written ({error.strerror}); choose another --folder") from error
    missing = {name: run for name, run in runs.items() if not folder.run(name).result.is_file()}
    done = len(runs) - len(missing)
    tracker.message(f"sweep of {len(runs)} runs in {folder.path}" + (f", {done} done before" if done else ""))
    if missing and use_tune:
        _with_tune(config, missing, folder, tracker)
    elif missing:
        _one_by_one(missing, tracker)
    unfinished = [name for name in runs if not folder.run(name).result.is_file()]
    finished = {name: folder.run(name).read_result() for name in runs if name not in unfinished}
    if finished:
        result = sweep_result(finished)
        write_whole(folder.result, json.dumps({**result, "unfinished": unfinished}, indent=2) + "\n")
        sweep_figure(folder.figure, result)
    if unfinished:
        raise RunError(
            f"{folder.path}: {len(unfinished)} of {len(runs)} runs failed ({', '.join(unfinished[:5])}); "
            f"{folder.logs} says why; mend that and run the same command again"
        )
    return folder


def _one_by_one(runs: Mapping[str, RunConfig], tracker: TerminalTracker) -> None:
    """In this process, with the model loaded once where there is no cluster."""
    from moe_evo.models.loading import load_model

    first = next(iter(runs.values()))
    model = None
    if first.cluster.address is None:
        tracker.message(f"loading {first.model.path}")
        model = load_model(first.model)
    for name, config in runs.items():
        tracker.message(f"run {name}")
        commands.search(config, tracker, model)


def _with_tune(
    config: SweepConfig, runs: Mapping[str, RunConfig], folder: SweepFolder, tracker: TerminalTracker
) -> None:
    """As trials of Ray Tune that share one service of gangs, which is there before the first of them."""
    from moe_evo.gangs.connection import connected, shared_service
    from moe_evo.gangs.trials import run_trials
    from moe_evo.models.loading import model_hash

    cluster = config.cluster
    address = cluster.address or "local"
    name = cluster.service or f"{folder.path.name}-{uuid.uuid4().hex[:8]}"
    model = next(iter(runs.values())).model
    concurrent = min(config.sweep.max_concurrent, len(runs))
    tracker.message(f"connecting to Ray ({address})")
    with connected(address, extra_cpus=concurrent):
        cluster = replace(cluster, address="auto", service=name, num_gangs=_num_gangs(config))
        with shared_service(model, model_hash(model), cluster, keep=config.cluster.service is not None):
            for wave in _waves(runs, config):
                run_trials(
                    {trial: replace(run, cluster=cluster) for trial, run in wave.items()},
                    _search_in_trial,
                    folder.tune,
                    max_concurrent=concurrent,
                    max_failures=config.sweep.max_failures,
                    tell=tracker.message,
                )


def _waves(runs: Mapping[str, RunConfig], config: SweepConfig) -> list[dict[str, RunConfig]]:
    """Runs that may go on side by side: all, unless those with fewer experts begin from the others."""
    if not config.sweep.warm_start:
        return [dict(runs)]
    sizes = dict.fromkeys(map(_num_kept, runs.values()))
    return [{name: run for name, run in runs.items() if _num_kept(run) == size} for size in sizes]


def _num_gangs(config: SweepConfig) -> Any:
    """On a Ray of our own the runs' drivers have CPUs of their own, which gangs must not take."""
    cluster = config.cluster
    if cluster.address not in (None, "local") or cluster.num_gangs != "auto":
        return cluster.num_gangs
    from moe_evo.gangs.connection import gangs_without_drivers

    return gangs_without_drivers(config.model, cluster)


def _search_in_trial(config: RunConfig, report: Any) -> None:
    """What a trial does: a whole search. report: takes the numbers that Tune shows."""
    from rich.console import Console

    assert config.folder is not None
    run = Path(config.folder)
    log = run.parent.parent / "logs" / f"{run.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as stream, _TrialTracker(Console(file=stream), report) as tracker:
        try:
            commands.search(config, tracker)
        except ClusterError:
            raise  # another try may fare better
        except MoeEvoError as error:
            tracker.message(f"error: {error}")


class _TrialTracker(TerminalTracker):
    """Writes into the run's log, and tells Tune how far the search has come."""

    def __init__(self, console: Any, report: Any) -> None:
        super().__init__(console)
        self._report = report
        self._reported_at = 0.0

    def evaluated(self, individual: Individual, best: Individual | None, phase: str) -> None:
        super().evaluated(individual, best, phase)
        now = time.monotonic()
        if best is not None and now - self._reported_at > _REPORT_INTERVAL_S:
            self._reported_at = now
            self._report({"evaluations": individual.number + 1, "best_fitness": best.evaluation.fitness})


def _default_folder(config: SweepConfig) -> str:
    names = config.sweep.tasks or [task_name(task) for task in config.tasks]
    return f"runs/sweep-{'+'.join(names)[:150]}"
