"""`moe-evo prune`, without a search: observe the model once, keep the experts that a criterion ranks first, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe_evo.commands.align import align, aligned_progressively, aligns, save_beside
from moe_evo.commands.shared import Scores, provenance, require_one_process, scored_on_test
from moe_evo.config.check import require
from moe_evo.config.run import ScoringConfig
from moe_evo.criteria.observation_file import observed_names
from moe_evo.errors import ConfigError
from moe_evo.genomes.space import SearchSpace
from moe_evo.records.folder import with_absolute_paths
from moe_evo.report.answers import MethodFacts, PrunedModel
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.data import TaskData, check_tasks
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # not needed for the help texts
    from moe_evo.criteria.observer import Observer
    from moe_evo.criteria.registry import Method
    from moe_evo.evaluation.evaluator import Evaluator
    from moe_evo.genomes.genome import Genome
    from moe_evo.models.experts.alignment_file import Alignment
    from moe_evo.models.export.export import ExportReport
    from moe_evo.models.source import ModelSource

Allocation = Literal["uniform", "global"]


@dataclass(frozen=True)
class PruneOptions:
    """How many experts to keep, by which one-shot method.

    num_kept: experts of each MoE layer. observations: file with statistics of the model on tasks; those that it lacks
    are computed and added. allocation: 'global' lets layers keep different numbers of experts, `num_kept` on average.
    blend: weight of each task. progressive: observe each layer with the layers before it already pruned. base_model:
    the checkpoint that this one was tuned from, for methods that compare with it. aligned: whether to reorder neurons
    so that those of merged experts correspond; None follows the method's paper.
    """

    method: str
    num_kept: int
    observations: Path | None = None
    allocation: Allocation = "uniform"
    blend: Mapping[str, float] | None = field(default=None, hash=False)
    progressive: bool = False
    base_model: str | None = None
    aligned: bool | None = None

    def check(self) -> None:
        """Raise ConfigError for an unknown method, or for an option that the method does not support."""
        from moe_evo.criteria.registry import CRITERIA, METHODS, Criterion, check_methods

        check_methods("--method", [self.method], has_base_model=self.base_model is not None)
        method = METHODS[self.method]
        criterion = method if isinstance(method, Criterion) else None
        if self.base_model is not None and not (criterion and criterion.needs_base_model):
            needing = ", ".join(name for name, one in CRITERIA.items() if one.needs_base_model)
            raise ConfigError(f"--base_model: {self.method} compares with no other checkpoint; only {needing} do")
        if self.progressive and self.allocation != "uniform":
            raise ConfigError(f"--progressive: got it beside --allocation {self.allocation}, expected only one of them")
        if not hasattr(method, self.way):
            able = [name for name, one in METHODS.items() if hasattr(one, self.way)]
            option = "--progressive" if self.progressive else "--allocation"
            raise ConfigError(f"{option}: {self.method} knows no such way; expected one of {', '.join(able)}")
        if (self.progressive or self.blend) and criterion and not criterion.question.needs_data:
            option = "--progressive" if self.progressive else "--blend"
            raise ConfigError(
                f"{option}: {self.method} looks at weights alone, so that it would change nothing; leave it out"
            )

    @property
    def way(self) -> str:
        """The name of the method's function that makes the genome."""
        if self.progressive:
            return "progressive_genome"
        return "genome" if self.allocation == "uniform" else "global_genome"


def criteria() -> tuple[MethodFacts, ...]:
    """Name, description and source of every one-shot method."""
    from moe_evo.criteria.registry import METHODS

    methods = {name: METHODS[name] for name in METHODS.names()}
    return tuple(MethodFacts(name, one.description, one.source) for name, one in methods.items())


def prune(
    config: ScoringConfig, options: PruneOptions, target: Path, *, overwrite: bool, tracker: Tracker
) -> PrunedModel:
    """Prune or merge the experts of each layer by a one-shot method, which uses the tasks' search split.

    Scores the full and the smaller model on the test split, and writes the latter's checkpoint into `target`.
    """
    options.check()
    is_aligned = aligns(config.model, options.method, options.aligned)
    require_one_process(config, "prune")
    config = with_absolute_paths(config)
    data = check_tasks(config.tasks)
    _check_blend(options.blend or {}, [one.name for one in data])
    from moe_evo.models.source import ModelSource

    source = ModelSource(config.model)
    space = _space(source, options)
    method = _method(source, options, space, target, overwrite=overwrite)
    task = _Task(config, source, options, data, space, is_aligned, method)
    evaluator = load_evaluator(source, data, config.evaluation, tracker)
    observer = _observer(task, evaluator, tracker)
    genome, alignment = _genome(task, evaluator, observer, tracker)
    tracker.message("scoring the full and the smaller model on the test split")
    scores = scored_on_test(evaluator, {"full": None, "smaller": genome}, data)
    tracker.message(f"writing and checking {target}")
    report, files = _write(task, evaluator, genome, alignment, scores, target, overwrite=overwrite)
    return PrunedModel(
        report=report,
        genome=files["genome"],
        alignment=files.get("alignment"),
        method=options.method,
        aligned=is_aligned,
        kept=genome.kept,
        made_of=tuple(tuple(map(tuple, layer.members)) for layer in genome.layers),
        scores=scores,
        dynamic_skipping_beta=_skipping_thresholds(task, observer),
    )


@dataclass(frozen=True)
class _Task:
    """The input of one `prune`, after all checks."""

    config: ScoringConfig
    source: ModelSource
    options: PruneOptions
    data: Sequence[TaskData]
    space: SearchSpace
    is_aligned: bool
    method: Method


