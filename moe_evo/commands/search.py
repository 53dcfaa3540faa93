"""`moe-evo search`: makes a run from its config, and leaves result, genomes and pictures in its folder.

The whole input is checked before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.run import RunConfig
from moe_evo.config.task import fitness_label
from moe_evo.criteria.observation_file import observed_names
from moe_evo.errors import raise_first
from moe_evo.genomes.file import save_individual
from moe_evo.genomes.population import Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.location import is_hub_name
from moe_evo.plain import plain
from moe_evo.records.folder import (
    RunFolder,
    check_inputs,
    default_folder,
    revision_asked,
    with_absolute_paths,
)
from moe_evo.records.journal import MAIN, RANDOM, RECOVERY_COST, REFERENCE, Journal
from moe_evo.records.make_result import run_result
from moe_evo.records.result import RunResult, TableRow
from moe_evo.runs.checks import Inspection, inspect, warm_start_hash
from moe_evo.runs.early_warnings import split_lines, split_warnings
from moe_evo.runs.open_pool import open_pool
from moe_evo.runs.recovery_cost import recovery_cost, without_recovery
from moe_evo.runs.workload import merges
from moe_evo.searches.registry import planned_phases
from moe_evo.tasks.data import reported
from moe_evo.tracking.base import Tracker
from moe_evo.tracking.start import tracked, winner_files

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.models.source import ModelSource
    from moe_evo.models.view import MoEModel
    from moe_evo.runs.front import FrontRow
    from moe_evo.runs.selection import Chosen


def search(
    config: RunConfig, tracker: Tracker, model: MoEModel | None = None, cluster: ClusterConfig | None = None
) -> RunFolder:
    """Run a search, or continue an unfinished one; afterwards the folder holds result, genomes and pictures.

    model: the one that `config.model` describes, where it is loaded already. cluster: where to evaluate,
    in place of `config.cluster`.
    """
    folder = RunFolder(Path(config.folder) if config.folder else default_folder(config))
    config = with_absolute_paths(replace(config, folder=str(folder.path)))
    if is_hub_name(config.model.path):
        tracker.message(f"looking for {config.model.path} on Hugging Face")
    found = inspect(config)
    raise_first((*found.absent, *found.problems))
    assert found.source is not None and found.space is not None, "nothing is wrong with them"
    asked, config = config.model, replace(config, model=found.source.config)
    with folder.claim(config) as journal:
        new = check_inputs(journal, found.hashes)
        if "hash/model" in new:
            new |= revision_asked(asked, found.source.hash)
        if folder.result.is_file():
            tracker.message(f"{folder.path}: this run is finished")
            return folder
        journal.set_meta(new | check_inputs(journal, warm_start_hash(found.wider)))
        for line in (*split_lines(found.data), *split_warnings(found.data, config.evaluation.fitness)):
            tracker.message(line)
        with tracked(config, found.space, journal, folder, tracker) as trackers:
            here = replace(config, cluster=cluster or config.cluster)
            chosen, front = _chosen(here, found, found.source, found.space, journal, folder, trackers, model)
            rows, split = chosen.rows, reported("search", found.data, is_fresh=config.evaluation.is_fresh)
            result = run_result(
                config, found.source, journal, found.data, rows, chosen.expected, front, chosen.finalists
            )
            points = [row for row, _ in front]
            _save_winners(found.source, found.space, journal, folder, result, [*rows, *points], split)
            _draw(config, folder, journal, rows)
            folder.write_result(result)  # last: a run with a result is finished
            trackers.finished(result, winner_files(folder))
    return folder


def _chosen(
    config: RunConfig,
    found: Inspection,
    source: ModelSource,
    space: SearchSpace,
    journal: Journal,
    folder: RunFolder,
    tracker: Tracker,
    model: MoEModel | None,
) -> tuple[Chosen, list[FrontRow]]:
    """Make all evaluations that the journal does not have yet, and return the final table and the front."""
    from moe_evo.criteria.observer import Observer
    from moe_evo.evaluation.local_pool import LocalPool
    from moe_evo.runs.finalist_recovery import FinalistRecovery
    from moe_evo.runs.front import scored_front
    from moe_evo.runs.selection import run_search

    cost = recovery_cost(config, [len(one.splits["search"]) for one in found.data], space.shape.num_layers)
    searched = without_recovery(config.search, cost)
    phases = planned_phases(searched, can_prune=space.can_prune)
    merging = next((phase for phase in phases if not phase.only_prunes), None)
    if merging is not None and not merges(searched, can_prune=space.can_prune):
        planned = sum(phase.evaluations for phase in phases)
        tracker.message(f"this budget only prunes: {merging.name} would start after {planned} evaluations")
    with open_pool(config, source, found.data, tracker, space, model, found.tasks) as pool:
        names = observed_names(config.model, found.data)
        observer = Observer(pool.ask, names, source.hash, folder.observations, tracker.message)
        recovery = None
        if cost:
            assert isinstance(pool, LocalPool), "the config was checked"
            journal.set_meta({RECOVERY_COST: str(cost)})
            tracker.message(
                f"{cost} of {config.search.evaluations} evaluations go into recovering "
                f"{config.selection.recover_finalists} finalists"
            )
            recovery = FinalistRecovery(config, pool.evaluator, found.data, folder, journal, tracker, cost)
        chosen = run_search(
            config,
            space,
            journal,
            pool,
            tracker,
            data=found.data,
            observer=observer,
            wider=found.wider,
            recovery=recovery,
        )
        return chosen, scored_front(config, space, journal, pool, tracker, found.data)


def _save_winners(
    source: ModelSource,
    space: SearchSpace,
    journal: Journal,
    folder: RunFolder,
    result: RunResult,
    rows: Sequence[TableRow],
    split: str,
) -> None:
    """Write the genomes that can be exported, each with its provenance. split: on which a soup has an outcome."""

    for row in rows:
        if row.key in folder.winners or result.is_on_front(row.key):
            outcomes = journal.outcomes(REFERENCE, split) if row.key == "soup" else journal.told(MAIN)
            outcome = outcomes[row.candidate.number]
            individual = Individual(row.candidate, outcome)
            provenance = {key: plain(getattr(result, key)) for key in ("model", "router", "tasks")}
            provenance |= {"alignment": source.alignment_digest, "row": plain(row.to_row())}
            save_individual(folder.genome_file(row.key), individual, space, provenance)


def _draw(config: RunConfig, folder: RunFolder, journal: Journal, rows: Sequence[TableRow]) -> None:
    from moe_evo.report.figure import kept_figure, search_figure  # Matplotlib: not before there is something to draw

    full = Individual(rows[0].candidate, journal.outcomes(REFERENCE, "search")[rows[0].candidate.number])
    search_figure(
        folder.figure,
        journal.individuals(MAIN),
        journal.individuals(RANDOM),
        full.evaluation.fitness,
        rows[-1].candidate.genome,
        fitness_label(config.tasks),
    )
    kept_figure(folder.kept_figure, rows[-1].candidate.genome)
