"""`Run` and `Sweep`: a run or a sweep as a Python object that reads its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from moe_evo.api.options import config_of
from moe_evo.api.turns import turn
from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.config.task import fitness_label
from moe_evo.errors import RunError
from moe_evo.genomes.file import load_genome
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation
from moe_evo.records.folder import RunFolder, resumed_config
from moe_evo.records.journal import MAIN, REFERENCE
from moe_evo.records.result import RunResult
from moe_evo.records.sweep import SweepFolder, SweepResult
from moe_evo.report.answers import ExportedRun, Progress, ScoredGenome, WrittenReport
from moe_evo.report.front import front_picture
from moe_evo.report.html import kept_map, learning_curve, result_table, sweep_table, table

Split = Literal["search", "validation", "test"]
Which: TypeAlias = str
"""'best', 'best_pruning', 'soup', or a point of the front, such as 'front-3'."""


class Run:
    """A run in its folder, finished or not.

    In a notebook it shows its final table, the experts that the winner keeps, and how the search went.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises RunError where `folder` holds no run."""
        self._folder = RunFolder.existing(folder)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def config(self) -> RunConfig:
        """The run's config; its `folder` is where the run lies now, even if it was moved."""
        return resumed_config(str(self.folder))

    @property
    def is_finished(self) -> bool:
        return self._folder.result.is_file()

    @property
    def result(self) -> RunResult:
        """What the run found; raises RunError while it is not finished."""
        return self._folder.read_result()

    @property
    def so_far(self) -> Progress:
        """How far the run has come, finished or not."""
        from moe_evo.commands.show import progress

        return progress(self._folder)

    def genome(self, which: Which = "best") -> Genome:
        """The genome of a winner: kept experts and their merges; raises RunError where the run has no such winner."""
        file = self._folder.winners.get(which)
        if file is None or not file.is_file():
            found = ", ".join(name for name, path in self._folder.winners.items() if path.is_file())
            raise RunError(f"{self.folder}: has no genome {which!r}, expected one of: {found or 'none so far'}")
        return load_genome(file)

    def resume(self, *, progress: bool = False) -> Run:
        """Continue an unfinished run; a finished one is not changed."""
        from moe_evo.commands.search import search

        with turn(progress=progress) as tracker:
            search(self.config, tracker)
        return self

    def export(
        self, to: str | Path, *, which: Which = "best", device: str = "cpu", overwrite: bool = False,
        progress: bool = False,
    ) -> ExportedRun:  # fmt: skip
        """Write the checkpoint of a finished run into the folder `to`, and check that it computes the evaluated logits.

        which: the winner, the best that only prunes, the soup, or a point of the front. device: where the model is
        loaded. overwrite: replace an older export.
        """
        from moe_evo.commands.export import export

        with turn(progress=progress) as tracker:
            return export(self._folder, Path(to), which, device, overwrite=overwrite, tracker=tracker)

    def evaluate(
        self, *, split: Split = "validation", genome: GenomeLike | None = None, top_k: int | None = None,
        progress: bool = False, **options: object,
    ) -> ScoredGenome:  # fmt: skip
        """Score a genome, by default the winner, with the run's model on the run's tasks.

        options: changes to the run's config for this call, as for `moe_evo.evaluate`.
        """
        from moe_evo.commands.evaluate import evaluate

        config = config_of(ScoringConfig, self.config, None, None, options)
        named = genome_named(self if genome is None else genome)
        with turn(progress=progress) as tracker:
            return evaluate(config, named, split, top_k, str(self.folder), tracker)

    def report(self, to: str | Path | None = None, *, overwrite: bool = False) -> WrittenReport:
        """Write everything about the run as one HTML page; to: the file, by default report.html in its folder."""
        from moe_evo.report.write import write_report

        return write_report([str(self.folder)], None if to is None else str(to), overwrite=overwrite)

    def __repr__(self) -> str:
        state = "finished" if self.is_finished else "unfinished"
        return f"<Run {state} in {self.folder}>"

    def _repr_html_(self) -> str:
        if not self.is_finished:
            told = self.so_far
            best = "none yet" if told.best_fitness is None else f"{told.best_fitness:.4f}"
            rows = [[f"{told.evaluations} of {told.budget}", str(told.failed.failures), best]]
            headings = ["evaluations", "failed", f"best {fitness_label(told.config.tasks)}"]
            return table(f"{self.folder}: not finished", headings, rows) + self._curve()
        front = f"<div>{front_picture(self.result)}</div>" if self.result.front else ""
        return result_table(self.result) + front + f"<div>{kept_map(self.genome())}</div>" + self._curve()

    def _curve(self) -> str:
        if not self._folder.journal.is_file():  # a result that was kept without its journal
            return ""
        with self._folder.open_journal() as journal:
            outcomes = journal.told(MAIN).values()
            full = journal.outcomes(REFERENCE, "search").get(0)
        fitness = [one.fitness if isinstance(one, Evaluation) else None for one in outcomes]
        level = full.fitness if isinstance(full, Evaluation) else None
        return f"<div>{learning_curve(fitness, level, fitness_label(self.config.tasks))}</div>"


class Sweep:
    """A sweep in its folder. In a notebook it shows one table over all of its runs."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = SweepFolder(Path(folder))
        if not self._folder.config.is_file():
            raise RunError(f"{folder}: not the folder of a sweep (no {self._folder.config.name} in it)")

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self._folder.path

    @property
    def result(self) -> SweepResult:
        """The final tables of all finished runs as one."""
        return self._folder.read_result()

    @property
    def runs(self) -> Mapping[str, Run]:
        """The runs by name."""
        found = sorted((self.folder / "runs").glob("*/config.yaml"))
        return {file.parent.name: Run(file.parent) for file in found}

    def __repr__(self) -> str:
        return f"<Sweep of {len(self.runs)} runs in {self.folder}>"

    def _repr_html_(self) -> str:
        return sweep_table(self.result)


GenomeLike: TypeAlias = str | Path | Run | Genome | Sequence[Sequence[int]]
"""A genome, its file, a run (for its winner), 'full' (every expert kept), or the kept experts of each layer."""


def genome_named(genome: GenomeLike) -> str | Genome:
    """A genome in one of the two forms that commands take: a `Genome`, or a name for `named_genome`."""
    if isinstance(genome, Run):
        return str(genome.folder)
    if isinstance(genome, str | Path):
        return str(genome)
    return genome if isinstance(genome, Genome) else json.dumps([list(map(int, layer)) for layer in genome])


def run_of(genome: GenomeLike | None) -> Run | None:
    """The run that a genome is named by, if it is: a `Run` or a run's folder."""
    if isinstance(genome, str | Path) and str(genome) != "full" and RunFolder(Path(genome)).config.is_file():
        return Run(genome)
    return genome if isinstance(genome, Run) else None
