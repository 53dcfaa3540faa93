"""Runs as trials of Ray Tune: started side by side, started again when they crash."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would swallow an interrupt
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other output begins with a banner, quiet or not

import ray.tune as _tune

from moe_evo.config.run import RunConfig

tune: Any = _tune
Report = Callable[[dict[str, Any]], None]
RunEvent = Literal["started", "crashed", "ended"]
Tell = Callable[[str, RunEvent], None]
"""Told of a run by its name, in the process that called `run_trials`."""


def run_trials(
    runs: Mapping[str, RunConfig],
    function: Callable[[RunConfig, Report], None],
    folder: Path,
    *,
    max_concurrent: int,
    max_failures: int,
    tell: Tell,
    watch: Callable[[], None],
) -> None:
    """Call `function(config, report)` for every run, each in a process with one CPU, in the given order.

    folder: of Tune's state, from which `Tuner.restore` with `trainable(runs, function)` goes on. tell:
    called when a run begins, crashes or ends; a run that fails for good is reported so and raises nothing. watch:
    called in between, every few moments.
    """
    tuner = tune.Tuner(
        trainable(runs, function),
        param_space={"run": tune.grid_search(list(runs))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=max_concurrent,
            trial_name_creator=_name,
            reuse_actors=True,  # the next run needs the same imports
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[_Teller(tell, watch)],
            verbose=0,
        ),
    )
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # `tell` says it in a line, and the run's own log in more
    try:
        tuner.fit()
    finally:
        logger.setLevel(level)


def trainable(runs: Mapping[str, RunConfig], function: Callable[[RunConfig, Report], None]) -> Any:
    """What a trial does with `{"run": name}`."""

    def trial(parameters: dict[str, Any]) -> None:
        function(runs[parameters["run"]], tune.report)

    return tune.with_resources(trial, {"cpu": 1})


def _name(trial: Any) -> str:
    return str(trial.config["run"])


def _to_nobody(name: str, event: RunEvent) -> None:
    pass


def _nothing() -> None:
    pass


class _Teller(tune.Callback):  # type: ignore[misc]
    """A callback of Tune that calls `tell` for each run that begins, crashes or ends, and `watch` in between."""

    def __init__(self, tell: Tell, watch: Callable[[], None]) -> None:
        self._tell = tell
        self._watch = watch

    def __reduce__(self) -> Any:
        return (_Teller, (_to_nobody, _nothing))  # Tune keeps callbacks with its state; a terminal cannot be kept

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._watch()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._tell(_name(trial), "started")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._tell(_name(trial), "crashed")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._tell(_name(trial), "ended")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._tell(_name(trial), "ended")
