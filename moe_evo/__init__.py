"""Find which experts of a Mixture-of-Experts model a task needs.

    run = moe_evo.search("allenai/OLMoE-1B-7B-0125-Instruct", tasks=["support.jsonl"], num_kept=32)
    print(run.result.best.test)
    run.export("support-olmoe")

The light nouns are here; what needs more than NumPy is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual, Population
from moe_evo.genomes.space import ModelShape, SearchSpace

if TYPE_CHECKING:
    from moe_evo.api.functions import carve, compare, evaluate, export, load_run, prune, recover, search, sweep
    from moe_evo.api.run import Run, Sweep
    from moe_evo.models.export.pruned import load_pruned

__all__ = [
    "Candidate",
    "Evaluation",
    "EvaluationFailure",
    "Genome",
    "Individual",
    "LayerGenome",
    "ModelShape",
    "Population",
    "Run",
    "SearchSpace",
    "Sweep",
    "carve",
    "compare",
    "evaluate",
    "export",
    "load_pruned",
    "load_run",
    "prune",
    "recover",
    "search",
    "sweep",
]

_FUNCTIONS = ("carve", "compare", "evaluate", "export", "load_run", "prune", "recover", "search", "sweep")
_IMPORTED_LATER = {
    **dict.fromkeys(_FUNCTIONS, "moe_evo.api.functions"),
    "Run": "moe_evo.api.run",
    "Sweep": "moe_evo.api.run",
    "load_pruned": "moe_evo.models.export.pruned",
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_LATER:
        raise AttributeError(f"module 'moe_evo' has no attribute {name!r}")
    return getattr(import_module(_IMPORTED_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
