"""The state of a training over several workers on disk: every tensor whole, under the parameter's name.

So it can go on with another number of workers, or another stage of ZeRO. A folder holds `state.json`, which is
replaced at once, and a folder of tensors for each step that it needs: the last one, and the best.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_evo.plain import plain_fields, value_of
from moe_evo.recovery.state import Learned

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
"""Float32 weights, or a moment of AdamW."""

KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")

_INDEX = "state.json"
_FILE_BYTES = 2**30  # so much of the host's memory is taken while a state is written


@dataclass(frozen=True)
class ShardedState:
    """What a training has done, and the most tokens of a pass, which may have been halved."""

    learned: Learned
    batch_tokens: int

    @classmethod
    def load(cls, folder: Path) -> ShardedState | None:
        """The last state that `save` kept; None before the first."""
        file = folder / _INDEX
        return value_of(cls, json.loads(file.read_text("utf-8"))) if file.is_file() else None

    def save(self, folder: Path) -> None:
        """Replace the state before, once the tensors of its step are written; drops those that are not needed."""
        file = folder / _INDEX
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(plain_fields(self)) + "\n", "utf-8")
        temporary.replace(file)
        needed = {_of_step(folder, step) for step in (self.learned.steps, self.learned.best.step)}
        for other in set(folder.glob("step-*")) - needed:
            shutil.rmtree(other)


def write_tensors(folder: Path, step: int, tensors: Iterable[tuple[Kind, str, Tensor]]) -> None:
    """Keep the tensors of a step, each with its kind and the parameter's name, in files of bounded size."""
    target = _of_step(folder, step)
    shutil.rmtree(target, ignore_errors=True)  # of a process that was killed while it wrote
    target.mkdir(parents=True)
    part: dict[str, Tensor] = {}
    number = 0
    for kind, name, tensor in tensors:
        part[f"{kind}/{name}"] = tensor
        if sum(one.nbytes for one in part.values()) >= _FILE_BYTES:
            _write(target / f"{number:05d}.safetensors", part)
            part, number = {}, number + 1
    if part:
        _write(target / f"{number:05d}.safetensors", part)


def read_tensors(folder: Path, step: int) -> Iterator[tuple[str, str, Tensor]]:
    """What `write_tensors` wrote, one tensor after the other."""
    for file in sorted(_of_step(folder, step).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                kind, _, name = key.partition("/")
                yield kind, name, opened.get_tensor(key)


def _of_step(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    """On the disk, and not only in the system's memory, before `state.json` names it."""
    save_file(tensors, file)
    with file.open("rb") as written:
        os.fsync(written.fileno())
