"""What a finished run found: the final table as values, and everything that result.json tells."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from moe_evo.config.run import RunConfig
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, ExampleScores, Outcome
from moe_evo.genomes.space import ModelShape
from moe_evo.models.source import ModelSource
from moe_evo.records.journal import MAIN, REFERENCE, Journal
from moe_evo.tasks.data import SPLITS, TaskData

_Z_95 = 1.959963984540054


def runs_stock_experts(result: Mapping[str, Any]) -> bool:
    """Whether tokens ran all experts that they were routed to, as a stock architecture does; result: of a run."""
    return result.get("experts", "own") == "own" and result.get("dynamic_skipping") is None


@dataclass(frozen=True)
class Score:
    """Fitness on one split with its 95 % interval over examples.

    The interval of a share is Wilson's, with the number of examples that its standard error speaks of;
    that of an unbounded metric is normal.
    """

    fitness: float
    low: float
    high: float
    standard_error: float
    num_examples: int
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, evaluation: Evaluation, *, is_share: bool) -> Score:
        low, high = _wilson(evaluation) if is_share else _normal(evaluation)
        return cls(
            fitness=evaluation.fitness,
            low=low,
            high=high,
            standard_error=evaluation.standard_error,
            num_examples=evaluation.num_examples,
            metrics=dict(evaluation.metrics),
        )


def _normal(evaluation: Evaluation) -> tuple[float, float]:
    margin = _Z_95 * evaluation.standard_error
    return (evaluation.fitness - margin, evaluation.fitness + margin)


def _wilson(evaluation: Evaluation) -> tuple[float, float]:
    share, variance = evaluation.fitness, evaluation.standard_error**2
    # n of a simple share; fewer where several tasks are averaged; all where every answer agrees
    number = share * (1 - share) / variance if variance > 0 else evaluation.num_examples
    if number <= 0:  # a share of 0 or 1 over tasks that do not all agree cannot be; the examples then count
        number = evaluation.num_examples
    squared = _Z_95**2 / number
    centre = (share + squared / 2) / (1 + squared)
    margin = _Z_95 / (1 + squared) * math.sqrt(share * (1 - share) / number + squared / (4 * number))
    return (max(centre - margin, 0.0), min(centre + margin, 1.0))


@dataclass(frozen=True)
class Row:
    """One line of the final table.

    key: full | frequency | random_search | best_pruning | best. evaluations: how many were spent to
    find it. scores: by split, `search`, `validation` and `test`.
    """

    key: str
    title: str
    candidate: Candidate
    evaluations: int
    scores: Mapping[str, Score]

    def to_json(self) -> dict[str, Any]:
        genome = self.candidate.genome
        return {
            "key": self.key,
            "title": self.title,
            "evaluations": self.evaluations,
            "candidate": self.candidate.number,
            "operator": self.candidate.operator,
            "parents": list(self.candidate.parents),
            "digest": genome.digest,
            "is_pruning": genome.is_pruning,
            "num_kept": list(genome.num_kept),
            "top_k": list(genome.top_k),
            "kept": [list(layer) for layer in genome.kept],
            "scores": {split: asdict(score) for split, score in self.scores.items()},
        }


def software_versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    packages = ("moe_evo", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def run_result(
    config: RunConfig,
    shape: ModelShape,
    journal: Journal,
    data: Sequence[TaskData],
    rows: Sequence[Row],
) -> dict[str, Any]:
    from moe_evo.models.size.memory import exported_size
    from moe_evo.models.size.size import read_size

    size = read_size(ModelSource(config.model), ranks=1)
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

    from moe_evo.records.statistics import winners_curse

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
