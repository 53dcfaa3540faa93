"""The folder of a run: its resolved config, journal, winner, result and pictures, by their names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from moe_evo.config import RunConfig, difference
from moe_evo.errors import RunError
from moe_evo.journal import Journal


class RunFolder:
    """Paths of a run, and what keeps two different runs out of one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.journal = path / "journal.sqlite"
        self.best = path / "best.safetensors"
        self.best_pruning = path / "best_pruning.safetensors"
        self.result = path / "result.json"
        self.figure = path / "search.png"
        self.kept_figure = path / "kept_experts.png"

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of a run that was started before."""
        folder = cls(Path(path))
        if not folder.config.is_file() or not folder.journal.is_file():
            raise RunError(
                f"{path}: not the folder of a run (no {folder.config.name} and {folder.journal.name} in it); "
                "give the folder that `moe-evo search` printed"
            )
        return folder

    def claim(self, config: RunConfig) -> None:
        """Create the folder for this config, or check that it already holds a run of the same config."""
        if self.config.is_file():
            self._check_same(config)
            return
        if self.path.is_dir() and any(self.path.iterdir()):
            raise RunError(f"{self.path}: holds other files and no run; give a new or empty folder with --folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write(self.config, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder with --folder"
            ) from error

    def _check_same(self, config: RunConfig) -> None:
        old, new = yaml.safe_load(self.config.read_text("utf-8")), plain(config)
        # A run may be moved or mounted elsewhere: where it lies is not what it does.
        lines = difference({**old, "folder": None}, {**new, "folder": None})
        if lines:
            raise RunError(
                f"{self.path}: holds a run with another config ({'; '.join(lines)}); use another --folder, or "
                f"go on with the old config: moe-evo search --resume {self.path}"
            )

    def open_journal(self, *, read_only: bool = False) -> Journal:
        return Journal(self.journal, read_only=read_only)

    def write(self, path: Path, text: str) -> None:
        """Write a file of this folder whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, "utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def write_result(self, result: Mapping[str, Any]) -> None:
        self.write(self.result, json.dumps(result, indent=2, ensure_ascii=False) + "\n")

    def read_result(self) -> dict[str, Any]:
        """The result of a finished run."""
        if not self.result.is_file():
            raise RunError(f"{self.path}: this run is not finished; go on with: moe-evo search --resume {self.path}")
        result: dict[str, Any] = json.loads(self.result.read_text("utf-8"))
        return result


def plain(config: RunConfig) -> dict[str, Any]:
    """The config as plain data, as YAML holds it."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return data


def default_folder(config: RunConfig) -> Path:
    """runs/ and a name that says what differs between runs."""
    tasks = "+".join(task.name or Path(task.data).stem for task in config.task_configs)
    kept = config.search.num_kept
    label = str(kept) if isinstance(kept, int) else "-".join(map(str, kept))
    return Path("runs") / f"{tasks}-keep{label}-{config.search.algorithm}-seed{config.search.seed}"
