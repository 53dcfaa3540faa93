"""Sweeps: one search for every combination of options, all on the same gangs.

Every run has its own folder and journal. So the same command, given again, continues unfinished runs and repeats
none that is finished. Ray Tune starts the runs; `_one_by_one` does it without Ray Tune.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moe_evo.commands.search import search as search_command
from moe_evo.config.check import require
from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.run import RunConfig
from moe_evo.config.sweep import SweepConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ClusterError, ConfigError, JournalError, MoeEvoError, RunError
from moe_evo.files.write import write_whole
from moe_evo.genomes.space import ModelShape
from moe_evo.records.folder import RunFolder, as_file_name, asdict_plain, check_inputs, task_hashes, with_absolute_paths
from moe_evo.records.journal import MAIN
from moe_evo.records.sweep import SweepFolder
from moe_evo.runs.checks import check_methods_of
from moe_evo.runs.early_warnings import split_warnings
from moe_evo.searches.registry import SEARCHES, begins_from, build_space
from moe_evo.tasks.data import TaskData, check_tasks
from moe_evo.tasks.sources import task_name
from moe_evo.tracking.base import Tracker
from moe_evo.tracking.terminal import TerminalTracker

if TYPE_CHECKING:  # Ray and torch are imported when a sweep begins
    from moe_evo.gangs.tune_runs import Report, RunEvent
    from moe_evo.models.source import ModelSource


_WATCH_INTERVAL_S = 2.0


def grid(config: SweepConfig, shape: ModelShape, folder: SweepFolder) -> dict[str, RunConfig]:
    """The runs of a sweep by name; raises ConfigError where one of them is impossible.

    Where fewer experts are kept than a token may use, a run lowers top_k to that number.
    """
    swept = config.sweep
    for name in swept.algorithms:
        SEARCHES.check(name, "sweep.algorithms")
    num_kept: Sequence[int | list[int] | dict[str, int]] = swept.num_kept or [config.search.num_kept]
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
        space = build_space(shape, search)
        parts = [f"keep{search.kept_label}", f"seed{seed}"]
        if len(swept.algorithms) > 1:
            parts.insert(0, algorithm)
        if len(swept.tasks) > 1:
            parts.insert(0, task_name(tasks[0]))
        name = as_file_name("-".join(parts))
        if name in runs:
            raise ConfigError(f"sweep.tasks: two tasks have the name {task_name(tasks[0])!r}; rename a file or folder")
        run = RunConfig(**{**plain, "tasks": tasks, "search": search, "folder": str(folder.run(name).path)})
        check_methods_of(run, space)
        runs[name] = with_absolute_paths(run)
    return _linked(runs) if swept.warm_start else runs


def _linked(runs: Mapping[str, RunConfig]) -> dict[str, RunConfig]:
    """The runs, from most kept experts to fewest, each with a warm start from the one before with the same options."""
    linked: dict[str, RunConfig] = {}
    larger: dict[str, str | None] = {}
    for name, run in sorted(runs.items(), key=lambda one: -one[1].search.mean_kept):
        kind = json.dumps([[task.data for task in run.tasks], run.search.algorithm, run.search.seed])
        if begins_from(run.search.algorithm, "wider"):
            run = replace(run, search=replace(run.search, warm_start=larger.get(kind)))
            larger[kind] = run.folder
        linked[name] = run
    return linked


def _like(task: TaskConfig, configured: Sequence[TaskConfig]) -> TaskConfig:
    """A task with the options of the configured task of the same data, or else of the first configured one."""
    same = [one for one in configured if one.data == task.data]
    return same[0] if same else replace(configured[0], data=task.data, name="", kind="auto", metric="default")


def sweep(config: SweepConfig, tracker: Tracker, *, use_tune: bool) -> SweepFolder:
    """Make all runs of a sweep that are not finished; afterwards the folder holds table and figure.

    The input of every run is checked before the first one begins.
    """
    from moe_evo.models.source import ModelSource
    from moe_evo.runs.checks import check_model

    recovered = config.selection.recover_finalists
    require(
        not (use_tune and recovered), "selection.recover_finalists", recovered,
        "0, as runs share gangs on a cluster; or it with --no-tune and without cluster.address",
    )  # fmt: skip
    folder = SweepFolder(Path(config.folder or _default_folder(config)).absolute())
    source = ModelSource(with_absolute_paths(config).model)
    runs = grid(config, source.shape, folder)
    check_model(config, source)
    missing = _missing(runs, source, folder)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_whole(folder.config, yaml.safe_dump(asdict_plain(config), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise RunError(f"{folder.path}: cannot be written ({error.strerror}); choose another --folder") from error
    done = len(runs) - len(missing)
    tracker.message(f"sweep of {len(runs)} runs in {folder.path}" + (f", {done} done before" if done else ""))
    if missing:
        if use_tune:  # else each run tells it here itself
            for line in _small_splits(missing):
                tracker.message(line)
        progress = _Progress(folder, tracker, runs, missing)
        if use_tune:
            _with_tune(config, source, missing, folder, tracker, progress)
        else:
            _one_by_one(config, source, missing, folder, tracker, progress)
    _summarise(runs, folder)
    return folder


def _missing(runs: Mapping[str, RunConfig], source: ModelSource, folder: SweepFolder) -> dict[str, RunConfig]:
    """The runs that are not finished; raises where a run's folder holds another run, or its data are wrong."""
    from moe_evo.runs.open_pool import check_examples

    missing = {}
    checked: dict[str, list[TaskData]] = {}
    for name, run in runs.items():
        key = json.dumps([asdict(task) for task in run.tasks])
        if key not in checked:
            checked[key] = list(check_tasks(run.tasks))
            check_examples(run, source, checked[key])
        state = "new"
        if folder.run(name).config.is_file() and folder.run(name).journal.is_file():
            with folder.run(name).open_journal() as journal:
                state = folder.run(name).state(run, journal)
                check_inputs(journal, {"model": source.hash, **task_hashes(checked[key])})
        if state != "finished":
            missing[name] = run
    return missing


