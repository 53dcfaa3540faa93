"""`moe-evo compress`: the experts of a checkpoint made sparse, or of low rank, into another stock checkpoint.

The weights are written as dense matrices, because no stock architecture stores sparse or low-rank experts. The
report gives the size that the compressed experts would have, and the software that would run them at that size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.commands.shared import provenance, require_one_process, scored_on_test
from moe_evo.config.check import require
from moe_evo.config.run import ScoringConfig
from moe_evo.errors import ConfigError
from moe_evo.plain import Plain
from moe_evo.records.folder import with_absolute_paths
from moe_evo.report.answers import CompressedModel
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.compress.compression import CompressedExperts, Compression
    from moe_evo.models.export.model_card import Treatment
    from moe_evo.models.size.size import ModelSize

_OPTIONS = {"moe_pruner": ("sparsity", "pattern"), "mc_smoe": ("rank", "columns")}
"""The options that each method takes."""

METHODS = tuple(_OPTIONS)

_SPARSITY, _COLUMNS = 0.5, 0.1


@dataclass(frozen=True)
class CompressOptions:
    """How to compress the experts; None is the method's default. An option of the other method must be None.

    sparsity: share of the weights in each row that are set to zero. pattern: 'N:M' in place of sparsity. rank: a
    whole number, or a share of the full rank. columns: share of the residual's columns that are kept.
    """

    method: str
    sparsity: float | None = None
    pattern: str | None = None
    rank: int | float | None = None
    columns: float | None = None

    def __post_init__(self) -> None:
        require(self.method in METHODS, "--method", self.method, f"one of {', '.join(METHODS)}")
        for one in fields(self)[1:]:
            value = getattr(self, one.name)
            is_read = one.name in _OPTIONS[self.method]
            require(is_read or value is None, f"--{one.name}", value, f"nothing: {self.method} does not read it")
        if self.pattern is not None:
            require(self.sparsity is None, "--sparsity", self.sparsity, "nothing beside --pattern, which sets it")
        sparsity, rank, columns = self.sparsity, self.rank, self.columns
        require(sparsity is None or 0 < sparsity < 1, "--sparsity", sparsity, "a share between 0 and 1")
        require(columns is None or 0 <= columns <= 1, "--columns", columns, "a share from 0 to 1")
        if self.method == "mc_smoe":
            is_rank = rank is not None and (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1)
            require(is_rank, "--rank", rank, "a whole number from 1 on, or a share of the full rank such as 0.25")

    def compression(self) -> Compression:
        """The method with its options; raises ConfigError for an invalid pattern."""
        from moe_evo.models.compress.low_rank import LowRankPlusColumns
        from moe_evo.models.compress.sparsity import Pattern, RouterWeightedPruning

        if self.method == "mc_smoe":
            assert self.rank is not None, "checked when it was made"
            return LowRankPlusColumns(self.rank, _COLUMNS if self.columns is None else self.columns)
        if self.pattern is not None:
            pattern = Pattern.parse(self.pattern)
            return RouterWeightedPruning(1 - pattern.kept / pattern.group, pattern)
        return RouterWeightedPruning(_SPARSITY if self.sparsity is None else self.sparsity)


def compress(
    config: ScoringConfig, options: CompressOptions, target: Path, *, overwrite: bool, tracker: Tracker
) -> CompressedModel:
    """Write the checkpoint `config.model` with compressed experts, and score it on the test split before and after.

    moe_pruner reads the tasks' search split; mc_smoe reads only weights. Returns the export's report with the scores,
    the reconstruction error of each layer, and the size of the experts.
    """
    require_one_process(config, "compress")
    sharding = config.model.sharding
    require(sharding == "single", "model.sharding", sharding, "'single': whole matrices are compressed")
    config = with_absolute_paths(config)
    data = check_tasks(config.tasks)
    from moe_evo.models.compress.compression import experts_replaced
    from moe_evo.models.export.export import export_checkpoint
    from moe_evo.models.export.target_folder import check_target
    from moe_evo.models.load import resolve_device
    from moe_evo.models.size.size import read_size
    from moe_evo.models.source import ModelSource

    source, compression = ModelSource(config.model), options.compression()
    resolve_device(config.model.device)
    _check_fits(options, read_size(source, 1))
    check_target(target.absolute(), Path(config.model.path), overwrite=overwrite)
    known_as = source.hash  # reads the alignment's file, so that an invalid one is refused before a model is loaded
    evaluator = load_evaluator(source, data, config.evaluation, tracker)
    experts = _compressed(evaluator, compression, tracker)
    tracker.message("scoring the model on the test split, as it was and as it is")
    scores = scored_on_test(evaluator, {"original": None}, data)
    batch_tokens = evaluator.batch_tokens
    with experts_replaced(evaluator.model, experts.layers):
        if evaluator.states is not None:
            evaluator.states.clear()  # these hidden states were computed with the uncompressed experts
        scores |= scored_on_test(evaluator, {"compressed": None}, data)
        _check_references(evaluator, batch_tokens)
        tracker.message(f"writing and checking {target}")
        told = provenance(config, known_as, data, _how(options, compression, experts), scores)
        report = export_checkpoint(
            evaluator.model,
            evaluator.model.shape.identity(),
            target,
            overwrite=overwrite,
            provenance=told,
            treatment=_treatment(options, compression),
        )
    return CompressedModel(
        report=report,
        method=options.method,
        description=compression.description,
        needs=compression.needs,
        scores=scores,
        layers=experts.changes,
        experts=experts.size,
    )


def _check_fits(options: CompressOptions, size: ModelSize) -> None:
    """Raise ConfigError where a rank or pattern does not fit the experts' matrices."""
    from moe_evo.models.compress.sparsity import Pattern

    hidden, inner = next(one.shape[1:] for one in size.weights if one.is_expert and one.name == "down_proj")
    if isinstance(options.rank, int):
        full = min(hidden, inner)
        require(options.rank <= full, "--rank", options.rank, f"at most {full}, the full rank of this model's experts")
    if options.pattern is not None:
        group = Pattern.parse(options.pattern).group
        fits = hidden % group == 0 and inner % group == 0
        require(fits, "--pattern", options.pattern, f"groups that divide rows of {hidden} and of {inner} weights")


