"""`moe-evo recover`: a pruned model learns from the full one what pruning broke, into another stock checkpoint.

What the full model says of the prompts is written to files first; then the full model is dropped, and the smaller one
is loaded and trained. Everything is kept beside the target until it is done, so that a killed recovery goes on.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_evo.commands.export import Winner, winner
from moe_evo.commands.shared import provenance, require_one_process
from moe_evo.config.check import require
from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import RecoverConfig, RecoveryConfig
from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError, GenomeError, RunError
from moe_evo.genomes.population import Evaluation, EvaluationFailure, ExampleScores
from moe_evo.plain import Plain, plain, plain_fields
from moe_evo.records.folder import RunFolder, default_folder, with_absolute_paths, write_whole
from moe_evo.records.recovery_folder import RecoveryFolder
from moe_evo.records.result import Score
from moe_evo.records.statistics import paired_difference
from moe_evo.recovery.prompts import FilePrompts, Prompt, file_prompts, read_prompts, split_prompts
from moe_evo.report.answers import RecoveredModel, RecoveryFacts, Stage
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.data import TaskData, check_tasks, is_share, reported
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.export.model_card import Treatment
    from moe_evo.models.source import ModelSource
    from moe_evo.models.view import MoEModel
    from moe_evo.recovery.lessons import Reading
    from moe_evo.recovery.material import Material
    from moe_evo.recovery.methods import RecoveryMethod
    from moe_evo.recovery.state import Learned

FULL, PRUNED, RECOVERED = "full", "pruned", "recovered"
"""The models that are scored on the test split."""

LEARNED, VALIDATION = "learned", "validation"
"""The names of the lessons that are learned from, and of those that choose the weights."""

IN_CHECKPOINT = Path("moe_evo") / "recovery.json"
"""What was learned, in the recovered checkpoint: in a subfolder, where no loader looks for weights."""


@dataclass(frozen=True)
class _Input:
    """What a recovery needs beside the pruned model, after all checks."""

    config: RecoveryConfig
    data: tuple[TaskData, ...]
    prompts: FilePrompts | None
    full: ModelSource
    methods: tuple[RecoveryMethod, ...]

    @property
    def learns_labels(self) -> bool:
        return any(method.learns_labels for method in self.methods)

    @property
    def needs_blocks(self) -> bool:
        return any(method.needs_blocks for method in self.methods)


@dataclass(frozen=True)
class _Job(_Input):
    """The whole input of a recovery. pruned: folder of a checkpoint or run. winner: of a run; None for a checkpoint."""

    pruned: str
    winner: Winner | None

    @property
    def recover(self) -> RecoverConfig:
        return self.config.recover


def recover(
    config: RecoveryConfig, pruned: str, target: Path, which: str, *, overwrite: bool, tracker: Tracker
) -> RecoveredModel:
    """Let a pruned model learn from `config.model`, the full one, and write its checkpoint into `target`.

    pruned: the folder of a checkpoint, or of a finished run, whose genome `which` is taken. Continues where an earlier
    process was killed.
    """
    target = target.absolute()
    job = _checked(config, pruned, target, which, overwrite=overwrite)
    folder = RecoveryFolder(target)
    with folder.claim(_identity(job)):
        _ask_full_model(job, folder, tracker)
        return _train(job, folder, target, overwrite=overwrite, tracker=tracker)


def of_winner(config: RunConfig, recover: RecoverConfig) -> tuple[RecoveryConfig, Path]:
    """The config with which the winner of a search is to learn, and the folder of its checkpoint.

    Raises before the search where anything is wrong.
    """
    address = config.cluster.address
    require(address is None, "--recover", True, f"it without cluster.address ({address}): recover the run afterwards")
    kept = config.search.num_kept
    require(isinstance(kept, int), "--recover", True, f"one search.num_kept for all layers, not {kept}")
    target = Path(config.folder or default_folder(config)) / RECOVERED
    if target.exists():
        raise ConfigError(f"--recover: {target} is there already; move it, or recover the run with another --to")
    found = RecoveryConfig(config.model, config.tasks, config.evaluation, recover=recover)
    _check_input(found)
    return found, target


def of_pruned(
    config: ScoringConfig, recover: RecoverConfig, pruned: Path, *, overwrite: bool
) -> tuple[RecoveryConfig, Path]:
    """The same for a model that is to be pruned into the folder `pruned`."""
    from moe_evo.models.export.target_folder import check_target

    target = pruned.absolute().with_name(f"{pruned.name}-{RECOVERED}")
    found = RecoveryConfig(config.model, config.tasks, config.evaluation, config.cluster, recover)
    _check_input(found)
    check_target(target, Path(config.model.path), overwrite=overwrite)
    return found, target


def _checked(config: RecoveryConfig, pruned: str, target: Path, which: str, *, overwrite: bool) -> _Job:
    """Raises where anything is wrong with the input; loads no weights."""
    given = _check_input(config)
    from moe_evo.models.export.target_folder import check_target
    from moe_evo.models.source import ModelSource

    found, path = None, Path(pruned).expanduser()
    if is_run(path):
        found = winner(RunFolder.existing(path), which, given.config.model)
        if found.row.loader != "transformers":
            raise RunError(
                f"{path}: layers of {which!r} keep different numbers of experts, which no stock checkpoint holds; "
                "recover one of equal numbers (--which), or search with one search.num_kept"
            )
    else:
        require(which == "best", "--which", which, f"none: {pruned} is a checkpoint and no run")
        _check_alike(given.full, ModelSource(_small(given.config.model, path)))
    check_target(target, path, overwrite=overwrite)
    if target == Path(given.full.location).absolute():
        raise ConfigError(f"--to: got {target}, which is the full model; give another folder")
    return _Job(**vars(given), pruned=str(path.absolute() if path.exists() else pruned), winner=found)


def _check_input(config: RecoveryConfig) -> _Input:
    """Raises where anything but the pruned model is wrong."""
    require_one_process(config, "recover")
    sharding = config.model.sharding
    require(sharding == "single", "model.sharding", sharding, "'single': whole weights are trained")
    require(config.model.alignment is None, "model.alignment", config.model.alignment, "none: no experts are merged")
    config = with_absolute_paths(config)
    data = check_tasks(config.tasks)
    prompts = None if config.recover.prompts is None else read_prompts(config.recover.prompts, data)
    from moe_evo.models.load import resolve_device
    from moe_evo.models.source import ModelSource
    from moe_evo.recovery.methods import RECOVERY_METHODS

    methods = tuple(RECOVERY_METHODS.get(name, "recover.methods") for name in config.recover.methods)
    for name, method in zip(config.recover.methods, methods, strict=True):
        require(
            not method.learns_labels or config.recover.search_split, "recover.search_split", False,
            f"true: the answers that {name!r} of recover.methods learns are those of the search split",
        )  # fmt: skip
    resolve_device(config.model.device)
    return _Input(config, data, prompts, ModelSource(config.model), methods)


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run, and not of a checkpoint."""
    return (path / "config.yaml").is_file() and not (path / "config.json").is_file()


