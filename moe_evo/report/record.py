"""The data of a run that reports show, read once from its folder, finished or not, without model or torch.

Only the genomes that are shown are decoded, as a journal may have thousands of large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from moe_evo.config.run import RunConfig
from moe_evo.config.search import SearchConfig
from moe_evo.errors import ConfigError, RunError
from moe_evo.files.yaml_text import yaml_of
from moe_evo.genomes.file import load_genome
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, EvaluationFailure, Outcome
from moe_evo.plain import PlainError, value_of
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN, RANDOM, REFERENCE, Journal
from moe_evo.records.make_result import gang_facts
from moe_evo.records.result import GangFacts, RunResult
from moe_evo.searches.base import Phase, phase_starts
from moe_evo.searches.registry import planned_phases
from moe_evo.shown import line_of, shown
from moe_evo.tasks.sources import task_name


@dataclass(frozen=True)
class Ancestry:
    """The operator and the parents that a candidate was made by."""

    operator: str
    parents: tuple[int, ...]


@dataclass(frozen=True)
class GangNow:
    """The last status of a gang that its run recorded."""

    number: int
    node: str = ""
    evaluations: int = 0
    evaluations_per_s: float | None = None
    restarts: int = 0


@dataclass(frozen=True)
class _Status:
    gangs: tuple[GangNow, ...] = ()


@dataclass(frozen=True)
class Record:
    """The data of one run.

    label: its name in a report, different from those of other runs in it. result: None while the run is not
    finished. outcomes, random, validation, test: outcomes by candidate number, in the order in which they finished,
    of the search, of the random search, of the search's finalists, and of its candidates in the final table.
    full: the full model on the search split. gang_events: as `Journal.gang_events`; gangs: their last status.
    genomes: by key of the final table, those that are more than a list of kept experts; of an unfinished run the
    best so far, as 'best'. recovery_cost: evaluations of the budget that go into recovering finalists.
    """

    folder: Path
    label: str
    config: RunConfig
    result: RunResult | None
    outcomes: Mapping[int, Outcome] = field(default_factory=dict)
    ancestry: Mapping[int, Ancestry] = field(default_factory=dict)
    random: Mapping[int, Outcome] = field(default_factory=dict)
    validation: Mapping[int, Outcome] = field(default_factory=dict)
    test: Mapping[int, Outcome] = field(default_factory=dict)
    full: Evaluation | None = None
    gang_events: Sequence[tuple[float, int, str, str]] = ()
    gangs: tuple[GangNow, ...] = ()
    genomes: Mapping[str, Genome] = field(default_factory=dict)
    recovery_cost: int = 0

    @property
    def search(self) -> SearchConfig:
        return self.config.search

    @cached_property
    def task_names(self) -> tuple[str, ...]:
        return tuple(map(task_name, self.config.tasks))

    @property
    def is_finished(self) -> bool:
        return self.result is not None

    @property
    def best(self) -> int | None:
        """The winner's candidate number; for an unfinished run, that of the best search fitness so far, if any."""
        if self.result is not None:
            row = self.result.row("best")
            return None if row is None else row.candidate
        return _best(self.outcomes)

    @property
    def failures(self) -> dict[int, EvaluationFailure]:
        """Failed evaluations of the search by candidate number."""
        return {number: one for number, one in self.outcomes.items() if isinstance(one, EvaluationFailure)}

    def phases(self) -> list[tuple[Phase, int]]:
        """The phases of the search that have candidates, each with the number of its first candidate."""
        searched = replace(self.search, evaluations=self.search.evaluations - self.recovery_cost)
        phases = planned_phases(searched, can_prune=True)  # operators show if it did not prune
        starts = phase_starts(phases, {number: one.operator for number, one in self.ancestry.items()})
        ends = [*starts[1:], searched.evaluations]
        return [(phase, start) for phase, start, end in zip(phases, starts, ends, strict=True) if start < end]

    def ancestors(self) -> list[int]:
        """The numbers of the winner and all its ancestors, in order."""
        found: set[int] = set()
        waiting = [] if self.best is None else [self.best]
        while waiting:
            number = waiting.pop()
            if number not in found and number in self.ancestry:
                found.add(number)
                waiting.extend(self.ancestry[number].parents)
        return sorted(found)

    def gang_summary(self) -> GangFacts | None:
        """The number of gang events of each kind, and why gangs broke; None for a run without gangs."""
        known = None if self.result is None else self.result.gangs
        return known or gang_facts(self.gang_events)


