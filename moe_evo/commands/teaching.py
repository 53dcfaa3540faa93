"""What is asked of the full model before a pruned one learns from it: its score, and what it has to teach.

It is written to files, so that the full model need not be in memory while the pruned one learns.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_evo.commands.recovery_input import (
    FULL,
    LEARNED,
    VALIDATION,
    RecoveryJob,
    in_one_piece,
    prompts_of,
)
from moe_evo.errors import GenomeError
from moe_evo.genomes.population import Evaluation, EvaluationFailure
from moe_evo.records.recovery_folder import RecoveryFolder
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.runs.teaching import keep_blocks, teach
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.view import MoEModel


def ask_full_model(job: RecoveryJob, folder: RecoveryFolder, tracker: Tracker) -> None:
    """Write what is needed of the full model: its score, its lessons, and the pruned checkpoint of a run."""
    from moe_evo.models.export.export import export_checkpoint
    from moe_evo.recovery.blocks import has_blocks
    from moe_evo.recovery.lessons import has_lessons
    from moe_evo.tasks.prompt import PromptFormat

    is_done = all(has_lessons(folder.lessons, name) for name in (LEARNED, VALIDATION))
    has_all = has_blocks(folder.lessons) or not job.needs_blocks
    if is_done and has_all and folder.score(FULL) is not None:
        return
    evaluator = load_evaluator(job.full, job.data, job.config.evaluation, tracker)
    if folder.score(FULL) is None:
        tracker.message("scoring the full model on the test split")
        folder.keep_score(FULL, scored_alone(evaluator, FULL))
    if job.winner is not None:
        tracker.message("writing the pruned model")
        export_checkpoint(
            _whole(job, evaluator), job.winner.genome, folder.student, overwrite=True, provenance=job.winner.provenance
        )
    formats = [PromptFormat(one.config, one, evaluator.model.tokenizer) for one in job.data]
    for name, prompts in prompts_of(job, formats).items():
        if not has_lessons(folder.lessons, name):
            teach(evaluator, prompts, folder.lessons, name, job.recover, tracker)
    if not has_all:
        keep_blocks(evaluator, folder.lessons, LEARNED, job.recover.most_block_tokens(job.enough_tokens), tracker)
    del evaluator
    gc.collect()  # the pruned model may need the memory


def _whole(job: RecoveryJob, evaluator: Evaluator) -> MoEModel:
    """The full model with all of its weights in this process, in the host's memory where it is offloaded."""
    from moe_evo.models.load import load_model
    from moe_evo.models.source import ModelSource

    if job.full.config.sharding == "single":
        return evaluator.model
    on_cpu = replace(in_one_piece(job.full.config), device="cpu", self_check=False)
    return load_model(ModelSource(on_cpu))


def scored_alone(evaluator: Evaluator, name: str) -> Evaluation:
    """On the test split; raises GenomeError where the model has no score."""
    (outcome,) = evaluator.evaluate([None], "test")
    if isinstance(outcome, EvaluationFailure):
        raise GenomeError(f"the {name} model has no score on the test split ({outcome.reason})")
    return outcome
