"""What a finished run found: the final table as values, and as the plain data of result.json."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from moe_evo.population import Candidate, Evaluation

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