def _small_splits(runs: Mapping[str, RunConfig]) -> list[str]:
    """What there is to say of small splits, once for all runs that have the same tasks."""
    told: dict[str, None] = {}
    of_tasks = {json.dumps([asdict(task) for task in run.tasks]): run for run in runs.values()}
    for run in of_tasks.values():
        told |= dict.fromkeys(split_warnings(check_tasks(run.tasks), run.evaluation.fitness))
    return list(told)


def _summarise(runs: Mapping[str, RunConfig], folder: SweepFolder) -> None:
    """Write table and figure of the finished runs; raises RunError where one is not finished."""
    from moe_evo.report.sweep import sweep_figure, sweep_result

    unfinished = [name for name in runs if not folder.run(name).result.is_file()]
    finished = {name: folder.run(name).read_result() for name in runs if name not in unfinished}
    if finished:
        result = sweep_result(finished, unfinished)
        folder.write_result(result)
        sweep_figure(folder.figure, result)
    if unfinished:
        raise RunError(
            f"{folder.path}: {len(unfinished)} of {len(runs)} runs failed ({', '.join(unfinished[:5])}); "
            f"{folder.logs} says why; mend that and run the same command again"
        )


class _Progress:
    """Prints a line when the state of a run changes; `watch` shows how many evaluations all runs have made."""

    def __init__(
        self, folder: SweepFolder, tracker: Tracker, runs: Mapping[str, RunConfig], missing: Mapping[str, RunConfig]
    ) -> None:
        self._folder, self._tracker = folder, tracker
        self._total, self._ended = len(runs), len(runs) - len(missing)
        self._budgets = {name: run.search.evaluations for name, run in missing.items()}
        self._made = {name: self._journalled(name) for name in missing}
        self._running: set[str] = set()
        self._watched_at = -math.inf

    def begin(self) -> None:
        """Begin a bar over the evaluations of all runs that are not finished."""
        self._tracker.stage("all runs", sum(self._budgets.values()), done=sum(self._made.values()))

    def __call__(self, name: str, event: RunEvent) -> None:
        if event == "started":
            self._running.add(name)
            line = "started"
        elif event == "crashed":
            line = "crashed, starts again where it stood"
        else:
            self._running.discard(name)
            self._ended += 1
            line = f"{self._outcome(name)} ({self._ended} of {self._total})"
        self._tracker.message(f"run {name}: {line}")

    def watch(self, *, is_last: bool = False) -> None:
        """Advance the bar by what the journals of the runs under way have, every few seconds."""
        if time.monotonic() - self._watched_at < _WATCH_INTERVAL_S and not is_last:
            return
        self._watched_at = time.monotonic()
        before = sum(self._made.values())
        for name, budget in self._budgets.items():
            if name in self._running:
                self._made[name] = max(self._journalled(name), self._made[name])
            elif self._folder.run(name).result.is_file():
                self._made[name] = budget
        made = sum(self._made.values()) - before
        if made:
            runs = f"{self._ended} of {self._total} runs ended, {len(self._running)} under way"
            self._tracker.advanced(made, runs)

    def _journalled(self, name: str) -> int:
        """How many evaluations of its search a run has in its journal."""
        run = self._folder.run(name)
        if not run.journal.is_file():
            return 0
        try:
            with run.open_journal() as journal:
                return journal.num_told(MAIN)
        except JournalError:  # it is being written; the next look may fare better
            return 0

    def _outcome(self, name: str) -> str:
        run = self._folder.run(name)
        if not run.result.is_file():
            return f"failed, see {self._folder.log(name)}"
        scores = run.read_result().best.scores
        return ", ".join(["done", *(f"{split} {score.fitness:.3f}" for split, score in scores.items())])


