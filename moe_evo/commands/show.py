"""`moe-evo show`: the result of a run or of a sweep, or how far a run has come."""

from __future__ import annotations

from dataclasses import replace

from moe_evo.config.file import read_config
from moe_evo.errors import RunError
from moe_evo.genomes.population import Population
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN
from moe_evo.records.make_result import against_full, failure_facts, gang_facts
from moe_evo.records.result import RunResult
from moe_evo.records.sweep import SweepFolder, SweepResult
from moe_evo.report.answers import Progress


def show(folder: RunFolder) -> RunResult | Progress:
    """The result of a finished run, or how far an unfinished one has come.

    What older versions did not write down of the winner against the full model is computed from the journal.
    """
    if not folder.result.is_file():
        return progress(folder)
    result = folder.read_result()
    full, best = result.row("full"), result.row("best")
    if result.against_full is not None or full is None or best is None or not folder.journal.is_file():
        return result
    with folder.open_journal() as journal:
        return replace(result, against_full=against_full(journal, full.candidate, best.candidate))


def show_sweep(folder: SweepFolder) -> SweepResult:
    """The results of a sweep's finished runs as one table, also while others are not finished."""
    from moe_evo.report.sweep import sweep_result  # Matplotlib: not for a single run

    runs = folder.begun
    results = {name: run.read_result() for name, run in runs.items() if run.result.is_file()}
    known = folder.read_result().unfinished if folder.result.is_file() else ()
    unfinished = sorted({*known, *runs} - set(results))
    if not results:
        raise RunError(
            f"{folder.path}: none of its {len(runs)} runs is finished; moe-evo show RUN tells how far one is"
        )
    return sweep_result(results, unfinished)


def progress(folder: RunFolder) -> Progress:
    """How far a run has come, from its journal."""
    config = read_config(folder.config)
    with folder.open_journal() as journal:
        individuals = journal.individuals(MAIN)
        proposed = len(journal.candidates(MAIN))
        gangs = gang_facts(journal.gang_events())
        cost = journal.recovery_cost
    population = Population().with_outcomes(individuals)
    best = population.best if len(population) else None
    return Progress(
        evaluations=len(individuals),
        budget=config.search.evaluations - cost,
        under_way=proposed - len(individuals),
        failed=failure_facts(one.outcome for one in individuals),
        gangs=gangs,
        best_fitness=best.evaluation.fitness if best else None,
        best_kept=best.genome.kept if best else None,
        config=config,
    )
