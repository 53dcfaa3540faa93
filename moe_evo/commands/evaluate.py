"""`moe-evo evaluate`: one genome scored on one split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.commands.named_genome import named_genome
from moe_evo.config.run import ScoringConfig
from moe_evo.errors import GenomeError
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import EvaluationFailure
from moe_evo.genomes.space import check_fits
from moe_evo.records.folder import RunFolder, with_absolute_paths
from moe_evo.records.result import Score
from moe_evo.report.answers import ScoredGenome
from moe_evo.runs.open_pool import open_pool
from moe_evo.tasks.data import TaskData, check_tasks, is_share, reported
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is looked at, not before
    from moe_evo.models.source import ModelSource


def _with_top_k(genome: Genome, top_k: int) -> Genome:
    return Genome(tuple(replace(layer, top_k=top_k) for layer in genome.layers))


def evaluate(
    config: ScoringConfig,
    genome: str | Genome,
    split: str,
    top_k: int | None,
    run: str | None,
    tracker: Tracker,
) -> ScoredGenome:
    """Score one genome on one split.

    genome: a `Genome`, or a name for `named_genome`.
    top_k: experts active a token, in place of the genome's own. run: the folder of the run that the config or genome
    comes from, if any.
    """
    config = with_absolute_paths(config)
    data = check_tasks(config.tasks)
    from moe_evo.models.load import resolve_device
    from moe_evo.models.source import ModelSource

    if config.cluster.address is None:
        resolve_device(config.model.device)
    source = ModelSource(config.model)
    if run is not None:
        _tell_changes(RunFolder(Path(run)), source, data, tracker)
    shape = source.shape
    wanted = shape if top_k is None else replace(shape, top_k=(top_k,) * shape.num_layers)
    name = genome if isinstance(genome, str) else f"genome {genome.digest[:12]}"
    if isinstance(genome, str):
        genome = named_genome(genome, wanted, config.model.router, source.alignment_digest)
    genome = genome if top_k is None else _with_top_k(genome, top_k)
    check_fits(genome, shape)
    if name.endswith(".pth") and config.model.router != "eep" and not genome.is_pruning:
        tracker.message("EEP coefficients remap probabilities: --model.router eep gives what they were searched for")
    from moe_evo.evaluation.pool import Request

    with open_pool(config, source, data, tracker) as pool:
        pool.listener = tracker.pool
        pool.submit([Request("evaluate", 0, genome, reported(split, data))])
        ((_, outcome),) = pool.next_outcomes()
    if isinstance(outcome, EvaluationFailure):
        raise GenomeError(f"{name}: has no fitness on the {split} split ({outcome.reason})")
    return ScoredGenome(
        genome=name,
        digest=genome.digest,
        num_kept=genome.num_kept,
        top_k=genome.top_k,
        split=split,
        duration_s=outcome.duration_s,
        score=Score.of(outcome, is_share=is_share(data), rule=config.evaluation.fitness),
    )


def _tell_changes(run: RunFolder, source: ModelSource, data: Sequence[TaskData], tracker: Tracker) -> None:
    """Say where the model or data differ from the run's, as scores then cannot be compared with the run's."""
    if not run.result.is_file():
        return
    result = run.read_result()
    if source.hash != result.model.hash:
        tracker.message(f"{source.config.path}: is not the model that {run.path} searched")
    hashes = {task.name: task.hash for task in result.tasks}
    for one in data:
        if hashes.get(one.name, one.hash) != one.hash:
            tracker.message(f"task {one.name}: the data have changed since {run.path} was searched")
