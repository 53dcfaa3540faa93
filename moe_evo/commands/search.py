"""What each command of `moe-evo` does, as functions from checked config to plain data.

Everything that can be wrong with the input is found before a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_evo.cluster_config import ClusterConfig
from moe_evo.config import ModelConfig, RunConfig, ScoringConfig
from moe_evo.config_file import read_config
from moe_evo.errors import ConfigError, GenomeError, RunError
from moe_evo.evaluators import check_model, open_pool
from moe_evo.genome import Genome
from moe_evo.genome_file import load_genome, save_individual
from moe_evo.journal import MAIN, RANDOM, REFERENCE, Journal
from moe_evo.named_genome import named_genome
from moe_evo.population import EvaluationFailure, Individual, Population
from moe_evo.run_folder import RunFolder, asdict_plain, default_folder, with_absolute_paths
from moe_evo.run_result import failure_facts, gang_facts, run_result
from moe_evo.search.eep import eep_config, schedule
from moe_evo.search_config import SearchConfig
from moe_evo.space import ModelShape, SearchSpace, check_fits
from moe_evo.tasks.data import SPLITS, TaskData, check_tasks, is_share
from moe_evo.tracking.base import Tracker
from moe_evo.tracking.start import tracked, winner_files

if TYPE_CHECKING:  # torch is imported when a model is about to be loaded, not before
    from moe_evo.models.view import MoEModel


_NUM_WIDER = 10
_PROMPT_OPTIONS = (
    "split_shares", "num_search", "num_validation", "num_test", "prefix", "chat_template", "max_length",
    "max_new_tokens",
)  # fmt: skip
"""Options of a task on which its prompts depend, beside its data."""


def build_space(shape: ModelShape, config: SearchConfig) -> SearchSpace:
    """The space that a config asks for on a model of this shape; raises ConfigError."""
    return SearchSpace.build(
        shape,
        num_kept=config.num_kept,
        top_k=config.top_k,
        num_layer_groups=config.num_layer_groups,
        multiple_of=config.multiple_of,
    )


def check_methods_of(config: RunConfig, space: SearchSpace) -> None:
    """Raise ConfigError or ModelError where a run asks for one-shot methods that cannot serve it."""
    from moe_evo.criteria.merges import MERGES
    from moe_evo.criteria.registry import check_methods

    check_methods("selection.baselines", config.selection.baselines, space)
    check_methods("search.init", config.search.init_methods, space)
    shares_genes = any(len(numbers) > 1 for numbers in space.layer_groups)
    for name in config.search.init_methods:
        if shares_genes and name in MERGES:
            raise ConfigError(
                f"search.init: {name} gives each layer experts of its own, but search.num_layer_groups makes layers "
                "share theirs; use a method that prunes, or leave num_layer_groups out"
            )


def search(
    config: RunConfig, tracker: Tracker, model: MoEModel | None = None, cluster: ClusterConfig | None = None
) -> RunFolder:
    """Run a search, or go on with it; afterwards the folder holds result, genomes and pictures.

    model: the one that `config.model` describes, where it is loaded already. cluster: where to evaluate
    this time, in place of `config.cluster`.
    """
    folder = RunFolder(Path(config.folder) if config.folder else default_folder(config))
    config = with_absolute_paths(replace(config, folder=str(folder.path)))
    data = check_tasks(config.tasks)
    from moe_evo.models.loading import model_hash, read_shape, resolve_device

    if config.cluster.address is None:  # else the ranks' devices count, not this machine's
        resolve_device(config.model.device)
    if config.model.path.count("/") == 1 and not Path(config.model.path).exists():
        tracker.message(f"looking for {config.model.path} on Hugging Face")
    space = build_space(read_shape(config.model), config.search)
    check_methods_of(config, space)
    check_model(config)
    with folder.claim(config) as journal:
        known_as = model_hash(config.model)
        new = check_inputs(journal, {"model": known_as, **task_hashes(data)})
        if folder.result.is_file():
            tracker.message(f"{folder.path}: this run is finished")
            return folder
        wider = _wider_prunings(config.search.warm_start, space)
        if wider:
            new |= check_inputs(journal, {"warm_start": " ".join(one.digest for one in wider)})
        journal.set_meta(new)
        with tracked(config, space, journal, folder, tracker) as trackers:
            _run(config, space, journal, folder, data, trackers, model, known_as, wider, cluster or config.cluster)
    return folder


def observed_names(model: ModelConfig, data: Sequence[TaskData]) -> dict[str, str]:
    """Tasks, and under which names observations of them are kept: others where prompts or numbers are others."""
    names = {}
    for one in data:
        prompts = [one.hash, one.kind, *(getattr(one.config, option) for option in _PROMPT_OPTIONS)]
        told = json.dumps([*prompts, model.dtype, model.experts, model.dynamic_skipping])
        names[one.name] = f"{one.name}@{hashlib.sha256(told.encode()).hexdigest()[:32]}"
    return names


def task_hashes(data: Sequence[TaskData]) -> dict[str, str]:
    """What `check_inputs` knows of tasks."""
    return {f"task {one.name}": one.hash for one in data}


def check_inputs(journal: Journal, hashes: Mapping[str, str]) -> dict[str, str]:
    """A run goes on only with the very model and data that it began with; answers what is new to its journal.

    Raises RunError where something has changed.
    """
    new = {}
    for name, found in hashes.items():
        known = journal.meta(f"hash/{name}")
        if known is None:
            new[f"hash/{name}"] = found
        elif known != found:
            raise RunError(
                f"{journal.path.parent}: {name} has changed since this run began; bring back the old files, "
                "or start anew with another --folder"
            )
    return new


def _wider_prunings(warm_start: str | None, space: SearchSpace) -> list[Genome]:
    """The best prunings of the run that a search begins from; raises RunError where it cannot."""
    if warm_start is None:
        return []
    folder = RunFolder.existing(warm_start)
    folder.read_result()  # or say that it is not finished
    with folder.open_journal() as journal:
        prunings = Population().with_outcomes(journal.individuals(MAIN)).prunings
    genomes = [one.genome for one in prunings.ranked[:_NUM_WIDER]]
    for genome in genomes[:1]:
        check_fits(genome, space.shape)
    pairs = zip(genomes[0].num_kept, space.num_kept, strict=True) if genomes else ()
    if not genomes or any(has < wanted for has, wanted in pairs):
        raise RunError(
            f"search.warm_start: {warm_start} has no pruning that keeps at least {list(space.num_kept)} experts; give "
            "a run that kept more"
        )
    return genomes


def _run(
    config: RunConfig,
    space: SearchSpace,
    journal: Journal,
    folder: RunFolder,
    data: Sequence[TaskData],
    tracker: Tracker,
    model: MoEModel | None,
    model_hash: str,
    wider: Sequence[Genome],
    cluster: ClusterConfig,
) -> None:
    from moe_evo.criteria.observer import Observer
    from moe_evo.driver import run_search
    from moe_evo.models.loading import alignment_digest

    if config.search.algorithm != "random" and space.can_prune:
        merging_starts = schedule(eep_config(config.search), config.search.evaluations)[1]
        if merging_starts >= config.search.evaluations:
            tracker.message(f"this budget only prunes: merging would start after {merging_starts} evaluations")
    with open_pool(replace(config, cluster=cluster), data, tracker, space, model) as pool:
        names = observed_names(config.model, data)
        observer = Observer(pool.ask, names, model_hash, folder.observations, tracker.message)
        rows = run_search(
            config, space, journal, pool, tracker, is_share=is_share(data), observer=observer, wider=wider
        )
    result = run_result(config, space.shape, journal, data, rows)
    for row in rows:
        if row.key in folder.winners:
            outcome = journal.outcomes(REFERENCE if row.key == "soup" else MAIN, "search")[row.candidate.number]
            individual = Individual(row.candidate, outcome)
            provenance = {key: result[key] for key in ("model", "router", "tasks")}
            provenance |= {"alignment": alignment_digest(config.model), "row": row.to_json()}
            save_individual(folder.winners[row.key], individual, space, provenance)
    from moe_evo.report.figure import kept_figure, search_figure  # Matplotlib: not before there is something to draw

    search_figure(
        folder.figure,
        journal.individuals(MAIN),
        journal.individuals(RANDOM),
        rows[0].scores["search"].fitness,
        rows[-1].candidate.genome,
    )
    kept_figure(folder.kept_figure, rows[-1].candidate.genome)
    folder.write_result(result)  # last: a run with a result is finished
    tracker.finished(result, winner_files(folder))


def resumed_config(folder: str) -> RunConfig:
    """The config of the run in `folder`, wherever the folder lies now."""
    return replace(read_config(RunFolder.existing(folder).config), folder=folder)


def _with_top_k(genome: Genome, top_k: int) -> Genome:
    return Genome(tuple(replace(layer, top_k=top_k) for layer in genome.layers))


def evaluate(
    config: ScoringConfig,
    genome_name: str,
    split: str,
    top_k: int | None,
    run: str | None,
    tracker: Tracker,
) -> dict[str, Any]:
    """Score one genome on one split.

    top_k: experts active a token, in place of the genome's own. run: the folder that config or genome
    come from, if any.
    """
    config = with_absolute_paths(config)
    data = check_tasks(config.tasks)
    if run is not None:
        _tell_changes(RunFolder(Path(run)), config.model, data, tracker)
    from moe_evo.models.loading import alignment_digest, read_shape, resolve_device
    from moe_evo.result import Score

    if config.cluster.address is None:
        resolve_device(config.model.device)
    shape = read_shape(config.model)
    wanted = shape if top_k is None else replace(shape, top_k=(top_k,) * shape.num_layers)
    genome = named_genome(genome_name, wanted, config.model.router, alignment_digest(config.model))
    genome = genome if top_k is None else _with_top_k(genome, top_k)
    check_fits(genome, shape)
    if genome_name.endswith(".pth") and config.model.router != "eep" and not genome.is_pruning:
        tracker.message("EEP coefficients remap probabilities: --model.router eep gives what they were searched for")
    from moe_evo.evaluation.pool import Request

    with open_pool(config, data, tracker) as pool:
        pool.listener = tracker.pool
        pool.submit([Request("evaluate", 0, genome, split)])
        ((_, outcome),) = pool.next_outcomes()
    if isinstance(outcome, EvaluationFailure):
        raise GenomeError(f"{genome_name}: has no fitness on the {split} split ({outcome.reason})")
    return {
        "genome": genome_name,
        "digest": genome.digest,
        "num_kept": list(genome.num_kept),
        "top_k": list(genome.top_k),
        "split": split,
        "duration_s": outcome.duration_s,
        **asdict(Score.of(outcome, is_share=is_share(data))),
    }


def _tell_changes(run: RunFolder, model: ModelConfig, data: Sequence[TaskData], tracker: Tracker) -> None:
    """Scores of another model or on other data are no longer those of the run."""
    if not run.result.is_file():
        return
    from moe_evo.models.loading import model_hash

    result = run.read_result()
    if model_hash(model) != result["model"]["hash"]:
        tracker.message(f"{model.path}: is not the model that {run.path} searched")
    hashes = {task["name"]: task["hash"] for task in result["tasks"]}
    for one in data:
        if hashes.get(one.name, one.hash) != one.hash:
            tracker.message(f"task {one.name}: the data have changed since {run.path} was searched")


def export(
    folder: RunFolder, target: Path, which: str, device: str, *, overwrite: bool, tracker: Tracker
) -> dict[str, Any]:
    """Write the checkpoint of a finished run's genome, checked against what was evaluated."""
    result = folder.read_result()
    genome_file = folder.winners[which]
    if not genome_file.is_file():
        found = ", ".join(name for name, path in folder.winners.items() if path.is_file())
        raise RunError(f"{folder.path}: has no {genome_file.name}; --which: got {which!r}, expected one of {found}")
    genome = load_genome(genome_file)
    row = next(row for row in result["rows"] if row["key"] == which)
    from moe_evo.models.export import check_own_experts, check_router, check_skips_nothing, export_checkpoint
    from moe_evo.models.loading import load_model, model_hash, renormalises, resolve_device
    from moe_evo.models.target_folder import check_target

    resolve_device(device)
    model = replace(resumed_config(str(folder.path)).model, device=device)
    check_target(target.absolute(), Path(model.path), overwrite=overwrite)
    check_router(genome, model.router, renormalises=renormalises(model))
    check_skips_nothing(skips_dynamically=model.dynamic_skipping is not None)
    check_own_experts(model.experts)
    if model_hash(model) != result["model"]["hash"]:
        raise RunError(f"{model.path}: is not the model that {folder.path} searched; bring back its old files")
    tracker.message(f"loading {model.path}")
    moe = load_model(model)
    tracker.message(f"writing and checking {target}")
    report = export_checkpoint(moe, genome, target, overwrite=overwrite, provenance=_provenance(result, row))
    return {**asdict(report), "folder": str(report.folder), "which": which, "title": row["title"]}


