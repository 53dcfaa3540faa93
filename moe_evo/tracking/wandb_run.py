"""The W&B run that a search or a recovery is written to, and the mode of W&B."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe_evo.config.run import TrackingConfig
from moe_evo.plain import Plain

Mode = Literal["online", "offline", "disabled"]

_FINISH_TIMEOUT_S = 15.0
_MODES: dict[str, Mode] = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}


def wandb_mode(config: TrackingConfig) -> Mode:
    """The mode of W&B. If `tracking.wandb` is 'auto', WANDB_MODE decides, else whether WANDB_API_KEY is set."""
    if config.wandb != "auto":
        return config.wandb
    mode = os.environ.get("WANDB_MODE")
    if mode is not None:
        return _MODES.get(mode, "disabled")
    return "online" if os.environ.get("WANDB_API_KEY") else "disabled"


@dataclass(frozen=True)
class WandbRun:
    """The W&B run of a search, or of a recovery.

    folder: of the search; W&B's files are kept in its subfolder `wandb`. num_rows: most rows of the table of
    individuals. fitness_label: what fitness is called in captions. finish_timeout_s: how long the end of the search
    waits for the upload of the rest. begin_timeout_s: the same where W&B has not answered yet.
    """

    config: TrackingConfig
    mode: Mode
    id: str
    name: str
    folder: Path
    settings: Plain
    num_rows: int
    fitness_label: str = "fitness"
    tags: Sequence[str] = ()
    finish_timeout_s: float = field(default_factory=lambda: _FINISH_TIMEOUT_S)
    begin_timeout_s: float = 0.0
    is_recovery: bool = False

    @property
    def job_type(self) -> str:
        return "recovery" if self.is_recovery else "search"

    @property
    def step_metric(self) -> str:
        """The key that curves are drawn against."""
        return "recovery/step" if self.is_recovery else "evaluations"

    @property
    def replaced_offline(self) -> str:
        """How the names of older offline runs in the folder end that this one stands in for."""
        return self.id if self.is_recovery else ""

    @property
    def without_it(self) -> str:
        """What becomes of the numbers where W&B did not get them."""
        if self.is_recovery:
            return "the recovery does not need it, and its checkpoint will hold all losses (moe_evo/recovery.json)"
        return f"the search does not need it and the journal keeps all: moe-evo wandb-replay {self.folder}"