def _compressed(evaluator: Evaluator, compression: Compression, tracker: Tracker) -> CompressedExperts:
    from moe_evo.criteria.input_norms import observe_input_norms
    from moe_evo.models.compress.compression import LayerChange, compressed_experts

    model = evaluator.model
    norms = None
    if compression.needs_norms:
        tracker.message("observing on the search split what enters the experts")
        norms = observe_input_norms(evaluator)

    def done(layer: int, change: LayerChange) -> None:
        of = f"MoE layer {layer} ({layer + 1} of {len(model.layers)})"
        tracker.message(f"{of}: relative error {change.relative_error:.3f}")

    return compressed_experts(model, compression, norms, done)


def _check_references(evaluator: Evaluator, batch_tokens: int) -> None:
    """Raise ConfigError where a task's reference outputs of the full model were lost to a smaller batch size."""
    if evaluator.batch_tokens != batch_tokens and any(task.needs_reference for task in evaluator.tasks):
        raise ConfigError(
            f"evaluation.batch_tokens: batches of {batch_tokens} tokens did not fit in memory twice, and what the full "
            f"model says of them is gone; use --evaluation.batch_tokens {evaluator.batch_tokens}"
        )


def _how(options: CompressOptions, compression: Compression, experts: CompressedExperts) -> Plain:
    """The method and its options, for the model card."""
    size = experts.size
    given = {name: value for name, value in asdict(options).items() if value is not None}
    return {
        "compression": {**given, "does": compression.description},
        "weights of experts": f"{size.num_nonzero:,} of {size.num_weights:,} are not zero",
        "bytes of experts": {"dense, as here": f"{size.dense_bytes:,}", **{
            way: f"{packed:,}" for way, packed in size.packed_bytes.items()
        }},
        "less memory needs": compression.needs,
    }  # fmt: skip


def _treatment(options: CompressOptions, compression: Compression) -> Treatment:
    from moe_evo.models.export.model_card import Treatment

    is_low_rank = options.method == "mc_smoe"
    title = "experts of low rank" if is_low_rank else "sparse experts"
    return Treatment(title, compression.description, "low-rank-experts" if is_low_rank else "sparse-experts")