def _small(model: ModelConfig, path: Path) -> ModelConfig:
    return replace(model, path=str(path), revision=None)


def _check_alike(full: ModelSource, small: ModelSource) -> None:
    """Raise ConfigError where one model cannot learn from the other, as their tokens differ."""
    vocabularies = [one.transformers_config.get_text_config().vocab_size for one in (full, small)]
    tokenizers = [None if one.tokenizer is None else one.tokenizer.get_vocab() for one in (full, small)]
    if vocabularies[0] != vocabularies[1] or tokenizers[0] != tokenizers[1]:
        raise ConfigError(
            f"model.path: got {full.config.path}, whose vocabulary is not that of {small.config.path}; give the full "
            "model that it was made of"
        )


def _identity(job: _Job) -> Plain:
    """Everything that the result depends on."""
    small = None if job.winner is None else job.winner.genome.digest
    from moe_evo.models.source import ModelSource

    return {
        "full model": job.full.hash,
        "pruned model": small or ModelSource(_small(job.config.model, Path(job.pruned))).hash,
        "dtype": job.config.model.dtype,
        "tasks": {one.name: {"data": one.hash, **_options(one.config)} for one in job.data},
        "prompts": None if job.prompts is None else job.prompts.hash,
        "recover": {name: value for name, value in plain_fields(job.recover).items() if name != "prompts"},
    }