def _one_by_one(
    config: SweepConfig,
    source: ModelSource,
    runs: Mapping[str, RunConfig],
    folder: SweepFolder,
    tracker: Tracker,
    progress: _Progress,
) -> None:
    """Make the runs one after the other in this process; without a cluster, the model is loaded once for all."""
    from moe_evo.models.load import load_model

    with ExitStack() as stack:
        model = cluster = None
        if config.cluster.address is None:
            tracker.message(f"loading {config.model.path}")
            model = load_model(source)
        else:
            cluster = stack.enter_context(_service(config, source, folder, tracker))
        for name, run in runs.items():
            progress(name, "started")
            folder.logs.mkdir(exist_ok=True)
            try:
                search_command(run, tracker, model, cluster)
            except ClusterError:
                raise
            except MoeEvoError as error:
                write_whole(folder.log(name), f"error: {error}\n")
            progress(name, "ended")


def _with_tune(
    config: SweepConfig,
    source: ModelSource,
    runs: Mapping[str, RunConfig],
    folder: SweepFolder,
    tracker: Tracker,
    progress: _Progress,
) -> None:
    """Make the runs as trials of Ray Tune, which share one service of gangs."""
    with _service(config, source, folder, tracker) as cluster:
        from moe_evo.gangs.tune_runs import run_trials

        progress.begin()
        for wave in _waves(runs, config):
            run_trials(
                wave,
                partial(_search_in_trial, cluster=cluster),
                folder.tune,
                max_concurrent=min(config.sweep.max_concurrent, len(wave)),
                max_failures=config.sweep.max_failures,
                tell=progress,
                watch=progress.watch,
            )
        progress.watch(is_last=True)


@contextmanager
def _service(
    config: SweepConfig, source: ModelSource, folder: SweepFolder, tracker: Tracker
) -> Iterator[ClusterConfig]:
    """The cluster config of the runs: they share gangs that are started here, as those of a trial would end with it."""
    from moe_evo.gangs.connection import connected, gangs_without_drivers, shared_service

    cluster = config.cluster
    address = cluster.address or "local"
    name = cluster.service or f"{folder.path.name}-{uuid.uuid4().hex[:8]}"
    tracker.message(f"connecting to Ray ({address})")
    with connected(address, extra_cpus=config.sweep.max_concurrent):
        num_gangs = cluster.num_gangs
        if address == "local" and num_gangs == "auto":  # leaves the CPUs that the runs' drivers need
            num_gangs = gangs_without_drivers(config.model, cluster)
        shared = replace(cluster, address="auto", service=name, num_gangs=num_gangs)
        with shared_service(source.config, source.hash, shared, keep=cluster.service is not None):
            yield shared


def _waves(runs: Mapping[str, RunConfig], config: SweepConfig) -> list[dict[str, RunConfig]]:
    """Groups of runs that may run at the same time: one group, or with warm starts one for each number of experts."""
    if not config.sweep.warm_start:
        return [dict(runs)]
    sizes = dict.fromkeys(run.search.mean_kept for run in runs.values())
    return [{name: run for name, run in runs.items() if run.search.mean_kept == size} for size in sizes]


def _search_in_trial(config: RunConfig, report: Report, cluster: ClusterConfig) -> None:
    """Make one whole search, as a trial, on the gangs of `cluster`. report: called with the numbers that Tune shows."""
    from moe_evo.report.screen import screen

    assert config.folder is not None
    run = RunFolder(Path(config.folder))
    folder = SweepFolder(run.path.parent.parent)
    folder.logs.mkdir(exist_ok=True)
    log = folder.log(run.path.name)
    with log.open("a", encoding="utf-8") as stream, TerminalTracker(screen(file=stream)) as tracker:
        try:
            search_command(config, tracker, cluster=cluster)
        except ClusterError:
            raise  # another try may fare better
        except MoeEvoError as error:
            tracker.message(f"error: {error}")
            return
    report({split: score.fitness for split, score in run.read_result().best.scores.items()})


def _default_folder(config: SweepConfig) -> str:
    names = [task_name(TaskConfig(data=data)) for data in config.sweep.tasks] or list(map(task_name, config.tasks))
    return f"runs/sweep-{as_file_name('+'.join(names))[:150]}"
