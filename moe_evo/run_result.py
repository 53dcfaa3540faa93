"""What result.json tells of a run, gathered from its config, its journal and the rows of its final table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_evo.config import RunConfig
from moe_evo.journal import MAIN, REFERENCE, Journal
from moe_evo.population import Evaluation, EvaluationFailure, ExampleScores, Outcome
from moe_evo.space import ModelShape
from moe_evo.tasks.data import SPLITS, TaskData

if TYPE_CHECKING:  # not needed before a run is finished
    from moe_evo.result import Row


def run_result(
    config: RunConfig,
    shape: ModelShape,
    journal: Journal,
    data: Sequence[TaskData],
    rows: Sequence[Row],
) -> dict[str, Any]:
    from moe_evo.models.memory import exported_size
    from moe_evo.models.size import read_size
    from moe_evo.result import software_versions

    size = read_size(config.model, ranks=1)
    sizes = [exported_size(size, row.candidate.genome.num_kept) for row in rows]
    outcomes = journal.outcomes(MAIN, "search")
    return {
        "software": software_versions(),
        "model": {"path": config.model.path, "hash": journal.meta("hash/model"), **asdict(shape)},
        "tasks": [
            {
                "name": one.name,
                "kind": one.kind,
                "metric": one.metric,
                "hash": one.hash,
                "examples": {split: len(examples) for split, examples in one.splits.items()},
            }
            for one in data
        ],
        "fitness": config.evaluation.fitness,
        "router": config.model.router,
        "experts": config.model.experts,
        "dynamic_skipping": config.model.dynamic_skipping,
        "search": {
            "algorithm": config.search.algorithm,
            "seed": config.search.seed,
            "evaluations": len(outcomes),
            **failure_facts(outcomes.values()),
            "stopped_early": sum(isinstance(one, Evaluation) and one.is_stopped for one in outcomes.values()),
            "evaluation_s": sum(one.duration_s for one in outcomes.values()),
        },
        "winners_curse": _winners_curse(journal, rows),
        "gangs": gang_facts(journal),
        "rows": [
            {**row.to_json(), "parameters": parameters, "bytes": total}
            for row, (parameters, total) in zip(rows, sizes, strict=True)
        ],
    }


def _winners_curse(journal: Journal, rows: Sequence[Row]) -> dict[str, Any] | None:
    """How much of its lead over the full model the winner does not keep from split to split; see `winners_curse`.

    None where one of the two has no scores on some split.
    """
    import numpy as np

    from moe_evo.statistics import winners_curse

    def scores(search: str, row: Row) -> dict[str, ExampleScores]:
        found = {split: journal.outcomes(search, split)[row.candidate.number] for split in SPLITS}
        return {split: one.scores for split, one in found.items() if isinstance(one, Evaluation) and one.scores}

    full, winner = scores(REFERENCE, rows[0]), scores(MAIN, rows[-1])
    if not len(full) == len(winner) == len(SPLITS):
        return None
    return asdict(winners_curse(winner, np.random.default_rng(0), full))


def gang_facts(journal: Journal) -> dict[str, Any] | None:
    """What became of the gangs of a run on a cluster: counts by kind of event, and why gangs broke."""
    events = journal.gang_events()
    if not events:
        return None
    kinds = Counter(kind for _, _, kind, _ in events)
    return {**kinds, "reasons": sorted({detail for _, _, kind, detail in events if kind == "broken"})}


def failure_facts(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    failed = [one for one in outcomes if isinstance(one, EvaluationFailure)]
    return {"failures": len(failed), "failure_reasons": sorted({one.reason for one in failed})}