def _options(task: TaskConfig) -> Plain:
    """Of a task, without where its files are."""
    return {name: value for name, value in plain_fields(task).items() if name not in ("name", "data", "few_shot")}


def _ask_full_model(job: _Job, folder: RecoveryFolder, tracker: Tracker) -> None:
    """Write what is needed of the full model: its score, its lessons, and the pruned checkpoint of a run."""
    from moe_evo.models.export.export import export_checkpoint
    from moe_evo.recovery.blocks import has_blocks
    from moe_evo.recovery.lessons import has_lessons

    is_done = all(has_lessons(folder.lessons, name) for name in (LEARNED, VALIDATION))
    has_all = has_blocks(folder.lessons) or not job.needs_blocks
    if is_done and has_all and folder.score(FULL) is not None:
        return
    evaluator = load_evaluator(job.full, job.data, job.config.evaluation, tracker)
    if folder.score(FULL) is None:
        tracker.message("scoring the full model on the test split")
        folder.keep_score(FULL, _scored(evaluator, FULL))
    if job.winner is not None:
        tracker.message("writing the pruned model")
        export_checkpoint(
            evaluator.model, job.winner.genome, folder.student, overwrite=True, provenance=job.winner.provenance
        )
    for name, prompts in _prompts(job, evaluator).items():
        if not has_lessons(folder.lessons, name):
            _write_lessons(evaluator, prompts, folder.lessons, name, job.recover, tracker)
    if not has_all:
        _write_blocks(evaluator, folder.lessons, job.recover, tracker)
    del evaluator
    gc.collect()  # the pruned model may need the memory


def _scored(evaluator: Evaluator, name: str) -> Evaluation:
    """On the test split; raises GenomeError where the model has no score."""
    (outcome,) = evaluator.evaluate([None], "test")
    if isinstance(outcome, EvaluationFailure):
        raise GenomeError(f"the {name} model has no score on the test split ({outcome.reason})")
    return outcome


def _prompts(job: _Job, evaluator: Evaluator) -> dict[str, list[Prompt]]:
    """What is learned from, and what chooses the weights."""
    from moe_evo.tasks.prompt import PromptFormat

    tokenizer, recover = evaluator.model.tokenizer, job.recover
    formats = [PromptFormat(one.config, one, tokenizer) for one in job.data]
    of_split = partial(
        split_prompts, job.data, formats, answer_tokens=recover.answer_tokens, labelled=job.learns_labels
    )
    learned = of_split("search") if recover.search_split else []
    if job.prompts is not None:
        learned = learned + file_prompts(job.prompts, formats, recover.answer_tokens)
    return {LEARNED: learned, VALIDATION: of_split("validation")}


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


