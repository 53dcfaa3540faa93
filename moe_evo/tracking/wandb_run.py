"""Which run of Weights & Biases a search is, and in which mode."""

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
    """What `tracking.wandb` comes to: 'auto' is what WANDB_MODE says, else online if WANDB_API_KEY is set."""
    if config.wandb != "auto":
        return config.wandb
    mode = os.environ.get("WANDB_MODE")
    if mode is not None:
        return _MODES.get(mode, "disabled")
    return "online" if os.environ.get("WANDB_API_KEY") else "disabled"


@dataclass(frozen=True)
class WandbRun:
    """Which run of W&B a search is.

    folder: of the search; W&B's files are kept in its subfolder `wandb`. num_rows: of the table of individuals,
    at most. finish_timeout_s: how long the end of the search waits for what is not uploaded yet.
    begin_timeout_s: the same where the service has not answered at all yet.
    """

    config: TrackingConfig
    mode: Mode
    id: str
    name: str
    folder: Path
    settings: Plain
    num_rows: int
    tags: Sequence[str] = ()
    finish_timeout_s: float = field(default_factory=lambda: _FINISH_TIMEOUT_S)
    begin_timeout_s: float = 0.0
