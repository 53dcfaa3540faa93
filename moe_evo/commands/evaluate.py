"""`moe-evo evaluate`: one genome scored on one split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.commands.named_genome import named_genome
from moe_evo.config.model import RouterMode
from moe_evo.config.run import ScoringConfig
from moe_evo.errors import GenomeError, RunError
from moe_evo.files.write import write_new
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, EvaluationFailure
from moe_evo.genomes.space import ModelShape, check_fits
from moe_evo.plain import plain
from moe_evo.records.folder import RunFolder, with_absolute_paths
from moe_evo.records.paired import paired
from moe_evo.records.result import Score
from moe_evo.report.answers import AgainstBaseline, ScoredGenome
from moe_evo.runs.open_pool import open_pool
from moe_evo.tasks.answered import Answered
from moe_evo.tasks.chance import chance_level
from moe_evo.tasks.data import TaskData, check_tasks, is_share, reported
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is looked at, not before
    from moe_evo.evaluation.pool import Pool
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
    *,
    baseline: str | Genome | None = None,
    samples: Path | None = None,
) -> ScoredGenome:
    """Score one genome on one split.

    genome, baseline: a `Genome`, or a name for `named_genome`; the latter is scored on the same examples.
    top_k: experts active a token, in place of the genome's own. run: the folder of the run that the config or genome
    comes from, if any. samples: a new file of JSONL, for every example with what the genome answered.
    """
    config = with_absolute_paths(config)
    _check_new(samples)
    data = check_tasks(config.tasks)
    from moe_evo.models.load import resolve_device
    from moe_evo.models.source import ModelSource

    if config.cluster.address is None:
        resolve_device(config.model.device)
    source = ModelSource(config.model, "any" if config.cluster.address is None else "moe")
    if run is not None:
        _tell_changes(RunFolder(Path(run)), source, data, tracker)
    shape = source.shape
    wanted = shape if top_k is None else replace(shape, top_k=(top_k,) * shape.num_layers)
    router, aligned = config.model.router, source.alignment_digest
    name, genome = _named(genome, wanted, router, aligned)
    genome = genome if top_k is None else _with_top_k(genome, top_k)
    check_fits(genome, shape)
    other, other_name = None, ""
    if baseline is not None:
        other_name, other = _named(baseline, shape, router, aligned)
        check_fits(other, shape)
    for one, found in ((name, genome), (other_name, other)):
        if found is not None and one.endswith(".pth") and router != "eep" and not found.is_pruning:
            tracker.message(
                "EEP coefficients remap probabilities: --model.router eep gives what they were searched for"
            )
    with open_pool(config, source, data, tracker) as pool:
        pool.listener = tracker.pool
        outcome = _outcome(pool, name, genome, reported(split, data))
        of_other = None if other is None else _outcome(pool, other_name, other, reported(split, data))
        if samples is not None:
            tracker.message(f"answering the {split} examples for {samples}")
            _write_samples(samples, pool.answered(genome, reported(split, data)))
    against = None
    if of_other is not None and other is not None:
        score = Score.of(of_other, is_share=is_share(data), rule=config.evaluation.fitness)
        against = AgainstBaseline(other_name, other.digest, score, paired(outcome.scores or {}, of_other.scores or {}))
    levels = {one.name: chance_level(one.metric, one.splits[split]) for one in data}
    return ScoredGenome(
        genome=name,
        digest=genome.digest,
        num_kept=genome.num_kept,
        top_k=genome.top_k,
        split=split,
        duration_s=outcome.duration_s,
        score=Score.of(outcome, is_share=is_share(data), rule=config.evaluation.fitness),
        chance={one: level for one, level in levels.items() if level is not None},
        against=against,
        samples=samples,
    )


def _named(genome: str | Genome, shape: ModelShape, router: RouterMode, alignment: str | None) -> tuple[str, Genome]:
    """A genome with what it is called."""
    if isinstance(genome, Genome):
        return f"genome {genome.digest[:12]}", genome
    return genome, named_genome(genome, shape, router, alignment)


def _outcome(pool: Pool, name: str, genome: Genome, split: str) -> Evaluation:
    """The genome's scores; raises GenomeError where it has none."""
    from moe_evo.evaluation.pool import Request

    pool.submit([Request("evaluate", 0, genome, split)])
    ((_, outcome),) = pool.next_outcomes()
    if isinstance(outcome, EvaluationFailure):
        raise GenomeError(f"{name}: has no fitness on the {split} split ({outcome.reason})")
    return outcome


def _check_new(samples: Path | None) -> None:
    """Raise RunError where a file cannot be made: one that is there is never replaced."""
    if samples is None:
        return
    if samples.exists() or samples.is_symlink():
        raise RunError(f"--samples: {samples} is there already, expected a new file; give another name")
    if not samples.absolute().parent.is_dir():
        raise RunError(f"--samples: {samples.absolute().parent} is no folder; give a file in one that is there")


def _write_samples(file: Path, answered: Sequence[Answered]) -> None:
    text = "".join(json.dumps(plain(one), ensure_ascii=False) + "\n" for one in answered)
    try:
        write_new(file, text)
    except OSError as error:
        raise RunError(f"--samples: {file} cannot be written ({error.strerror}); give another file") from error


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
