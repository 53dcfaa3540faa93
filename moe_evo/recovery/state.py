"""The state of a training on disk, from which one that was killed goes on with the same losses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_evo.files.write import whole_file
from moe_evo.plain import plain_fields, value_of


@dataclass(frozen=True)
class Check:
    """Losses after some steps. training: mean over the steps since the check before; None before the first step."""

    step: int
    training: float | None
    validation: float


@dataclass(frozen=True)
class Learned:
    """What a training has done so far.

    checks: all of them, the first before any step. steps: how many were made. tokens: what was read in them. stopped:
    why it ended before its last step; '' where it did not.
    """

    checks: tuple[Check, ...] = ()
    steps: int = 0
    tokens: int = 0
    duration_s: float = 0.0
    stopped: str = ""

    @property
    def best(self) -> Check:
        """The check with the lowest validation loss, the first of equal ones: its weights are kept."""
        return min(self.checks, key=lambda check: check.validation)

    def is_over(self, steps: int) -> bool:
        """Whether nothing more is to be done of so many steps."""
        return bool(self.stopped) or (self.steps == steps and bool(self.checks) and self.checks[-1].step == steps)


@dataclass(frozen=True, eq=False)
class TrainingState:
    """batch_tokens: most tokens of a pass, which may have been halved. tensors: weights and the optimizer's moments."""

    learned: Learned
    batch_tokens: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Replace the file at once: a process that dies leaves the old or the new one."""
        told = {"learned": plain_fields(self.learned), "batch_tokens": self.batch_tokens}
        with whole_file(file) as temporary:
            save_file(dict(self.tensors), temporary, metadata={"state": json.dumps(told)})

    @classmethod
    def load(cls, file: Path) -> TrainingState:
        """The state that `save` wrote."""
        opened: Any
        with safe_open(file, framework="pt") as opened:
            told = json.loads(opened.metadata()["state"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        return cls(value_of(Learned, told["learned"]), told["batch_tokens"], tensors)