def _provenance(result: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """What a model card tells of a run, in words."""
    path, search = result["model"]["path"], result["search"]
    name = path if "@" in result["model"]["hash"] else Path(path).name  # of a hub: owner/model@commit
    full = result["rows"][0]["scores"]
    return {
        "base_model": "moe_evo embedded Mixtral" if path == "embedded" else name,
        "hash of the base model": result["model"]["hash"],
        "tasks": {task["name"]: _task_in_words(task) for task in result["tasks"]},
        "search": f"{search['algorithm']}, {search['evaluations']} evaluations, seed {search['seed']}, "
        f"router {result['router']}",
        "genome": f"candidate {row['candidate']} ({row['operator']}), digest {row['digest']}",
        "scores (95 % interval)": {
            split: f"{score['fitness']:.4f} [{score['low']:.4f}, {score['high']:.4f}], "
            f"full model {full[split]['fitness']:.4f}"
            for split, score in row["scores"].items()
        },
    }


def _task_in_words(task: dict[str, Any]) -> str:
    examples = " / ".join(str(task["examples"][split]) for split in SPLITS)
    return f"{task['kind']}, {task['metric']}, {examples} examples, data {task['hash'][:16]}"


def show(folder: RunFolder) -> dict[str, Any]:
    """The result of a finished run, or how far an unfinished one has come."""
    if folder.result.is_file():
        return folder.read_result()
    config = read_config(folder.config)
    with folder.open_journal() as journal:
        individuals = journal.individuals(MAIN)
        proposed = len(journal.candidates(MAIN))
        gangs = gang_facts(journal)
    population = Population().with_outcomes(individuals)
    best = population.best if len(population) else None
    return {
        "unfinished": True,
        "evaluations": len(individuals),
        "of": config.search.evaluations,
        "under_way": proposed - len(individuals),
        **failure_facts(one.outcome for one in individuals),
        "gangs": gangs,
        "best_fitness": best.evaluation.fitness if best else None,
        "best_kept": [list(layer) for layer in best.genome.kept] if best else None,
        "config": asdict_plain(config),
    }
