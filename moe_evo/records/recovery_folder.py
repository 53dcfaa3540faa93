"""The folder in which a recovery keeps its work, so that one that was killed goes on where it stood."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from moe_evo.config.run import difference
from moe_evo.errors import MoeEvoError, RunError
from moe_evo.files.json_text import read_json
from moe_evo.files.write import write_whole
from moe_evo.genomes.population import Evaluation
from moe_evo.plain import Plain, PlainError, value_of
from moe_evo.records.lock import lock

_NUMBERS = ("fitness", "tie_break", "standard_error", "num_examples", "duration_s")


@dataclass(frozen=True)
class _KeptScore:
    """A score in its file; see `Evaluation`."""

    fitness: float
    tie_break: float
    standard_error: float
    num_examples: int
    duration_s: float
    metrics: Mapping[str, float] = field(hash=False)
    scores: Mapping[str, tuple[float, ...]] = field(hash=False)


class RecoveryFolder:
    """Paths of a recovery's files beside the checkpoint `target` that it will write."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.recovery")
        self.job = self.path / "job.json"
        self.lock = self.path / "job.lock"
        self.student = self.path / "student"
        self.lessons = self.path / "lessons"
        self._tracking_id = self.path / "tracking-id"

    @contextmanager
    def claim(self, job: Plain) -> Iterator[None]:
        """Lock the folder until the block is left, and remove it if that ends without an error.

        job: everything that the result depends on. Raises RunError where the folder holds the work of another one, or
        where another process works in it.
        """
        if self.path.is_dir() and not self.job.is_file() and any(self.path.iterdir()):
            raise RunError(f"{self.path}: holds other files; move them, or give another --to")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); give another --to") from error
        with lock(self.lock, RunError):
            if self.job.is_file():
                self._check(job)
            else:
                write_whole(self.job, json.dumps(job, indent=2) + "\n")
            try:
                yield
            except MoeEvoError:
                if set(self.path.iterdir()) <= {self.job, self.lock, self._tracking_id}:  # nothing was done yet
                    shutil.rmtree(self.path)
                raise
            shutil.rmtree(self.path)

    def _check(self, job: Plain) -> None:
        known = read_json(self.job, RunError, f"delete {self.path}, or give another --to")
        lines = difference(known, json.loads(json.dumps(job)))
        if lines:
            raise RunError(
                f"{self.path}: holds the work of another recovery ({'; '.join(lines)}); delete it, or give another --to"
            )

    def tracking_id(self) -> str:
        """The id of the W&B run of this recovery, made when it is first asked for."""
        if not self._tracking_id.is_file():
            write_whole(self._tracking_id, secrets.token_hex(4))
        return self._tracking_id.read_text("utf-8")

    def state(self, number: int) -> Path:
        """The file for the state of the method with this number among those that are done one after the other."""
        return self.path / f"state-{number}.safetensors"

    def workers_state(self, number: int) -> Path:
        """The same where workers train: a folder."""
        return self.path / f"state-{number}"

    def student_of(self, number: int) -> Path:
        """The folder for the checkpoint that workers train by the method with this number."""
        return self.path / f"student-{number}"

    def score(self, name: str) -> Evaluation | None:
        """What `keep_score` kept; None where there is nothing."""
        file = self.path / f"score-{name}.json"
        if not file.is_file():
            return None
        again = f"delete it and give the same command again, the {name} model is scored anew"
        data = read_json(file, RunError, again)
        try:
            told = value_of(_KeptScore, data)
        except PlainError as error:
            raise RunError(f"{file}: {error}; {again}") from error
        scores = {task: np.array(values, np.float64) for task, values in told.scores.items()}
        numbers = {one: getattr(told, one) for one in _NUMBERS}
        return Evaluation(**numbers, metrics=told.metrics, scores=MappingProxyType(scores))

    def keep_score(self, name: str, evaluation: Evaluation) -> None:
        """Keep a model's score on the test split with that of every example."""
        scores = evaluation.scores or {}
        told = {name: getattr(evaluation, name) for name in _NUMBERS}
        told |= {"metrics": dict(evaluation.metrics), "scores": {task: one.tolist() for task, one in scores.items()}}
        write_whole(self.path / f"score-{name}.json", json.dumps(told) + "\n")
