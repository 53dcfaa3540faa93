"""Functions for the commands that make a checkpoint without a search: checks, scores and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.config.check import require
from moe_evo.config.model import EMBEDDED_MODELS
from moe_evo.config.run import ScoringConfig
from moe_evo.errors import GenomeError
from moe_evo.genomes.population import EvaluationFailure
from moe_evo.plain import Plain
from moe_evo.records.result import Score
from moe_evo.tasks.data import TaskData, is_share

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.genomes.genome import Genome

Scores = dict[str, Score]
"""Scores by the name of the model that was scored, such as 'full'."""


def require_one_process(config: ScoringConfig, command: str) -> None:
    """Raise ConfigError for a cluster, and for options of the model that no stock checkpoint can express."""
    require(
        config.cluster.address is None, "cluster.address", config.cluster.address, f"none: {command} needs no cluster"
    )
    require_stock(config)


def require_stock(config: ScoringConfig) -> None:
    """Raise ConfigError for options of the model that no stock checkpoint can express."""
    router, experts = config.model.router, config.model.experts
    require(router == "exported", "model.router", router, "'exported': a stock checkpoint is made")
    require(experts == "own", "model.experts", experts, "'own': a stock checkpoint is made, which merges no experts")
    for option in ("dynamic_skipping", "top_p"):
        value = getattr(config.model, option)
        require(
            value is None, f"model.{option}", value, "none: a stock checkpoint is made, which runs all top_k experts"
        )


def scored_on_test(evaluator: Evaluator, genomes: Mapping[str, Genome | None], data: Sequence[TaskData]) -> Scores:
    """The scores of genomes on the test split, by name; the genome None is the loaded model. Raises GenomeError."""
    scores = {}
    for name, outcome in zip(genomes, evaluator.evaluate(list(genomes.values()), "test"), strict=True):
        if isinstance(outcome, EvaluationFailure):
            raise GenomeError(f"the {name} model has no score on the test split ({outcome.reason})")
        scores[name] = Score.of(outcome, is_share=is_share(data), rule=evaluator.fitness_rule)
    return scores


def base_model_name(path: str, model_hash: str | None) -> str:
    """A model's name for the card of what is made of it: of a hub owner/model, of a folder its last part."""
    if path in EMBEDDED_MODELS:
        return EMBEDDED_MODELS[path].title
    return path if "@" in (model_hash or "") else Path(path).name  # the hash of a hub's model is owner/model@commit


def provenance(config: ScoringConfig, model_hash: str, data: Sequence[TaskData], how: Plain, scores: Scores) -> Plain:
    """Facts for the model card: the base model, the data, `how` the model was changed, and the scores."""
    told = [f"{name} model {one.fitness:.4f} [{one.low:.4f}, {one.high:.4f}]" for name, one in scores.items()]
    return {
        "base_model": base_model_name(config.model.path, model_hash),
        "hash of the base model": model_hash,
        "tasks": {one.name: f"{one.kind}, {one.metric}, data {one.hash[:16]}" for one in data},
        **how,
        "scores (95 % interval)": {"test": ", ".join(told)},
    }
