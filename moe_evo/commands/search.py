"""`moe-evo search`: a run from its checked config to a folder with result, genomes and pictures.

Everything that can be wrong with the input is found before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.run import RunConfig
from moe_evo.criteria.observation_file import observed_names
from moe_evo.errors import RunError
from moe_evo.genomes.file import save_individual
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Individual, Population
from moe_evo.genomes.space import SearchSpace, check_fits
from moe_evo.plain import plain
from moe_evo.records.folder import RunFolder, check_inputs, default_folder, task_hashes, with_absolute_paths
from moe_evo.records.journal import MAIN, RANDOM, REFERENCE, Journal
from moe_evo.records.make_result import run_result
from moe_evo.runs.checks import check_methods_of, check_model
from moe_evo.runs.open_pool import open_pool
from moe_evo.runs.workload import merges
from moe_evo.searches.registry import build_space, check_search, planned_phases
from moe_evo.tasks.data import TaskData, check_tasks, is_share
from moe_evo.tracking.base import Tracker
from moe_evo.tracking.start import tracked, winner_files

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.models.view import MoEModel


_NUM_WIDER = 10


def search(
    config: RunConfig, tracker: Tracker, model: MoEModel | None = None, cluster: ClusterConfig | None = None
) -> RunFolder:
    """Run a search, or go on with it; afterwards the folder holds result, genomes and pictures.

    model: the one that `config.model` describes, where it is loaded already. cluster: where to evaluate
    this time, in place of `config.cluster`.
    """
    folder = RunFolder(Path(config.folder) if config.folder else default_folder(config))
    config = with_absolute_paths(replace(config, folder=str(folder.path)))
    check_search(config.search)
    data = check_tasks(config.tasks)
    from moe_evo.models.load import model_hash, read_shape, resolve_device

    if config.cluster.address is None:  # else the ranks' devices count, not this machine's
        resolve_device(config.model.device)
    if config.model.path.count("/") == 1 and not Path(config.model.path).exists():
        tracker.message(f"looking for {config.model.path} on Hugging Face")
    space = build_space(read_shape(config.model), config.search)
    check_methods_of(config, space)
    check_model(config)
    with folder.claim(config) as journal:
        known_as = model_hash(config.model)
        new = check_inputs(journal, {"model": known_as, **task_hashes(data)})
        if folder.result.is_file():
            tracker.message(f"{folder.path}: this run is finished")
            return folder
        wider = _wider_prunings(config.search.warm_start, space)
        if wider:
            new |= check_inputs(journal, {"warm_start": " ".join(one.digest for one in wider)})
        journal.set_meta(new)
        with tracked(config, space, journal, folder, tracker) as trackers:
            _run(config, space, journal, folder, data, trackers, model, known_as, wider, cluster or config.cluster)
    return folder


def _wider_prunings(warm_start: str | None, space: SearchSpace) -> list[Genome]:
    """The best prunings of the run that a search begins from; raises RunError where it cannot."""
    if warm_start is None:
        return []
    folder = RunFolder.existing(warm_start)
    folder.read_result()  # or say that it is not finished
    with folder.open_journal() as journal:
        prunings = Population().with_outcomes(journal.individuals(MAIN)).prunings
    genomes = [one.genome for one in prunings.ranked[:_NUM_WIDER]]
    for genome in genomes[:1]:
        check_fits(genome, space.shape)
    pairs = zip(genomes[0].num_kept, space.num_kept, strict=True) if genomes else ()
    if not genomes or any(has < wanted for has, wanted in pairs):
        raise RunError(
            f"search.warm_start: {warm_start} has no pruning that keeps at least {list(space.num_kept)} experts; give "
            "a run that kept more"
        )
    return genomes


def _run(
    config: RunConfig,
    space: SearchSpace,
    journal: Journal,
    folder: RunFolder,
    data: Sequence[TaskData],
    tracker: Tracker,
    model: MoEModel | None,
    model_hash: str,
    wider: Sequence[Genome],
    cluster: ClusterConfig,
) -> None:
    from moe_evo.criteria.observer import Observer
    from moe_evo.models.load import alignment_digest
    from moe_evo.runs.selection import run_search

    phases = planned_phases(config.search, can_prune=space.can_prune)
    merging = next((phase for phase in phases if not phase.only_prunes), None)
    if merging is not None and not merges(config.search, can_prune=space.can_prune):
        planned = sum(phase.evaluations for phase in phases)
        tracker.message(f"this budget only prunes: {merging.name} would start after {planned} evaluations")
    with open_pool(replace(config, cluster=cluster), data, tracker, space, model) as pool:
        names = observed_names(config.model, data)
        observer = Observer(pool.ask, names, model_hash, folder.observations, tracker.message)
        rows = run_search(
            config, space, journal, pool, tracker, is_share=is_share(data), observer=observer, wider=wider
        )
    result = run_result(config, space.shape, journal, data, rows)
    for row in rows:
        if row.key in folder.winners:
            outcome = journal.outcomes(REFERENCE if row.key == "soup" else MAIN, "search")[row.candidate.number]
            individual = Individual(row.candidate, outcome)
            provenance = {key: plain(getattr(result, key)) for key in ("model", "router", "tasks")}
            provenance |= {"alignment": alignment_digest(config.model), "row": plain(row.to_row())}
            save_individual(folder.winners[row.key], individual, space, provenance)
    from moe_evo.report.figure import kept_figure, search_figure  # Matplotlib: not before there is something to draw

    search_figure(
        folder.figure,
        journal.individuals(MAIN),
        journal.individuals(RANDOM),
        rows[0].scores["search"].fitness,
        rows[-1].candidate.genome,
    )
    kept_figure(folder.kept_figure, rows[-1].candidate.genome)
    folder.write_result(result)  # last: a run with a result is finished
    tracker.finished(result, winner_files(folder))
