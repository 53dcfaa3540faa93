"""What result.json tells of a run, gathered from its config, its journal and the rows of its final table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_evo.config import RunConfig
from moe_evo.journal import MAIN, Journal
from moe_evo.population import Evaluation, EvaluationFailure, Outcome
from moe_evo.space import ModelShape
from moe_evo.tasks.data import TaskData

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
        "search": {
            "algorithm": config.search.algorithm,
            "seed": config.search.seed,
            "evaluations": len(outcomes),
            **failure_facts(outcomes.values()),
            "stopped_early": sum(isinstance(one, Evaluation) and one.is_stopped for one in outcomes.values()),
            "evaluation_s": sum(one.duration_s for one in outcomes.values()),
        },
        "gangs": gang_facts(journal),
        "rows": [
            {**row.to_json(), "parameters": parameters, "bytes": total}
            for row, (parameters, total) in zip(rows, sizes, strict=True)
        ],
    }


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
