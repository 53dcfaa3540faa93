"""`moe-evo show`: the result of a run, or how far it has come."""

from __future__ import annotations

from typing import Any

from moe_evo.config.file import read_config
from moe_evo.genomes.population import Population
from moe_evo.records.folder import RunFolder, asdict_plain
from moe_evo.records.journal import MAIN
from moe_evo.records.result import failure_facts, gang_facts


def show(folder: RunFolder) -> dict[str, Any]:
    """The result of a finished run, or how far an unfinished one has come."""
    if folder.result.is_file():
        return folder.read_result()
    config = read_config(folder.config)
    with folder.open_journal() as journal:
        individuals = journal.individuals(MAIN)
        proposed = len(journal.candidates(MAIN))
        gangs = gang_facts(journal)
    population = Population().with_outcomes(individuals)
    best = population.best if len(population) else None
    return {
        "unfinished": True,
        "evaluations": len(individuals),
        "of": config.search.evaluations,
        "under_way": proposed - len(individuals),
        **failure_facts(one.outcome for one in individuals),
        "gangs": gangs,
        "best_fitness": best.evaluation.fitness if best else None,
        "best_kept": [list(layer) for layer in best.genome.kept] if best else None,
        "config": asdict_plain(config),
    }