def _space(source: ModelSource, options: PruneOptions) -> SearchSpace:
    """The genomes that keep so many experts; raises ConfigError where the model has too few or needs more."""
    from moe_evo.models.load import resolve_device

    resolve_device(source.config.device)
    shape = source.shape
    fewest, most = max(shape.top_k), min(shape.num_experts) - 1
    require(
        fewest <= options.num_kept <= most, "--num_kept", options.num_kept,
        f"{fewest} (active a token) to {most}, one less than all",
    )  # fmt: skip
    return SearchSpace.build(shape, num_kept=options.num_kept)


def _method(source: ModelSource, options: PruneOptions, space: SearchSpace, target: Path, *, overwrite: bool) -> Method:
    """The method; raises where anything is wrong with the input."""
    from moe_evo.criteria.observation_file import load_observations
    from moe_evo.criteria.pruning import check_global
    from moe_evo.criteria.registry import METHODS, Criterion, check_methods
    from moe_evo.models.export.target_folder import check_target
    from moe_evo.models.router_rows import check_comparable
    from moe_evo.models.source import ModelSource

    check_target(target.absolute(), Path(source.config.path), overwrite=overwrite)
    known_as = source.hash  # reads the alignment's file, so that an invalid one is refused before a model is loaded
    method = METHODS[options.method]
    if options.allocation == "global":
        check_global(space)
    check_methods("--method", [options.method], space, has_base_model=options.base_model is not None)
    if options.base_model is not None and isinstance(method, Criterion):
        base = ModelSource(replace(source.config, path=options.base_model, revision=None, alignment=None))
        check_comparable(source, base)
        method = method.comparing_with(base.config, base.hash, source.config)
    if options.observations is not None:  # an invalid file is refused before a model is loaded
        if options.observations.exists():
            load_observations(options.observations, known_as)
        elif not options.observations.absolute().parent.is_dir():
            raise ConfigError(f"--observations: got {options.observations}, expected a file in a folder that exists")
    return method


def _observer(task: _Task, evaluator: Evaluator, tracker: Tracker) -> Observer:
    from moe_evo.criteria.observer import Observer
    from moe_evo.evaluation.local_pool import LocalPool

    names = observed_names(task.config.model, task.data)
    if task.is_aligned and task.options.progressive:
        # layers behind an aligned merge get other inputs, so their observations have a name of their own
        names = {name: f"{known}+aligned" for name, known in names.items()}
    file, blend = task.options.observations, task.options.blend
    return Observer(LocalPool(evaluator).ask, names, task.source.hash, file, tracker.message, blend or {})


def _genome(task: _Task, evaluator: Evaluator, observer: Observer, tracker: Tracker) -> tuple[Genome, Alignment | None]:
    """The method's genome, and the order of neurons that it was made for; None where they were not reordered."""
    from moe_evo.criteria.merges import Merge

    if task.is_aligned and task.options.progressive:
        assert isinstance(task.method, Merge)
        return aligned_progressively(evaluator, task.method, observer, task.space, task.source.hash, tracker)
    make: Callable[[Observer, SearchSpace], Genome] = getattr(task.method, task.options.way)
    genome = make(observer, task.space)
    return genome, align(evaluator, genome, task.source.hash, tracker) if task.is_aligned else None


def _write(
    task: _Task, evaluator: Evaluator, genome: Genome, alignment: Alignment | None, scores: Scores, target: Path,
    *, overwrite: bool,
) -> tuple[ExportReport, dict[str, str]]:  # fmt: skip
    """Write the checkpoint, and beside it the files of `save_beside`; returns the report and those files."""
    from moe_evo.models.export.export import export_checkpoint

    model = task.config.model
    how = {
        "search": f"none: one-shot {task.method.title} on the search split",
        "genome": f"digest {genome.digest}",
        **({} if alignment is None else {"alignment": f"digest {alignment.digest}"}),
    }
    told = provenance(task.config, task.source.hash, task.data, how, scores)
    report = export_checkpoint(evaluator.model, genome, target, overwrite=overwrite, provenance=told)
    digest = task.source.alignment_digest if alignment is None else alignment.digest
    made_by = {"method": task.options.method, "router": model.router, "alignment": digest}
    return report, save_beside(report.folder, genome, alignment or model.alignment, made_by)


def _skipping_thresholds(task: _Task, observer: Observer) -> tuple[float, ...] | None:
    """For NAEE, the threshold of its dynamic skipping in each layer; None for other methods, or if top_k is not 2."""
    from moe_evo.criteria.naee import Naee, median_gate_ratio
    from moe_evo.criteria.questions import GateRatios

    if not isinstance(task.method, Naee) or set(task.space.top_k) != {2}:
        return None
    return tuple(median_gate_ratio(layer) for layer in observer.about(GateRatios()).layers)


def _check_blend(blend: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Raise ConfigError unless every weight is that of a task and 0 or more, and one task's is positive."""
    for name, times in blend.items():
        if name not in tasks:
            raise ConfigError(f"--blend: got task {name!r}, expected one of {', '.join(tasks)}")
        if not 0 <= times < float("inf"):
            raise ConfigError(f"--blend: got {name}: {times:g}, expected 0 or more")
    if not any(blend.get(name, 1.0) for name in tasks):
        raise ConfigError(f"--blend: got 0 for {', '.join(tasks)}, expected more for one task at least")