def read_records(folders: Sequence[str | Path]) -> list[Record]:
    """The runs in `folders`, each once, in the given order; raises RunError for a folder that holds no run."""
    runs = [RunFolder.existing(one) for one in folders]
    different = list({run.path.resolve(): run for run in runs}.values())
    labels = _labels([run.path for run in different])
    return [_read(run, label) for run, label in zip(different, labels, strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as are needed for all labels to differ."""
    parts = [path.resolve().parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _read(run: RunFolder, label: str) -> Record:
    config = _config(run.config)
    result = run.read_result() if run.result.is_file() else None
    if result is not None:
        _check_same(run, config, result)
    record = Record(run.path, label, config, result, genomes=_winners(run))
    if not run.journal.is_file():  # a result that was kept without its journal
        return record
    with run.open_journal() as journal:
        outcomes = journal.told(MAIN)
        best = _best(outcomes)
        genomes = dict(record.genomes)
        if result is None and best is not None:
            genomes["best"] = journal.genome(MAIN, best)
        full = journal.outcomes(REFERENCE, "search").get(0)
        return Record(
            folder=run.path,
            label=label,
            config=config,
            result=result,
            outcomes=outcomes,
            ancestry={number: Ancestry(*one) for number, one in journal.ancestry(MAIN).items()},
            random=journal.told(RANDOM),
            validation=journal.outcomes(MAIN, "validation"),
            test=journal.outcomes(MAIN, "test"),
            full=full if isinstance(full, Evaluation) else None,
            gang_events=journal.gang_events(),
            gangs=_gangs(run, journal),
            genomes=genomes,
            recovery_cost=journal.recovery_cost,
        )


def _config(path: Path) -> RunConfig:
    # read without the command line's parser, which would take a tenth of a second a run
    try:
        content = yaml_of(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({line_of(error)})") from error
    try:
        if not isinstance(content, dict) or not {"model", "tasks", "search"} <= content.keys():
            raise PlainError("it has no sections model, tasks and search")
        return value_of(RunConfig, content)
    except (PlainError, ConfigError) as error:
        raise RunError(
            f"{path}: is not the config of a run of this moe_evo ({error}); use the moe_evo that wrote it"
        ) from error


def _check_same(run: RunFolder, config: RunConfig, result: RunResult) -> None:
    """Raise RunError where result.json and config.yaml are not of the same run."""
    names = (sorted(map(task_name, config.tasks)), sorted(task.name for task in result.tasks))
    if names[0] != names[1]:
        raise RunError(
            f"{run.result}: has the tasks {shown(names[1])}, but {run.config.name} beside it {shown(names[0])}; bring "
            "back the files of one run"
        )


def _gangs(run: RunFolder, journal: Journal) -> tuple[GangNow, ...]:
    try:
        return value_of(_Status, journal.pool_status() or {}).gangs
    except PlainError as error:
        raise RunError(f"{run.journal}: pool_status: {error}; restore the file from a copy") from error


def _winners(run: RunFolder) -> dict[str, Genome]:
    return {key: load_genome(path) for key, path in run.winners.items() if path.is_file()}


def _best(outcomes: Mapping[int, Outcome]) -> int | None:
    keys = {number: one.rank_key for number, one in outcomes.items() if isinstance(one, Evaluation)}
    return max(keys, key=lambda number: (*keys[number], -number), default=None)
