"""Embedded tasks with few-shot examples, which the embedded data does not set apart."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from moe_evo.config.task import TaskConfig


def few_shot_task(name: str, shots: int, folder: Path, **options: Any) -> TaskConfig:
    """The embedded task `name`, its first validation examples put before every prompt; options: of `TaskConfig`."""
    if not shots:
        return TaskConfig(data=name, **options)
    source = resources.files("moe_evo").joinpath("data", "tasks", name)
    (target := folder / name).mkdir(parents=True)
    for split in ("search", "validation", "test"):
        lines = source.joinpath(f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        first = shots if split == "validation" else 0
        (target / f"{split}.jsonl").write_text("".join(lines[first:]), encoding="utf-8")
        if first:
            (target / "few_shot.jsonl").write_text("".join(lines[:first]), encoding="utf-8")
    return TaskConfig(name=name, data=str(target), few_shot=str(target / "few_shot.jsonl"), **options)
