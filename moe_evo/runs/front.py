"""The front of a run with several objectives: what no other individual beats in all of them, scored on every split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_evo.config.run import RunConfig
from moe_evo.config.task import SPLITS
from moe_evo.evaluation.pool import Pool
from moe_evo.genomes.population import Evaluation, Population
from moe_evo.genomes.space import SearchSpace
from moe_evo.records.journal import MAIN, Journal
from moe_evo.records.result import Score, TableRow
from moe_evo.runs.loop import Run
from moe_evo.runs.workload import MOST_ON_FRONT
from moe_evo.searches.fronts import front_of, spread
from moe_evo.searches.objectives import Objectives
from moe_evo.searches.scored import expected_points
from moe_evo.tasks.data import TaskData, is_share, reported
from moe_evo.tracking.base import Tracker

FrontRow = tuple[TableRow, Mapping[str, Mapping[str, float]]]
"""A point of the front: a row of a table, and its objectives by split and name."""


def scored_front(
    config: RunConfig, space: SearchSpace, journal: Journal, pool: Pool, tracker: Tracker, data: Sequence[TaskData]
) -> list[FrontRow]:
    """The front on the search split, by what is expected there, with scores on all splits; empty with one objective.

    The best of the first objective is the first. Expected values stand beside those of the splits, as 'expected'.
    journal: with all evaluations of the search. data: of the pool's tasks.
    """
    population = Population().with_outcomes(journal.individuals(MAIN)).complete
    if not config.search.has_front or not len(population):
        return []
    objectives = Objectives(config.search.objectives)
    points = expected_points(space, population, objectives)  # the best scores themselves are partly luck
    front = front_of(points)
    chosen = front[spread(points[front], MOST_ON_FRONT)][::-1]
    candidates = [population[int(place)].candidate for place in chosen]
    run, is_fresh = Run(journal, pool, tracker), config.evaluation.is_fresh
    scores: list[dict[str, Score]] = [{} for _ in candidates]
    values: list[dict[str, Mapping[str, float]]] = [
        {"expected": objectives.values(population[int(place)], points[place])} for place in chosen
    ]
    for split in SPLITS:
        scored = run.score(
            f"{split} split, front", [(MAIN, one) for one in candidates], reported(split, data, is_fresh=is_fresh)
        )
        for place, one in enumerate(scored):
            if isinstance(one.outcome, Evaluation):
                scores[place][split] = Score.of(one.outcome, is_share=is_share(data), rule=config.evaluation.fitness)
                values[place][split] = objectives.values(one)
    rows = [
        TableRow(f"front-{number}", f"front {number}", one, len(population), found)
        for number, (one, found) in enumerate(zip(candidates, scores, strict=True), start=1)
    ]
    return list(zip(rows, values, strict=True))
