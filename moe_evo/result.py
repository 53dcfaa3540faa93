"""What a finished run found: the final table as values, and as the plain data of result.json."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from moe_evo.population import Candidate, Evaluation

RESULT_VERSION = 1

_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """Fitness on one split with its 95 % interval (normal, from the standard error over examples)."""

    fitness: float
    low: float
    high: float
    standard_error: float
    num_examples: int
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, evaluation: Evaluation) -> Score:
        margin = _Z_95 * evaluation.standard_error
        return cls(
            fitness=evaluation.fitness,
            low=evaluation.fitness - margin,
            high=evaluation.fitness + margin,
            standard_error=evaluation.standard_error,
            num_examples=evaluation.num_examples,
            metrics=dict(evaluation.metrics),
        )


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
