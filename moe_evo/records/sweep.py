"""The folder of a sweep: a folder for each run, the sweep's config, and one table of all results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_evo.errors import RunError
from moe_evo.files.json_text import read_json
from moe_evo.files.write import write_whole
from moe_evo.plain import PlainError, plain, value_of
from moe_evo.records.folder import RunFolder
from moe_evo.records.result import Score


@dataclass(frozen=True)
class SweepLine:
    """One row of the final table of one run; see `Row` for most fields.

    test: fitness on the test split; None where the evaluation failed. front: whether it is on the Pareto front of
    parameters and test score, among the lines of the same tasks.
    """

    run: str
    tasks: tuple[str, ...]
    algorithm: str
    seed: int
    key: str
    title: str
    num_kept: tuple[int, ...]
    parameters: int
    bytes: int
    digest: str
    scores: Mapping[str, Score] = field(hash=False)
    test: float | None = None
    front: bool = False


@dataclass(frozen=True, repr=False)
class SweepResult:
    """The final tables of a sweep's finished runs as one. unfinished: names of the other runs."""

    runs: tuple[str, ...]
    lines: tuple[SweepLine, ...]
    unfinished: tuple[str, ...] = ()

    def __repr__(self) -> str:
        more = f", {len(self.unfinished)} unfinished" if self.unfinished else ""
        return f"<SweepResult of {len(self.runs)} finished runs{more}, {len(self.lines)} lines>"


class SweepFolder:
    """Paths of a sweep's files and of its runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "sweep.yaml"
        self.result = path / "sweep.json"
        self.figure = path / "sweep.png"
        self.tune = path / "tune"
        self.logs = path / "logs"

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.path / "runs" / name)

    @property
    def is_sweep(self) -> bool:
        """Whether the folder holds a sweep."""
        return self.config.is_file()

    @property
    def begun(self) -> dict[str, RunFolder]:
        """The runs that have begun, by name in order; raises RunError where there is none."""
        folders = sorted(self.path.glob("runs/*/config.yaml"))
        if not folders:
            raise RunError(f"{self.path}: no run of this sweep has begun; give the same command again")
        return {file.parent.name: RunFolder(file.parent) for file in folders}

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.txt"

    def write_result(self, result: SweepResult) -> None:
        write_whole(self.result, json.dumps(plain(result), indent=2) + "\n")

    def read_result(self) -> SweepResult:
        """The result, of this or an older version; raises RunError."""
        if not self.result.is_file():
            raise RunError(f"{self.path}: this sweep is not finished; give the same command again")
        again = "delete it and give the same command again, it is made anew"
        data = read_json(self.result, RunError, again)
        try:
            return value_of(SweepResult, data)
        except PlainError as error:
            raise RunError(f"{self.result}: cannot be read ({error}); {again}") from error


def run_folders(folders: Sequence[str]) -> list[str]:
    """The folders of runs, with those of a sweep's runs in place of the sweep; raises RunError for an empty sweep."""
    found: list[str] = []
    for one in folders:
        sweep = SweepFolder(Path(one))
        found += [str(run.path) for run in sweep.begun.values()] if sweep.is_sweep else [one]
    return found
