"""`moe-evo export`: writes a run's genome as a checkpoint, and checks its logits against those that were evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.commands.shared import base_model_name
from moe_evo.config.model import ModelConfig
from moe_evo.config.task import SPLITS
from moe_evo.errors import RunError
from moe_evo.genomes.file import load_genome
from moe_evo.genomes.genome import Genome
from moe_evo.plain import Plain
from moe_evo.records.folder import RunFolder, resumed_config
from moe_evo.records.result import Row, RunResult, TaskFacts
from moe_evo.report.answers import ExportedRun
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is looked at, not before
    from moe_evo.models.source import ModelSource


@dataclass(frozen=True)
class Winner:
    """A genome of a finished run that can be exported, and the model that was searched.

    row: its line in the final table. source: of the model, on the device asked for.
    """

    result: RunResult
    row: Row
    genome: Genome
    source: ModelSource

    @property
    def provenance(self) -> Plain:
        """The facts about the run that the model card states, in words."""
        return _provenance(self.result, self.row)


def export(
    folder: RunFolder,
    target: Path,
    which: str,
    device: str,
    *,
    overwrite: bool,
    tracker: Tracker,
    model_path: str | None = None,
) -> ExportedRun:
    """Write a finished run's genome as a checkpoint, and check its logits against those of the evaluated model.

    model_path: where the model of the run lies now, if it has moved.
    """
    model = resumed_config(str(folder.path)).model
    if model_path not in (None, model.path):
        model = replace(model, path=model_path, revision=None)
    found = winner(folder, which, replace(model, device=device))
    from moe_evo.models.export.export import export_checkpoint
    from moe_evo.models.export.target_folder import check_target
    from moe_evo.models.load import load_model

    path = found.source.config.path
    check_target(target.absolute(), Path(path), overwrite=overwrite)
    tracker.message(f"loading {path}")
    moe = load_model(found.source)
    tracker.message(f"writing and checking {target}")
    report = export_checkpoint(moe, found.genome, target, overwrite=overwrite, provenance=found.provenance)
    return ExportedRun(report, which, found.row.title)


def winner(folder: RunFolder, which: str, model: ModelConfig) -> Winner:
    """The genome with the key `which` of a finished run; raises where it cannot be exported from this model."""
    result = folder.read_result()
    genome_file = folder.genome_file(which)
    if which not in folder.winners or not genome_file.is_file():
        found = ", ".join(name for name, path in folder.winners.items() if path.is_file())
        raise RunError(f"{folder.path}: has no {genome_file.name}; --which: got {which!r}, expected one of {found}")
    genome = load_genome(genome_file)
    row = result.row(which)
    if row is None:
        raise RunError(f"{folder.result}: has no row {which!r}, though {genome_file.name} is there; run it anew")
    from moe_evo.models.export.export import check_fixed_top_k, check_own_experts, check_router
    from moe_evo.models.load import resolve_device
    from moe_evo.models.source import ModelSource
    from moe_evo.models.variants.dynamic_routing import dynamic_routing_of

    resolve_device(model.device)
    source = ModelSource(model)
    check_router(genome, model.router, renormalises=source.renormalises)
    check_fixed_top_k(dynamic_routing_of(model))
    check_own_experts(model.experts)
    if source.hash != result.model.hash:
        raise RunError(
            f"{model.path}: is not the model that {folder.path} searched; bring back its old files, or say with "
            "--model.path where they lie"
        )
    return Winner(result, row, genome, source)


def _provenance(result: RunResult, row: Row) -> Plain:
    search = result.search
    full = result.full.scores
    return {
        "base_model": base_model_name(result.model.path, result.model.hash),
        "hash of the base model": result.model.hash,
        "tasks": {task.name: _task_in_words(task) for task in result.tasks},
        "search": f"{search.algorithm}, {search.evaluations} evaluations, seed {search.seed}, router {result.router}",
        "genome": f"candidate {row.candidate} ({row.operator}), digest {row.digest}",
        "scores (95 % interval)": {
            split: f"{score.fitness:.4f} [{score.low:.4f}, {score.high:.4f}], full model {full[split].fitness:.4f}"
            for split, score in row.scores.items()
        },
    }


def _task_in_words(task: TaskFacts) -> str:
    examples = " / ".join(str(task.examples[split]) for split in SPLITS)
    searched = f" (the search maximised {task.search_metric})" if task.search_metric else ""
    return f"{task.kind}, {task.metric}{searched}, {examples} examples, data {task.hash[:16]}"
