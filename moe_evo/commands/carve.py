"""`moe-evo carve`: an MoE made of a dense model, as a stock checkpoint, without training.

The dense model is loaded as an MoE of one expert, which computes the same, so it is scored and watched as every other
model is. What is written is compared with it twice: with all experts active before, and as it is after reloading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_evo.commands.shared import Scores, provenance, require_one_process, scored_on_test
from moe_evo.config.check import require
from moe_evo.config.run import ScoringConfig
from moe_evo.errors import ConfigError, ExportError
from moe_evo.records.folder import with_absolute_paths
from moe_evo.recovery.prompts import FilePrompts, file_prompts, read_prompts, split_prompts
from moe_evo.report.answers import CarvedModel
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.data import TaskData, check_tasks
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.carve.build import Expansion
    from moe_evo.models.carve.carve import CarvedLayer
    from moe_evo.models.carve.formats import Layout
    from moe_evo.models.export.export import ExportReport
    from moe_evo.models.export.model_card import Treatment
    from moe_evo.models.source import ModelSource
    from moe_evo.models.view import MoEModel
    from moe_evo.tasks.task import Task

Method = Literal["cluster", "upcycle"]

_OF_CLUSTERS = ("shared_size", "router", "prompts", "profile_tokens")
"""Options that only the method 'cluster' reads."""

_PROFILE_TOKENS = 8192

_ALIGNMENT = 8  # neurons: the library's grouped matrix products take rows of a multiple of 16 bytes


@dataclass(frozen=True)
class CarveOptions:
    """How to make experts; None is the default, and what options of 'cluster' must be for 'upcycle'.

    top_k: default half of the experts. shared_size: neurons of the shared expert, default none. prompts: file of texts
    that neurons are watched on, default the tasks' search split. profile_tokens: most tokens of them. seed: of all
    random choices.
    """

    method: Method = "cluster"
    num_experts: int = 8
    top_k: int | None = None
    shared_size: int | None = None
    router: Literal["least_squares", "centroid"] | None = None
    prompts: str | None = None
    profile_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.method in ("cluster", "upcycle"), "--method", self.method, "'cluster' or 'upcycle'")
        require(self.num_experts >= 2, "--num_experts", self.num_experts, "2 or more")
        require(self.seed >= 0, "--seed", self.seed, "0 or more")
        most = self.num_experts
        require(
            self.top_k is None or 1 <= self.top_k <= most, "--top_k", self.top_k, f"1 to {most}, as many as there are"
        )
        require(
            self.router in (None, "least_squares", "centroid"), "--router", self.router, "least_squares or centroid"
        )
        for name in _OF_CLUSTERS:
            value = getattr(self, name)
            is_read = self.method == "cluster" or value is None
            require(is_read, f"--{name}", value, "nothing: upcycle copies whole FFNs")
        tokens = self.profile_tokens
        require(tokens is None or tokens >= 1, "--profile_tokens", tokens, "1 or more")

    def layout(self, inner_size: int) -> Layout:
        """The MoE layers made of FFNs of so many neurons; raises ConfigError where they cannot be shared out."""
        from moe_evo.models.carve.formats import Layout

        num_experts, shared = self.num_experts, self.shared_size or 0
        top_k = (num_experts + 1) // 2 if self.top_k is None else self.top_k
        if self.method == "upcycle":
            return Layout(num_experts, top_k, inner_size)
        require(0 <= shared <= inner_size - num_experts, "--shared_size", shared, f"0 to {inner_size - num_experts}")
        step = num_experts * _ALIGNMENT
        rest = (inner_size - shared) % step
        if rest:
            sizes = [size for size in (shared + rest - step, shared + rest) if 0 <= size <= inner_size - step]
            advice = f"use --shared_size {' or '.join(map(str, sizes))}, or " if sizes else "use "
            raise ConfigError(
                f"--num_experts: got {num_experts} for the {inner_size - shared} neurons of an FFN"
                f"{' beside the shared expert' if shared else ''}, expected experts of equal size, a multiple of "
                f"{_ALIGNMENT} neurons; {advice}another number"
            )
        return Layout(num_experts, top_k, (inner_size - shared) // num_experts, shared)


def carve(
    config: ScoringConfig, options: CarveOptions, target: Path, *, overwrite: bool, tracker: Tracker
) -> CarvedModel:
    """Write an MoE made of the dense model `config.model` into `target`, and score both on the test split.

    Raises ExportError where the MoE with all its experts active does not compute what the dense model computes.
    """
    job = _checked(config, options, target, overwrite=overwrite)
    evaluator = load_evaluator(job.source, job.data, job.config.evaluation, tracker, job.tasks)
    tracker.message("scoring the dense model on the test split")
    scores = scored_on_test(evaluator, {"dense": None}, job.data)
    expansions, layers = _expansions(job, evaluator, tracker)
    difference = _check_all_active(job, evaluator.model, expansions)
    carved = _carved_evaluator(job, evaluator, expansions)
    tracker.message("scoring the carved model on the test split")
    scores |= scored_on_test(carved, {"carved": None}, job.data)
    tracker.message(f"writing and checking {target}")
    report = _write(job, carved, scores, target, overwrite=overwrite)
    return CarvedModel(
        report=report,
        method=options.method,
        family=carved.model.shape.family,
        num_experts=job.layout.num_experts,
        top_k=job.layout.top_k,
        expert_size=job.layout.width,
        shared_size=job.layout.shared_size,
        active_parameters=_active_parameters(report.folder),
        all_active_difference=difference,
        layers=layers,
        scores=scores,
    )


@dataclass(frozen=True)
class _Job:
    """The input of one `carve`, after all checks."""

    config: ScoringConfig
    options: CarveOptions
    source: ModelSource
    layout: Layout
    data: tuple[TaskData, ...]
    tasks: list[Task]
    prompts: FilePrompts | None

    def expanded(self, dense: MoEModel, expansions: Sequence[Expansion], top_k: int) -> Any:
        """The stock model with so many active experts."""
        from moe_evo.models.carve.build import Factors, expanded
        from moe_evo.models.carve.formats import target_config

        layout = replace(self.layout, top_k=top_k)
        factors = Factors() if self.options.method == "upcycle" else Factors.of_parts(layout)
        return expanded(dense, expansions, target_config(self.source.stored_config, layout), factors)


def _checked(config: ScoringConfig, options: CarveOptions, target: Path, *, overwrite: bool) -> _Job:
    """Raises where anything is wrong with the input; loads no weights."""
    require_one_process(config, "carve")
    sharding = config.model.sharding
    require(sharding == "single", "model.sharding", sharding, "'single': whole matrices are shared out")
    require(
        config.model.alignment is None, "model.alignment", config.model.alignment, "none: a dense model has no experts"
    )
    config = with_absolute_paths(config)
    data = check_tasks(config.tasks)
    prompts = None if options.prompts is None else read_prompts(options.prompts, data, "--prompts")
    from moe_evo.models.carve.formats import target_config
    from moe_evo.models.export.target_folder import check_target
    from moe_evo.models.load import resolve_device
    from moe_evo.models.source import ModelSource
    from moe_evo.tasks.registry import build_task

    source = ModelSource(config.model, "dense")
    resolve_device(config.model.device)
    check_target(target.absolute(), Path(config.model.path), overwrite=overwrite)
    layout = options.layout(source.stored_config.intermediate_size)
    tasks = [build_task(one, source.tokenizer, config.evaluation.batch_tokens) for one in data]
    for task in tasks:
        require(
            not task.needs_reference, f"tasks ({task.name})", "a task that compares with the model itself",
            "one that scores answers or texts, as two models are compared",
        )  # fmt: skip
    target_config(source.stored_config, layout)  # refuses what the format lacks
    return _Job(config, options, source, layout, data, tasks, prompts)


def _expansions(job: _Job, evaluator: Evaluator, tracker: Tracker) -> tuple[list[Expansion], tuple[CarvedLayer, ...]]:
    """What every FFN becomes, and how far that is from it."""
    import torch

    from moe_evo.models.carve.build import ffn_of
    from moe_evo.models.carve.carve import carved, upcycled

    model, options = evaluator.model, job.options
    if options.method == "upcycle":
        generator = torch.Generator().manual_seed(options.seed)
        scale = job.source.stored_config.initializer_range
        return [upcycled(ffn_of(one), options.num_experts, scale, generator) for one in model.layers], ()
    inputs = _profile(job, evaluator, tracker)
    tracker.stage("carving", len(model.layers), unit="layer")
    expansions, facts = [], []
    for layer, hidden in zip(model.layers, inputs, strict=True):
        rng = np.random.default_rng([options.seed, 1 + layer.number])
        router = options.router or "least_squares"
        activation: Any = layer.experts.act_fn
        made, fact = carved(ffn_of(layer), hidden.to(model.device), activation, job.layout, router, rng)
        expansions.append(made)
        facts.append(fact)
        tracker.advanced(1, f"relative error {fact.relative_error:.3f}")
    return expansions, tuple(facts)


def _profile(job: _Job, evaluator: Evaluator, tracker: Tracker) -> list[Any]:
    """What enters every FFN at the tokens of the prompts, (N, H) a layer."""
    from moe_evo.models.carve.profile import drawn_rows, ffn_inputs
    from moe_evo.tasks.prompt import PromptFormat

    formats = [PromptFormat(one.config, one, evaluator.model.tokenizer) for one in job.data]
    if job.prompts is None:
        prompts = split_prompts(job.data, formats, "search", 0, labelled=True)
    else:
        prompts = file_prompts(job.prompts, formats, 0)
    tokens = [one.tokens + one.answer for one in prompts]
    most = job.options.profile_tokens or _PROFILE_TOKENS
    rows = drawn_rows(tokens, most, np.random.default_rng([job.options.seed, 0]))

    def watch() -> list[Any]:
        tracker.stage("watching neurons", len(rows), unit="prompt")
        return ffn_inputs(evaluator.model, rows, evaluator.batch_tokens, tracker.advanced)

    return evaluator.within_memory(watch)


def _check_all_active(job: _Job, dense: MoEModel, expansions: Sequence[Expansion]) -> float:
    """The largest difference of a logit from the dense model's with all experts active; raises ExportError."""
    import torch

    from moe_evo.models.agreement import TOLERANCES, relative_difference

    whole = job.expanded(dense, expansions, job.layout.num_experts)
    tokens = dense.random_tokens()
    with torch.inference_mode():
        got, expected = (one(input_ids=tokens, use_cache=False).logits for one in (whole, dense.language_model))
    difference, most = relative_difference(got, expected), TOLERANCES[dense.dtype]
    if not difference <= most:
        raise ExportError(
            f"{job.config.model.path}: with all experts active the carved model differs from the dense one by "
            f"{difference:.1e} of the largest logit, expected at most {most:.0e}; nothing was written"
        )
    return float((got.float() - expected.float()).abs().max())


