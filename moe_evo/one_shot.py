"""Pruning without a search: observe the model once, keep what a criterion finds best, compare, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_evo.config import ScoringConfig
from moe_evo.config_check import require
from moe_evo.errors import ConfigError, GenomeError
from moe_evo.evaluators import load_evaluator
from moe_evo.population import EvaluationFailure
from moe_evo.run_folder import with_absolute_paths
from moe_evo.space import SearchSpace
from moe_evo.tasks.data import TaskData, check_tasks, is_share
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.criteria.observation import Observation


def criteria() -> list[dict[str, str]]:
    """Name, description and source of every one-shot criterion."""
    from moe_evo.criteria.registry import CRITERIA

    return [{"name": one.name, "description": one.description, "source": one.source} for one in CRITERIA.values()]


def prune(
    config: ScoringConfig,
    method: str,
    num_kept: int,
    target: Path,
    observations: Path | None,
    *,
    overwrite: bool,
    tracker: Tracker,
) -> dict[str, Any]:
    """Keep the `num_kept` experts of each layer that `method` scores highest on the tasks' search split.

    target: folder of the checkpoint. observations: file of what the model does on these tasks, which is read
    where it is there, and written where it is not. Answers the export's report with what is kept, and the
    scores of the full and the pruned model on the test split.
    """
    from moe_evo.criteria.observation import observe, together
    from moe_evo.criteria.observation_file import StoredObservations, save_observations
    from moe_evo.criteria.pruning import pruning_by
    from moe_evo.criteria.registry import CRITERIA, WeightCriterion
    from moe_evo.criteria.weights import expert_weights

    if method not in CRITERIA:
        raise ConfigError(f"--method: got {method!r}, expected one of {', '.join(CRITERIA)} (see moe-evo criteria)")
    require(config.cluster.address is None, "cluster.address", config.cluster.address, "none: prune needs no cluster")
    router = config.model.router
    require(router == "exported", "model.router", router, "'exported': a stock checkpoint is made")
    config = with_absolute_paths(config)
    data = check_tasks(config.tasks)
    from moe_evo.models.export import export_checkpoint
    from moe_evo.models.loading import model_hash, read_shape, resolve_device
    from moe_evo.models.target_folder import check_target
    from moe_evo.result import Score

    resolve_device(config.model.device)
    space = SearchSpace.build(read_shape(config.model), num_kept=num_kept)
    check_target(target.absolute(), Path(config.model.path), overwrite=overwrite)
    known_as = model_hash(config.model)
    known = _read(observations, known_as, data) if observations is not None and observations.exists() else None
    evaluator = load_evaluator(config.model, data, config.evaluation, tracker)
    criterion = CRITERIA[method]
    if isinstance(criterion, WeightCriterion):
        found = criterion.scores(expert_weights(evaluator.model))
    else:
        if known is None:
            tracker.message("observing the experts on the search split")
            known = observe(evaluator)
            if observations is not None:
                names = [_named(one) for one in data]
                save_observations(
                    observations, StoredObservations(dict(zip(names, known.values(), strict=True)), known_as, "search")
                )
        found = criterion.scores(together(list(known.values())))
    genome = pruning_by(found, space)
    tracker.message("scoring the full and the pruned model on the test split")
    scores = {}
    for name, outcome in zip(("full", "pruned"), evaluator.evaluate([None, genome], "test"), strict=True):
        if isinstance(outcome, EvaluationFailure):
            raise GenomeError(f"the {name} model has no score on the test split ({outcome.reason})")
        scores[name] = asdict(Score.of(outcome, is_share=is_share(data)))
    tracker.message(f"writing and checking {target}")
    told = {name: f"{one['fitness']:.4f} [{one['low']:.4f}, {one['high']:.4f}]" for name, one in scores.items()}
    is_embedded = config.model.path == "embedded"
    provenance = {
        "base_model": "moe_evo embedded Mixtral" if is_embedded else Path(config.model.path).name,
        "hash of the base model": known_as,
        "tasks": {one.name: f"{one.kind}, {one.metric}, data {one.hash[:16]}" for one in data},
        "search": f"none: one-shot criterion {method} on the search split",
        "genome": f"digest {genome.digest}",
        "scores (95 % interval)": {"test": f"{told['pruned']}, full model {told['full']}"},
    }
    report = export_checkpoint(evaluator.model, genome, target, overwrite=overwrite, provenance=provenance)
    kept = [list(layer) for layer in genome.kept]
    return {**asdict(report), "folder": str(report.folder), "method": method, "kept": kept, "scores": scores}


def _named(task: TaskData) -> str:
    return f"{task.name}@{task.hash}"


def _read(file: Path, model_hash: str, data: Sequence[TaskData]) -> Mapping[str, Observation]:
    """The observations in `file`, which must be of this model and these data."""
    from moe_evo.criteria.observation_file import load_observations

    stored = load_observations(file, model_hash)
    if set(stored.of_tasks) != {_named(one) for one in data}:
        raise ConfigError(
            f"--observations: {file} was made on {', '.join(stored.of_tasks)}, expected "
            f"{', '.join(map(_named, data))}; name another file, which will be written"
        )
    return stored.of_tasks
