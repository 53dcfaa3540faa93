"""`moe-evo show`: the result of a run, or how far it has come."""

from __future__ import annotations

from moe_evo.config.file import read_config
from moe_evo.genomes.population import Population
from moe_evo.records.folder import RunFolder
from moe_evo.records.journal import MAIN
from moe_evo.records.make_result import failure_facts, gang_facts
from moe_evo.records.result import RunResult
from moe_evo.report.answers import Progress


def show(folder: RunFolder) -> RunResult | Progress:
    """The result of a finished run, or how far an unfinished one has come."""
    return folder.read_result() if folder.result.is_file() else progress(folder)


def progress(folder: RunFolder) -> Progress:
    """How far a run has come, from its journal."""
    config = read_config(folder.config)
    with folder.open_journal() as journal:
        individuals = journal.individuals(MAIN)
        proposed = len(journal.candidates(MAIN))
        gangs = gang_facts(journal.gang_events())
    population = Population().with_outcomes(individuals)
    best = population.best if len(population) else None
    return Progress(
        evaluations=len(individuals),
        budget=config.search.evaluations,
        under_way=proposed - len(individuals),
        failed=failure_facts(one.outcome for one in individuals),
        gangs=gangs,
        best_fitness=best.evaluation.fitness if best else None,
        best_kept=best.genome.kept if best else None,
        config=config,
    )