def _carved_evaluator(job: _Job, evaluator: Evaluator, expansions: Sequence[Expansion]) -> Evaluator:
    """The carved model, and the tasks to score it on."""
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.models.view import MoEModel

    language_model = job.expanded(evaluator.model, expansions, job.layout.top_k)
    carved = MoEModel(language_model, evaluator.model.tokenizer)
    return Evaluator(carved, evaluator.tasks, job.config.evaluation)


def _write(job: _Job, carved: Evaluator, scores: Scores, target: Path, *, overwrite: bool) -> ExportReport:
    from moe_evo.models.export.export import export_checkpoint
    from moe_evo.models.size.size import read_size

    how = {"carving": {name: value for name, value in asdict(job.options).items() if value is not None}}
    report = export_checkpoint(
        carved.model,
        carved.model.shape.identity(),
        target,
        overwrite=overwrite,
        provenance=provenance(job.config, job.source.hash, job.data, how, scores),
        treatment=_treatment(job),
    )
    dense = read_size(job.source, 1)
    return replace(report, parameters_before=dense.parameters, bytes_before=dense.size)


def _treatment(job: _Job) -> Treatment:
    from moe_evo.models.export.model_card import Treatment

    if job.options.method == "upcycle":
        return Treatment(
            "copied experts", "every expert is a copy of the dense model's FFN (sparse upcycling)", "upcycled"
        )
    made = f"the {job.source.stored_config.intermediate_size} neurons of each FFN were shared out among experts"
    shared = f", {job.layout.shared_size} of them in a shared one" if job.layout.shared_size else ""
    return Treatment("carved experts", f"{made}{shared}; all experts together are the dense model", "carved")


def _active_parameters(folder: Path) -> int:
    from moe_evo.config.model import ModelConfig
    from moe_evo.models.size.size import read_size
    from moe_evo.models.source import ModelSource

    return read_size(ModelSource(ModelConfig(path=str(folder))), 1).active_parameters
