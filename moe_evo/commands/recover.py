"""`moe-evo recover`: a pruned model learns from the full one what pruning broke, into another stock checkpoint.

What the full model says of the prompts is written to files first; then the full model is dropped, and the smaller one
is loaded and trained. Everything is kept beside the target until it is done, so that a killed recovery goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_evo.commands.export import Winner
from moe_evo.commands.recovery_input import (
    FULL,
    LEARNED,
    PRUNED,
    RECOVERED,
    VALIDATION,
    RecoveryJob,
    checked_job,
    identity_of,
)
from moe_evo.commands.recovery_workers import SmallModel, learn_on_workers, trains_on_workers
from moe_evo.commands.shared import provenance
from moe_evo.commands.teaching import ask_full_model, scored_alone
from moe_evo.config.recover import RecoveryConfig
from moe_evo.files.write import write_whole
from moe_evo.genomes.population import Evaluation, ExampleScores
from moe_evo.plain import Plain, plain
from moe_evo.records.folder import RunFolder
from moe_evo.records.recovery_folder import RecoveryFolder
from moe_evo.records.result import Score
from moe_evo.records.statistics import paired_difference
from moe_evo.report.answers import RecoveredModel, RecoveryFacts, Stage
from moe_evo.tasks.data import is_share, reported
from moe_evo.tracking.base import Tracker
from moe_evo.tracking.start import tracked_recovery

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.export.model_card import Treatment
    from moe_evo.recovery.material import Material
    from moe_evo.recovery.state import Learned

IN_CHECKPOINT = Path("moe_evo") / "recovery.json"
"""What was learned, in the recovered checkpoint: in a subfolder, where no loader looks for weights."""


def recover(
    config: RecoveryConfig, pruned: str, target: Path, which: str, *, overwrite: bool, tracker: Tracker
) -> RecoveredModel:
    """Let a pruned model learn from `config.model`, the full one, and write its checkpoint into `target`.

    pruned: the folder of a checkpoint, or of a finished run, whose genome `which` is taken. Continues where an earlier
    process was killed.
    """
    target = target.absolute()
    job = checked_job(config, pruned, target, which, overwrite=overwrite)
    folder = RecoveryFolder(target)
    hashes = {"model": job.full.hash, **{one.name: one.hash for one in job.data}}
    beside = target.with_name(f"{target.name}.tracking")
    with (
        folder.claim(identity_of(job)),
        tracked_recovery(job.config, beside, folder.tracking_id(), hashes, tracker) as everywhere,
    ):
        ask_full_model(job, folder, everywhere)
        return _train(job, folder, target, overwrite=overwrite, tracker=everywhere)


def _train(
    job: RecoveryJob, folder: RecoveryFolder, target: Path, *, overwrite: bool, tracker: Tracker
) -> RecoveredModel:
    """Load the pruned model, train it, score it before and after, and write its checkpoint."""
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.export.export import export_checkpoint
    from moe_evo.models.size.size import read_size
    from moe_evo.recovery.blocks import BlockTargets, few_tokens
    from moe_evo.recovery.lessons import read_lessons
    from moe_evo.recovery.material import Material

    student = SmallModel(job, folder.student if job.winner is not None else Path(job.pruned), tracker)
    if folder.score(PRUNED) is None:
        tracker.message("scoring the pruned model on the test split")
        folder.keep_score(PRUNED, scored_alone(student.evaluator, PRUNED))
    lessons, validation = (read_lessons(folder.lessons, name) for name in (LEARNED, VALIDATION))
    blocks = BlockTargets.load(folder.lessons) if job.needs_blocks else None
    if blocks is not None and "closed_form" in job.recover.methods:
        line = few_tokens(blocks, lessons, job.enough_tokens)
        if line is not None:
            tracker.message(line)
    material = Material(lessons, validation, blocks)
    stages: tuple[Stage, ...] = ()
    for _ in job.methods:
        stages = (*stages, _learn(job, folder, student, material, tracker, stages))
    evaluator = student.evaluator
    tracker.message("scoring the recovered model on the test split")
    # another evaluator, as the old one may have hidden states of the weights before
    trained = Evaluator(evaluator.model, evaluator.tasks, job.config.evaluation)
    folder.keep_score(RECOVERED, scored_alone(trained, RECOVERED))
    outcomes = {name: _kept(folder, name) for name in (FULL, PRUNED, RECOVERED)}
    scores = {name: _score(job, one) for name, one in outcomes.items()}
    examples = {name: one.scores or {} for name, one in outcomes.items()}
    facts = RecoveryFacts(
        prompts=len(lessons),
        positions=len(lessons.tokens),
        stages=stages,
        scores=scores,
        gained=paired_difference(examples[RECOVERED], examples[PRUNED], np.random.default_rng(0)),
        missing=paired_difference(examples[RECOVERED], examples[FULL], np.random.default_rng(0)),
    )
    tracker.measured({f"recovery/test/{name}": one.fitness for name, one in scores.items()} | _position(stages))
    tracker.message(f"writing and checking {target}")
    report = export_checkpoint(
        trained.model,
        trained.model.shape.identity(),
        target,
        overwrite=overwrite,
        provenance=_provenance(job, facts),
        treatment=_treatment(job),
    )
    if job.winner is not None:
        _tell_run(job, job.winner, trained, scores[RECOVERED])
    of_full = read_size(job.full, 1)
    report = replace(report, parameters_before=of_full.parameters, bytes_before=of_full.size)
    return RecoveredModel(report, facts, _save_beside(target, facts, examples))


def _score(job: RecoveryJob, outcome: Evaluation) -> Score:
    return Score.of(outcome, is_share=is_share(job.data), rule=job.config.evaluation.fitness)


def _tell_run(job: RecoveryJob, found: Winner, trained: Evaluator, test: Score) -> None:
    """Add a line to the final table of the run whose genome was recovered."""
    scores = {"test": test}
    for split in ("search", "validation"):
        (outcome,) = trained.evaluate([None], reported(split, job.data))
        if isinstance(outcome, Evaluation):
            scores[split] = _score(job, outcome)
    key = RECOVERED if found.row.key == "best" else f"{RECOVERED}_{found.row.key}"
    row = replace(found.row, key=key, title=f"{found.row.title}, recovered", scores=scores)
    run = RunFolder.existing(job.pruned)
    run.write_result(run.read_result().with_recovered(row))


def _learn(
    job: RecoveryJob,
    folder: RecoveryFolder,
    student: SmallModel,
    material: Material,
    tracker: Tracker,
    before: Sequence[Stage],
) -> Stage:
    """Let the next method change the model; one that an earlier process has finished takes no time."""
    from moe_evo.evaluation.evaluator import torch_threads
    from moe_evo.recovery.state import TrainingState

    number = len(before)
    recover, method = job.recover, job.methods[number]
    steps = method.num_steps(recover, job.full.shape.num_layers)
    on_workers = trains_on_workers(job, number)

    def begin(begun: int) -> None:
        tracker.stage(f"recovering ({recover.methods[number]})", steps, begun, unit=method.unit)

    num_told = 0

    def tell(learned: Learned) -> None:
        """Pass on the losses of the checks that are new."""
        nonlocal num_told
        for check in learned.checks[num_told:]:
            losses = {"validation": check.validation, "training": check.training}
            values = {f"recovery/{name}_loss": value for name, value in losses.items() if value is not None}
            here = Stage(recover.methods[number], method.unit, replace(learned, steps=check.step))
            tracker.measured(values | _position((*before, here)))
        num_told = len(learned.checks)

    def done(learned: Learned) -> None:
        tell(learned)
        first, last = learned.checks[0], learned.checks[-1]
        tracker.advanced(1, f"validation loss {last.validation:.4f} (before: {first.validation:.4f})")

    if on_workers:
        learned = learn_on_workers(job, folder, student, tracker, number, begin, done)
    else:
        file = folder.state(number)
        begin(TrainingState.load(file).learned.steps if file.is_file() else 0)
        with torch_threads(job.config.evaluation.threads):
            learned = method.recover(student.evaluator.model, material, recover, file, done)
    tell(learned)
    if learned.stopped:
        tracker.message(f"stopped after {learned.steps} of {steps} {method.unit}s: {learned.stopped}")
    return Stage(recover.methods[number], method.unit, learned)


def _position(stages: Sequence[Stage]) -> dict[str, float]:
    """Where the curves of a recovery are: steps of all methods together, and the number of the present one."""
    return {"recovery/step": sum(stage.learned.steps for stage in stages), "recovery/stage": len(stages)}


def _kept(folder: RecoveryFolder, name: str) -> Evaluation:
    found = folder.score(name)
    assert found is not None, f"the {name} model was scored before"
    return found


def _provenance(job: RecoveryJob, facts: RecoveryFacts) -> Plain:
    """For the model card: the base model, the data, how it was pruned, what it learned, and the scores."""
    how = {
        "recovery": {
            "learned from": f"{facts.prompts:,} prompts, {facts.positions:,} tokens of them and of their answers",
            **{stage.method: stage.in_words for stage in facts.stages},
        }
    }
    if job.winner is not None:
        how = {**{name: job.winner.provenance[name] for name in ("search", "genome")}, **how}
    return provenance(job.config, job.full.hash, job.data, how, dict(facts.scores))


def _treatment(job: RecoveryJob) -> Treatment:
    from moe_evo.models.export.model_card import Treatment

    learned = ", then ".join(method.description for method in job.methods)
    if job.full.is_dense:
        return Treatment("recovered experts", f"experts made of the dense model's FFNs learned {learned}", "recovered")
    description = f"experts were pruned, and what is left learned {learned}"
    return Treatment("fewer experts, recovered", description, "recovered")


def _save_beside(checkpoint: Path, facts: RecoveryFacts, examples: Mapping[str, ExampleScores]) -> Path:
    """Write what was learned, and a picture of the losses, into a subfolder of the checkpoint; returns the picture.

    examples: scores of every test example, by model.
    """
    from moe_evo.report.figure import losses_figure

    file = checkpoint / IN_CHECKPOINT
    file.parent.mkdir(exist_ok=True)
    told = {name: {task: one.tolist() for task, one in scores.items()} for name, scores in examples.items()}
    write_whole(file, json.dumps({**plain(facts), "examples": told}) + "\n")
    figure = file.with_suffix(".png")
    losses_figure(figure, facts.stages)
    return figure
