"""What is asked of the full model before a pruned one learns from it: its score, its answers, and what it expects.

It is written to files, so that the full model need not be in memory while the pruned one learns.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.commands.recovery_input import (
    FULL,
    LEARNED,
    VALIDATION,
    RecoveryJob,
    in_one_piece,
    prompts_of,
)
from moe_evo.config.recover import RecoverConfig
from moe_evo.errors import GenomeError
from moe_evo.genomes.population import Evaluation, EvaluationFailure
from moe_evo.records.recovery_folder import RecoveryFolder
from moe_evo.recovery.prompts import Prompt
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.view import MoEModel
    from moe_evo.recovery.lessons import Reading


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
            _write_lessons(evaluator, prompts, folder.lessons, name, job.recover, tracker)
    if not has_all:
        _write_blocks(evaluator, folder.lessons, job.recover, tracker)
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


def _write_lessons(
    evaluator: Evaluator, prompts: Sequence[Prompt], folder: Path, name: str, recover: RecoverConfig, tracker: Tracker
) -> None:
    """Let the full model write answers, then read everything once more for its distributions."""
    from moe_evo.recovery.lessons import write_lessons

    model = evaluator.model
    readings = _readings(evaluator, prompts, name, recover.answer_tokens, tracker)

    def write() -> None:
        tracker.stage(f"reading {name} prompts", len(readings), unit="prompt")
        write_lessons(
            folder, name, readings, model.language_model, model.device,
            top_k=recover.top_k, batch_tokens=evaluator.batch_tokens, done=tracker.advanced,
        )  # fmt: skip

    evaluator.within_memory(write)


def _write_blocks(evaluator: Evaluator, folder: Path, recover: RecoverConfig, tracker: Tracker) -> None:
    """Keep what the full model's layers put out, at some of the tokens of its lessons."""
    from moe_evo.recovery.blocks import write_blocks
    from moe_evo.recovery.lessons import read_lessons

    tracker.message(f"keeping the outputs of {len(evaluator.model.layers)} MoE layers")
    lessons = read_lessons(folder, LEARNED)

    def write() -> None:
        write_blocks(
            folder, lessons, evaluator.model, most_tokens=recover.block_tokens, batch_tokens=evaluator.batch_tokens
        )

    evaluator.within_memory(write)


def _readings(
    evaluator: Evaluator, prompts: Sequence[Prompt], name: str, answer_tokens: int, tracker: Tracker
) -> list[Reading]:
    """What is read for each prompt: with its right answer, or with the one that the model writes."""
    from moe_evo.recovery.lessons import Reading

    asked = {number: one for number, one in enumerate(prompts) if one.lacks_answer and answer_tokens}
    written: dict[int, tuple[int, ...]] = {}
    if asked:
        tracker.stage(f"answering {name} prompts", len(asked), unit="prompt")
        for stop in dict.fromkeys(one.stop for one in asked.values()):
            chosen = {number: one.tokens for number, one in asked.items() if one.stop == stop}
            answer = partial(_written, evaluator, chosen, answer_tokens, stop, tracker.advanced)
            written |= evaluator.within_memory(answer)
    readings = []
    for number, one in enumerate(prompts):
        answer_of = one.answer or written.get(number, ())
        start = 0 if one.is_text else len(one.tokens) - 1
        readings.append(Reading(one.tokens + answer_of[:-1], start, one.answer))
    return readings


def _written(
    evaluator: Evaluator, prompts: dict[int, tuple[int, ...]], most: int, stop: str, done: Callable[[int], None]
) -> dict[int, tuple[int, ...]]:
    """The answers that the model writes, by the number of the prompt."""
    from moe_evo.evaluation.engine.generate import generate_greedily
    from moe_evo.tasks.batches import generate_batches
    from moe_evo.tasks.rows import BatchLimits, Row

    model = evaluator.model
    rows = [Row(number, tokens, len(tokens) - 1) for number, tokens in prompts.items()]
    limits = BatchLimits(evaluator.batch_tokens, len(model.tokenizer))
    found = {}
    for batch in generate_batches(rows, limits, most, stop):
        generated = generate_greedily(model.language_model, model.tokenizer, batch.to(model.device))
        lengths = generated.num_new.tolist()
        for number, new, length in zip(batch.examples.tolist(), generated.new.tolist(), lengths, strict=True):
            found[number] = tuple(new[:length])
        done(len(lengths))
    return found