def _train(job: _Job, folder: RecoveryFolder, target: Path, *, overwrite: bool, tracker: Tracker) -> RecoveredModel:
    """Load the pruned model, train it, score it before and after, and write its checkpoint."""
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.export.export import export_checkpoint
    from moe_evo.models.size.size import read_size
    from moe_evo.models.source import ModelSource
    from moe_evo.recovery.blocks import BlockTargets
    from moe_evo.recovery.lessons import read_lessons
    from moe_evo.recovery.material import Material

    path = folder.student if job.winner is not None else Path(job.pruned)
    source = ModelSource(_small(job.config.model, path))
    evaluator = load_evaluator(source, job.data, job.config.evaluation, tracker)
    if folder.score(PRUNED) is None:
        tracker.message("scoring the pruned model on the test split")
        folder.keep_score(PRUNED, _scored(evaluator, PRUNED))
    lessons, validation = (read_lessons(folder.lessons, name) for name in (LEARNED, VALIDATION))
    blocks = BlockTargets.load(folder.lessons) if job.needs_blocks else None
    material = Material(lessons, validation, blocks)
    learn = partial(_learn, job, folder, evaluator.model, material, tracker)
    stages = tuple(map(learn, range(len(job.methods))))
    tracker.message("scoring the recovered model on the test split")
    # another evaluator, as the old one may have hidden states of the weights before
    trained = Evaluator(evaluator.model, evaluator.tasks, job.config.evaluation)
    folder.keep_score(RECOVERED, _scored(trained, RECOVERED))
    outcomes = {name: _kept(folder, name) for name in (FULL, PRUNED, RECOVERED)}
    scores = {name: Score.of(one, is_share=is_share(job.data)) for name, one in outcomes.items()}
    examples = {name: one.scores or {} for name, one in outcomes.items()}
    facts = RecoveryFacts(
        prompts=len(lessons),
        positions=len(lessons.tokens),
        stages=stages,
        scores=scores,
        gained=paired_difference(examples[RECOVERED], examples[PRUNED], np.random.default_rng(0)),
        missing=paired_difference(examples[RECOVERED], examples[FULL], np.random.default_rng(0)),
    )
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


def _tell_run(job: _Job, found: Winner, trained: Evaluator, test: Score) -> None:
    """Add a line to the final table of the run whose genome was recovered."""
    scores = {"test": test}
    for split in ("search", "validation"):
        (outcome,) = trained.evaluate([None], reported(split, job.data))
        if isinstance(outcome, Evaluation):
            scores[split] = Score.of(outcome, is_share=is_share(job.data))
    key = RECOVERED if found.row.key == "best" else f"{RECOVERED}_{found.row.key}"
    row = replace(found.row, key=key, title=f"{found.row.title}, recovered", scores=scores)
    run = RunFolder.existing(job.pruned)
    run.write_result(run.read_result().with_recovered(row))


def _learn(
    job: _Job, folder: RecoveryFolder, model: MoEModel, material: Material, tracker: Tracker, number: int
) -> Stage:
    """Let one method change the model; one that an earlier process has finished takes no time."""
    from moe_evo.evaluation.evaluator import torch_threads
    from moe_evo.recovery.state import TrainingState

    recover, method, file = job.recover, job.methods[number], folder.state(number)
    begun = TrainingState.load(file).learned.steps if file.is_file() else 0
    steps = method.num_steps(recover, len(model.layers))
    tracker.stage(f"recovering ({recover.methods[number]})", steps, begun, unit=method.unit)

    def done(learned: Learned) -> None:
        first, last = learned.checks[0], learned.checks[-1]
        tracker.advanced(1, f"validation loss {last.validation:.4f} (before: {first.validation:.4f})")

    with torch_threads(job.config.evaluation.threads):
        learned = method.recover(model, material, recover, file, done)
    if learned.stopped:
        tracker.message(f"stopped after {learned.steps} of {steps} {method.unit}s: {learned.stopped}")
    return Stage(recover.methods[number], method.unit, learned)


def _kept(folder: RecoveryFolder, name: str) -> Evaluation:
    found = folder.score(name)
    assert found is not None, f"the {name} model was scored before"
    return found


def _provenance(job: _Job, facts: RecoveryFacts) -> Plain:
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


def _treatment(job: _Job) -> Treatment:
    from moe_evo.models.export.model_card import Treatment

    learned = ", then ".join(method.description for method in job.methods)
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
