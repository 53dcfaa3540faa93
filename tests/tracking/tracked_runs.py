"""Searches that are tracked, and runs of W&B as its own reader shows them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_evo.commands.search import search as search_command
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig, TrackingConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import EvaluationFailure, Outcome
from moe_evo.records.journal import MAIN
from moe_evo.tracking.terminal import TerminalTracker

WANDB = str(Path(sys.executable).with_name("wandb"))
CONFIG = RunConfig(
    model=ModelConfig(self_check=False, top_p=0.9),
    tasks=[TaskConfig(data="syll", num_search=16, num_validation=8, num_test=16)],
    search=SearchConfig(algorithm="eep", num_kept=4, evaluations=40, seed=3),
    evaluation=EvaluationConfig(threads=1),
    selection=SelectionConfig(finalists=3, random_search=True),
    tracking=TrackingConfig(wandb="offline", group="ratios", tags=["first"]),
)
SMALL = replace(
    CONFIG,
    search=replace(CONFIG.search, evaluations=12),
    selection=SelectionConfig(finalists=2),
    tracking=TrackingConfig(),
)


class SomeFail:
    """An evaluator without fitness for some genomes, at which somebody may press Ctrl-C after so many evaluations.

    pause_s: before each evaluation, so that W&B hears of it before the run has ended.
    """

    def __init__(self, evaluator: Evaluator, after: int = 10**9, pause_s: float = 0.0) -> None:
        self._evaluator, self._left, self.model = evaluator, after, evaluator.model
        self._pause_s = pause_s

    def __getattr__(self, name: str) -> object:
        return getattr(self._evaluator, name)

    def evaluate(self, genomes: list[Genome], split: str, **_: Any) -> list[Outcome]:
        time.sleep(self._pause_s)
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        failure = EvaluationFailure("non_finite", "logits are NaN", 0.1)
        fails = [not one.layers[0].is_identity and one.layers[0].kept[:2] == (1, 2) for one in genomes]
        found = self._evaluator.evaluate(genomes, split)
        return [failure if failed else outcome for failed, outcome in zip(fails, found, strict=True)]


def search(folder: Path, config: RunConfig = CONFIG) -> str:
    """Run a search; answers what the terminal showed."""
    shown = io.StringIO()
    with TerminalTracker(Console(file=shown, width=500)) as tracker:
        search_command(replace(config, folder=str(folder)), tracker)
    return shown.getvalue()


class Record:
    """A run of W&B as its own reader shows it."""

    def __init__(self, folder: Path) -> None:
        (self.folder,) = folder.glob("wandb/offline-run-*")
        command = [WANDB, "leet", "inspect", "--json", str(self.folder)]
        environment = {**os.environ, "WANDB_ERROR_REPORTING": "false"}
        text = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        self.records = [json.loads(line) for line in text.splitlines()]
        self.run = next(one["run"] for one in self.records if one["type"] == "run")
        self.history = [one["history"]["item"] for one in self.records if one["type"] == "history"]
        self.summary: dict[str, Any] = {}
        for one in self.records:
            if one["type"] == "summary":
                self.summary |= one["summary"].get("update", {})

    @property
    def keys(self) -> set[str]:
        """Logged keys, without W&B's own and without the parts of tables and pictures."""
        logged = {key for item in [*self.history, self.summary] for key in item}
        return {key.split("._")[0].split(".")[0] for key in logged if not key.startswith("_")}

    def points(self, key: str, search: str = MAIN) -> list[tuple[int, float]]:
        return [
            (item["evaluations"], item[key])
            for item in self.history
            if key in item and f"recorded/{search}_search" in item
        ]

    def rows(self) -> list[list[Any]]:
        """Of the table of individuals: its increments, in order."""
        paths = [item["individuals.path"] for item in self.history if "individuals.path" in item]
        return [row for path in paths for row in json.loads((self.folder / "files" / path).read_text())["data"]]
