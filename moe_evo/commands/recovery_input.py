"""The input of a recovery: what is recovered from what, checked before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.commands.export import Winner, winner
from moe_evo.commands.shared import require_one_process, require_stock
from moe_evo.config.check import require
from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import RecoverConfig, RecoveryConfig, enough_tokens
from moe_evo.config.run import RunConfig, ScoringConfig, TrackingConfig
from moe_evo.config.task import TaskConfig
from moe_evo.errors import ConfigError, RunError
from moe_evo.plain import Plain, plain_fields
from moe_evo.records.folder import RunFolder, default_folder, with_absolute_paths
from moe_evo.recovery.prompts import FilePrompts, Prompt, file_prompts, read_prompts, split_prompts
from moe_evo.report.planned import RecoveryPlan
from moe_evo.tasks.data import TaskData, check_tasks

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.models.size.size import ModelSize
    from moe_evo.models.source import ModelSource
    from moe_evo.recovery.methods import RecoveryMethod
    from moe_evo.tasks.prompt import PromptFormat

FULL, PRUNED, RECOVERED = "full", "pruned", "recovered"
"""The models that are scored on the test split."""

LEARNED, VALIDATION = "learned", "validation"
"""The names of the lessons that are learned from, and of those that choose the weights."""

_FREE_TO_CHANGE = ("prompts", "batch_tokens", "gradient_checkpointing", "zero_stage")
"""Options that may differ when a recovery goes on: of the prompts the content counts, and the others take memory."""

DEEPSPEED = "deepspeed"
"""What `recover.engine` calls the workers of a cluster."""


@dataclass(frozen=True)
class RecoveryInput:
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
class RecoveryJob(RecoveryInput):
    """The whole input of a recovery. pruned: folder of a checkpoint or run. winner: of a run; None for a checkpoint."""

    pruned: str
    winner: Winner | None

    @property
    def recover(self) -> RecoverConfig:
        return self.config.recover

    @property
    def enough_tokens(self) -> int:
        """How many tokens a fit of the pruned model's layers should rest on."""
        from moe_evo.models.source import ModelSource

        if self.winner is not None:
            genome, full = self.winner.genome, self.full
            return enough_tokens(
                max(genome.num_kept), min(genome.top_k), full.family.expert_width(full.transformers_config)
            )
        small = ModelSource(small_model(self.config.model, Path(self.pruned)))
        return enough_tokens(
            max(small.shape.num_experts), min(small.shape.top_k), small.family.expert_width(small.transformers_config)
        )


def of_winner(config: RunConfig, recover: RecoverConfig) -> tuple[RecoveryConfig, Path]:
    """The config with which the winner of a search is to learn, and the folder of its checkpoint.

    Raises before the search where anything is wrong.
    """
    address, on_workers = config.cluster.address, recover.engine == DEEPSPEED
    require(
        address is None or on_workers, "--recover", True,
        f"it without cluster.address ({address}), or with recover.engine deepspeed; or recover the run afterwards",
    )  # fmt: skip
    kept = config.search.num_kept
    require(isinstance(kept, int), "--recover", True, f"one search.num_kept for all layers, not {kept}")
    target = Path(config.folder or default_folder(config)) / RECOVERED
    if target.exists():
        raise ConfigError(f"--recover: {target} is there already; move it, or recover the run with another --to")
    found = RecoveryConfig(
        config.model, config.tasks, config.evaluation, config.cluster, recover=recover, tracking=config.tracking
    )
    _checked_input(found)
    return found, target


def of_pruned(
    config: ScoringConfig, recover: RecoverConfig, pruned: Path, *, overwrite: bool
) -> tuple[RecoveryConfig, Path]:
    """The same for a model that is to be pruned into the folder `pruned`."""
    from moe_evo.models.export.target_folder import check_target

    target = pruned.absolute().with_name(f"{pruned.name}-{RECOVERED}")
    untracked = TrackingConfig("disabled")  # this command has no options of tracking
    found = RecoveryConfig(config.model, config.tasks, config.evaluation, config.cluster, recover, untracked)
    _checked_input(found)
    check_target(target, Path(config.model.path), overwrite=overwrite)
    return found, target


def planned_recovery(config: RecoveryConfig, size: ModelSize, num_kept: Sequence[int]) -> RecoveryPlan:
    """What the recovery of a pruned model takes, without weights; size: of the full model. Raises for wrong input."""
    from moe_evo.recovery.lessons import bytes_of_lessons
    from moe_evo.tasks.prompt import PromptFormat

    given, recover = _checked_input(config), config.recover
    formats = [PromptFormat(one.config, one, given.full.tokenizer) for one in given.data]
    prompts = prompts_of(given, formats)
    longest = {
        name: sum(len(one.tokens) + (recover.answer_tokens if one.lacks_answer else len(one.answer)) for one in found)
        for name, found in prompts.items()
    }
    width = given.full.family.expert_width(given.full.transformers_config)
    most = recover.most_block_tokens(enough_tokens(max(num_kept), min(size.shape.top_k), width))
    blocks = min(most, longest[LEARNED]) * size.activations.hidden * size.itemsize * len(num_kept)
    return RecoveryPlan(
        prompts=len(prompts[LEARNED]),
        positions=sum(longest.values()),
        lesson_bytes=bytes_of_lessons(sum(longest.values()), min(recover.top_k, size.vocabulary)),
        block_bytes=blocks if given.needs_blocks else 0,
        **_planned_training(given, size, num_kept),
    )


