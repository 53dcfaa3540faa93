"""Pruning without a search: observe the model once, keep what a criterion finds best, compare, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_evo.commands.align import align, aligned_progressively, aligns, save_beside
from moe_evo.commands.shared import provenance, require_one_process, scored_on_test
from moe_evo.config.check import require
from moe_evo.config.run import ScoringConfig
from moe_evo.criteria.observation_file import observed_names
from moe_evo.errors import ConfigError
from moe_evo.genomes.space import SearchSpace
from moe_evo.records.folder import with_absolute_paths
from moe_evo.runs.open_pool import load_evaluator
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.base import Tracker

if TYPE_CHECKING:  # not needed for the help texts
    from moe_evo.criteria.observer import Observer
    from moe_evo.genomes.genome import Genome

Allocation = Literal["uniform", "global"]


def criteria() -> list[dict[str, str]]:
    """Name, description and source of every one-shot method."""
    from moe_evo.criteria.registry import METHODS

    methods = {name: METHODS[name] for name in METHODS.names()}
    return [{"name": name, "description": one.description, "source": one.source} for name, one in methods.items()]


def prune(
    config: ScoringConfig,
    method: str,
    num_kept: int,
    target: Path,
    observations: Path | None,
    allocation: Allocation = "uniform",
    *,
    blend: Mapping[str, float] | None = None,
    progressive: bool = False,
    base_model: str | None = None,
    aligned: bool | None = None,
    overwrite: bool,
    tracker: Tracker,
) -> dict[str, Any]:
    """Keep or make `num_kept` experts of each layer by a one-shot method, on the tasks' search split.

    target: folder of the checkpoint. observations: file of what the model does on tasks, from which is read
    what is there, and to which is added what is not. allocation: 'global' lets layers differ in how many they
    keep, `num_kept` on average. blend: how many times each task counts. progressive: each layer is scored
    behind the pruned ones before it. base_model: the checkpoint that this one was tuned from, for methods that
    compare with it. aligned: whether neurons are reordered so that merged experts match; None is as the
    method's paper does. Answers the export's report with what is kept, and the scores of the full and the
    smaller model on the test split; for NAEE also the threshold of its dynamic skipping in each layer, which no
    checkpoint holds.
    """
    from moe_evo.criteria.merges import Merge
    from moe_evo.criteria.naee import Naee, median_gate_ratio
    from moe_evo.criteria.observation_file import load_observations
    from moe_evo.criteria.observer import Observer
    from moe_evo.criteria.pruning import check_global
    from moe_evo.criteria.questions import GateRatios
    from moe_evo.criteria.registry import CRITERIA, METHODS, Criterion, check_methods
    from moe_evo.evaluation.local_pool import LocalPool

    check_methods("--method", [method], has_base_model=base_model is not None)
    chosen = METHODS[method]
    if base_model is not None and not (isinstance(chosen, Criterion) and chosen.needs_base_model):
        needing = ", ".join(name for name, one in CRITERIA.items() if one.needs_base_model)
        raise ConfigError(f"--base_model: {method} compares with no other checkpoint; only {needing} do")
    _check_way(method, _way(allocation, progressive=progressive))
    if (progressive or blend) and isinstance(chosen, Criterion) and not chosen.question.needs_data:
        option = "--progressive" if progressive else "--blend"
        raise ConfigError(f"{option}: {method} looks at weights alone, so that it would change nothing; leave it out")
    is_aligned = aligns(config.model, method, aligned)
    require_one_process(config, "prune")
    config = with_absolute_paths(config)
    data = check_tasks(config.tasks)
    _check_blend(blend or {}, [one.name for one in data])
    from moe_evo.models.export.export import export_checkpoint
    from moe_evo.models.export.target_folder import check_target
    from moe_evo.models.load import alignment_digest, model_hash, read_shape, resolve_device
    from moe_evo.models.router_rows import check_comparable

    resolve_device(config.model.device)
    shape = read_shape(config.model)
    fewest, most = max(shape.top_k), min(shape.num_experts) - 1
    require(
        fewest <= num_kept <= most, "--num_kept", num_kept, f"{fewest} (active a token) to {most}, one less than all"
    )
    space = SearchSpace.build(shape, num_kept=num_kept)
    check_target(target.absolute(), Path(config.model.path), overwrite=overwrite)
    known_as = model_hash(config.model)
    if allocation == "global":
        check_global(space)
    check_methods("--method", [method], space, has_base_model=base_model is not None)
    if base_model is not None and isinstance(chosen, Criterion):
        base = replace(config.model, path=base_model, revision=None, alignment=None)
        check_comparable(config.model, base)
        chosen = chosen.comparing_with(base, model_hash(base), config.model)
    if observations is not None:  # or say what is wrong, before a model is loaded
        if observations.exists():
            load_observations(observations, known_as)
        elif not observations.absolute().parent.is_dir():
            raise ConfigError(f"--observations: got {observations}, expected a file in a folder that exists")
    evaluator = load_evaluator(config.model, data, config.evaluation, tracker)
    names = observed_names(config.model, data)
    if is_aligned and progressive:  # what lies behind an aligned merge is another answer to the same question
        names = {name: f"{known}+aligned" for name, known in names.items()}
    observer = Observer(LocalPool(evaluator).ask, names, known_as, observations, tracker.message, blend or {})
    alignment = None
    if is_aligned and progressive:
        assert isinstance(chosen, Merge)
        genome, alignment = aligned_progressively(evaluator, chosen, observer, space, known_as, tracker)
    else:
        make: Callable[[Observer, SearchSpace], Genome] = getattr(chosen, _way(allocation, progressive=progressive))
        genome = make(observer, space)
        alignment = align(evaluator, genome, known_as, tracker) if is_aligned else None
    told_more = {}
    if isinstance(chosen, Naee) and set(space.top_k) == {2}:
        told_more["dynamic_skipping_beta"] = [median_gate_ratio(layer) for layer in observer.about(GateRatios()).layers]
    tracker.message("scoring the full and the smaller model on the test split")
    scores = scored_on_test(evaluator, {"full": None, "smaller": genome}, data)
    tracker.message(f"writing and checking {target}")
    how = {
        "search": f"none: one-shot {chosen.title} on the search split",
        "genome": f"digest {genome.digest}",
        **({} if alignment is None else {"alignment": f"digest {alignment.digest}"}),
    }
    told = provenance(config, known_as, data, how, scores)
    report = export_checkpoint(evaluator.model, genome, target, overwrite=overwrite, provenance=told)
    digest = alignment_digest(config.model) if alignment is None else alignment.digest
    made_by = {"method": method, "router": config.model.router, "alignment": digest}
    files = save_beside(report.folder, genome, alignment or config.model.alignment, made_by)
    named = {
        "folder": str(report.folder),
        **files,
        "method": method,
        "aligned": is_aligned,
        "kept": [list(layer) for layer in genome.kept],
        "made_of": [layer.members for layer in genome.layers],
        "scores": scores,
    }
    return {**asdict(report), **named, **told_more}


def _check_blend(blend: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Raise ConfigError unless every task counts some of the time."""
    for name, times in blend.items():
        if name not in tasks:
            raise ConfigError(f"--blend: got task {name!r}, expected one of {', '.join(tasks)}")
        if not 0 <= times < float("inf"):
            raise ConfigError(f"--blend: got {name}: {times:g}, expected 0 or more")
    if not any(blend.get(name, 1.0) for name in tasks):
        raise ConfigError(f"--blend: got 0 for {', '.join(tasks)}, expected more for one task at least")


def _way(allocation: Allocation, *, progressive: bool) -> str:
    """The function of a method that makes the genome; raises ConfigError for options that exclude each other."""
    if progressive and allocation != "uniform":
        raise ConfigError(f"--progressive: got it beside --allocation {allocation}, expected only one of them")
    return "progressive_genome" if progressive else "genome" if allocation == "uniform" else "global_genome"


def _check_way(method: str, way: str) -> None:
    """Raise ConfigError for a method that has no such way to make a genome."""
    from moe_evo.criteria.registry import METHODS

    if not hasattr(METHODS[method], way):
        able = [name for name, one in METHODS.items() if hasattr(one, way)]
        option = "--progressive" if way == "progressive_genome" else "--allocation"
        raise ConfigError(f"{option}: {method} knows no such way; expected one of {', '.join(able)}")
