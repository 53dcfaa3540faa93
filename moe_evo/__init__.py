"""Find by evolution which experts of a Mixture-of-Experts model a task needs.

The light nouns are here; `load_pruned`, which needs torch, is imported when it is first asked for.
"""

from __future__ import annotations

from typing import Any

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual, Population
from moe_evo.genomes.space import ModelShape, SearchSpace

__all__ = [
    "Candidate",
    "Evaluation",
    "EvaluationFailure",
    "Genome",
    "Individual",
    "LayerGenome",
    "ModelShape",
    "Population",
    "SearchSpace",
    "load_pruned",
]


def __getattr__(name: str) -> Any:
    if name == "load_pruned":
        from moe_evo.models.export.pruned import load_pruned

        return load_pruned
    raise AttributeError(f"module 'moe_evo' has no attribute {name!r}")