def _planned_training(given: RecoveryInput, size: ModelSize, num_kept: Sequence[int]) -> dict[str, int]:
    """How many numbers the methods train at most, and the memory that this takes."""
    from moe_evo.recovery.methods import Distillation
    from moe_evo.recovery.training_size import trained_numbers, training_bytes

    recover = given.config.recover
    parts: list[tuple[str, ...]] = [()]
    for method in given.methods:
        if isinstance(method, Distillation):
            parts.append(tuple(method.trained(recover)))
        elif method.unit == "step":  # of another package, which may train anything
            parts.append(("all",))
    numbers = max(trained_numbers(size, num_kept, one, recover.rank) for one in parts)
    if recover.engine == DEEPSPEED:
        return {"trained_numbers": numbers, **_planned_workers(given.config, size, num_kept)}
    checkpointing = recover.gradient_checkpointing
    return {
        "trained_numbers": numbers,
        "training_bytes": max(
            training_bytes(size, num_kept, one, recover.rank, checkpointing=checkpointing) for one in parts
        ),
    }


def _planned_workers(config: RecoveryConfig, size: ModelSize, num_kept: Sequence[int]) -> dict[str, int]:
    """What each of the workers takes."""
    from moe_evo.models.size.memory import training_per_rank

    workers = config.cluster.gang_size
    memory = training_per_rank(size, num_kept, workers, config.recover.zero_stage, config.model.offload)
    return {
        "training_bytes": memory.device + memory.gathered,
        "workers": workers,
        "host_bytes": memory.host,
        "disk_bytes": memory.disk,
    }


def checked_job(config: RecoveryConfig, pruned: str, target: Path, which: str, *, overwrite: bool) -> RecoveryJob:
    """Raises where anything is wrong with the input; loads no weights."""
    given = _checked_input(config)
    from moe_evo.models.export.pruned import has_unequal_layers
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
        if has_unequal_layers(path):
            raise RunError(
                f"{path}: its layers keep different numbers of experts, which no stock checkpoint holds, and recovery "
                "writes one; prune to one number for all layers"
            )
        small = ModelSource(small_model(given.config.model, path))
        _check_alike(given, small)
        _check_same_outputs(given, small)
    check_target(target, path, overwrite=overwrite)
    if target == Path(given.full.location).absolute():
        raise ConfigError(f"--to: got {target}, which is the full model; give another folder")
    return RecoveryJob(**vars(given), pruned=str(path.absolute() if path.exists() else pruned), winner=found)


def _checked_input(config: RecoveryConfig) -> RecoveryInput:
    """Raises where anything but the pruned model is wrong."""
    on_workers = config.recover.engine == DEEPSPEED
    if on_workers:
        require_stock(config)
        _check_workers(config)
    else:
        require_one_process(config, "recover")
        require(
            config.model.sharding == "single", "model.sharding", config.model.sharding,
            "'single': whole weights are trained; or recover.engine deepspeed, which shares them among workers",
        )  # fmt: skip
    require(config.model.alignment is None, "model.alignment", config.model.alignment, "none: no experts are merged")
    config.recover.check_read()
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
    # without offloading, one process that holds slices holds all that they are slices of
    full = ModelSource(in_one_piece(config.model) if config.model.offload == "none" else config.model, "any")
    _check_rank(config.recover, full)
    if on_workers:
        _check_methods(config, methods)
        _check_trainable(config, full)
    return RecoveryInput(config, data, prompts, full, methods)


def _check_workers(config: RecoveryConfig) -> None:
    """Raise ConfigError for options that do not go together where workers train."""
    cluster, model, recover = config.cluster, config.model, config.recover
    require(
        model.sharding == "zero3", "model.sharding", model.sharding,
        "'zero3' for recover.engine deepspeed, and workers: --cluster.address local (or auto) --cluster.gang_size N",
    )  # fmt: skip
    require(
        model.offload != "nvme" or recover.zero_stage == 3, "recover.zero_stage", recover.zero_stage,
        "3, as model.offload is 'nvme'",
    )  # fmt: skip
    require(
        recover.batch_size >= cluster.gang_size, "recover.batch_size", recover.batch_size,
        f"at least cluster.gang_size ({cluster.gang_size}): each worker reads its share of a step's prompts",
    )  # fmt: skip


def _check_methods(config: RecoveryConfig, methods: Sequence[RecoveryMethod]) -> None:
    """Raise ConfigError where workers would have nothing to do."""
    from moe_evo.models.zero3 import check_deepspeed
    from moe_evo.recovery.methods import Distillation

    check_deepspeed("recover.engine: 'deepspeed'")
    require(
        not {"adapters", "scales"} & {*config.recover.train}, "recover.train", config.recover.train,
        "no adapters and no scales with recover.engine deepspeed: they are trained on one device",
    )  # fmt: skip
    require(
        any(isinstance(method, Distillation) for method in methods), "recover.engine", DEEPSPEED,
        f"'torch': {', '.join(config.recover.methods)} of recover.methods work in one process; add logits, router or "
        "labels",
    )  # fmt: skip


def _check_trainable(config: RecoveryConfig, full: ModelSource) -> None:
    """Raise ConfigError for a number format that workers do not train in."""
    from moe_evo.models.placement import weights_dtype

    dtype = str(weights_dtype(config.model, full.transformers_config)).removeprefix("torch.")
    require(
        dtype in ("float32", "bfloat16"), "model.dtype", dtype,
        "bfloat16 or float32 for recover.engine deepspeed: gradients in float16 would be rounded to 0",
    )  # fmt: skip


def _check_rank(recover: RecoverConfig, full: ModelSource) -> None:
    """Raise ConfigError where adapters would be larger than the experts that they stand in for."""
    hidden = full.transformers_config.get_text_config().hidden_size
    width = full.family.expert_width(full.transformers_config)
    most = (3 * hidden * width - 1) // (2 * hidden + 3 * width)
    require(
        "adapters" not in recover.train or recover.rank <= most, "recover.rank", recover.rank,
        f"at most {most}: with more, adapters have more numbers than the experts of this model, {hidden} x {width}",
    )  # fmt: skip


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run, and not of a checkpoint."""
    return (path / "config.yaml").is_file() and not (path / "config.json").is_file()


def small_model(model: ModelConfig, path: Path) -> ModelConfig:
    """As this process loads it."""
    return replace(in_one_piece(model), path=str(path), revision=None)


def in_one_piece(model: ModelConfig) -> ModelConfig:
    """The same model on one device."""
    return replace(model, sharding="single", offload="none", offload_folder=None)


def _check_alike(given: RecoveryInput, small: ModelSource) -> None:
    """Raise ConfigError where one model cannot learn from the other, as their tokens or layers differ."""
    full = given.full
    vocabularies = [one.transformers_config.get_text_config().vocab_size for one in (full, small)]
    tokenizers = [None if one.tokenizer is None else one.tokenizer.get_vocab() for one in (full, small)]
    if vocabularies[0] != vocabularies[1] or tokenizers[0] != tokenizers[1]:
        raise ConfigError(
            f"model.path: got {full.config.path}, whose vocabulary is not that of {small.config.path}; give the full "
            "model that it was made of"
        )
    layers = [
        (one.shape.decoder_layers, one.transformers_config.get_text_config().hidden_size) for one in (full, small)
    ]
    if given.needs_blocks and layers[0] != layers[1]:
        raise ConfigError(
            f"recover.methods: got {', '.join(given.config.recover.methods)}, which compare layers, but those of "
            f"{small.config.path} are not those of {full.config.path}; use logits, or give the full model that it was "
            "made of"
        )


def _check_same_outputs(given: RecoveryInput, small: ModelSource) -> None:
    """Raise ConfigError where methods compare what experts put out, but only one model has a shared expert beside them.

    That is so for a dense model and what was carved of it with a shared expert.
    """
    full = given.full
    widths = [getattr(one.transformers_config, "shared_expert_intermediate_size", 0) for one in (full, small)]
    if given.needs_blocks and full.is_dense and widths[0] != widths[1]:
        raise ConfigError(
            f"recover.methods: got {', '.join(given.config.recover.methods)}, which compare what experts put out, but "
            f"{small.config.path} has a shared expert beside them and {full.config.path} is dense; use logits, or as "
            "the full model the same carved with all experts active (moe-evo carve with --top_k as --num_experts)"
        )


def identity_of(job: RecoveryJob) -> Plain:
    """Everything that the result depends on."""
    small = None if job.winner is None else job.winner.genome.digest
    from moe_evo.models.source import ModelSource

    return {
        "full model": job.full.hash,
        "pruned model": small or ModelSource(small_model(job.config.model, Path(job.pruned))).hash,
        "dtype": job.config.model.dtype,
        "tasks": {one.name: {"data": one.hash, **_options(one.config)} for one in job.data},
        "prompts": None if job.prompts is None else job.prompts.hash,
        "recover": {name: value for name, value in plain_fields(job.recover).items() if name not in _FREE_TO_CHANGE},
    }


def _options(task: TaskConfig) -> Plain:
    """Of a task, without where its files are."""
    return {name: value for name, value in plain_fields(task).items() if name not in ("name", "data", "few_shot")}


def prompts_of(given: RecoveryInput, formats: Sequence[PromptFormat]) -> dict[str, list[Prompt]]:
    """What is learned from, and what chooses the weights; formats: of the tasks."""
    recover = given.config.recover
    of_split = partial(
        split_prompts, given.data, formats, answer_tokens=recover.answer_tokens, labelled=given.learns_labels
    )
    learned = of_split("search") if recover.search_split else []
    if given.prompts is not None:
        learned = learned + file_prompts(given.prompts, formats, recover.answer_tokens)
    return {LEARNED: learned, VALIDATION: of_split("validation")}
