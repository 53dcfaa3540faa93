"""Folders of runs as searches leave them, made without a model: as large, as broken or as hostile as a test needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from moe_evo.config.run import RunConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.file import save_individual
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual, Outcome
from moe_evo.genomes.space import ModelShape, SearchSpace
from moe_evo.records.folder import RunFolder, asdict_plain
from moe_evo.records.journal import Journal
from moe_evo.records.result import ModelFacts, RunResult, Score, SearchFacts, TableRow, TaskFacts

LAYERS, EXPERTS = 4, 8


def shape_of(layers: int = LAYERS, experts: int = EXPERTS) -> ModelShape:
    return ModelShape(
        family="mixtral",
        num_experts=(experts,) * layers,
        top_k=(1,) * layers,
        decoder_layers=tuple(range(layers)),
    )


def pruning(shape: ModelShape, num_kept: int, rng: np.random.Generator) -> Genome:
    kept = [rng.choice(number, num_kept, replace=False) for number in shape.num_experts]
    return Genome.from_kept(kept, shape.num_experts, shape.top_k)


def merged(genome: Genome, rng: np.random.Generator) -> Genome:
    layers = []
    for layer in genome.layers:
        matrix = layer.expert_merging + rng.normal(0, 0.065, layer.expert_merging.shape)
        matrix = np.where(rng.random(matrix.shape) < 0.5, layer.expert_merging, matrix)
        layers.append(LayerGenome(matrix, layer.router_mapping.copy(), layer.top_k))
    return Genome(tuple(layers))


def candidates(shape: ModelShape, num_kept: int, number: int, seed: int = 0) -> Iterator[Candidate]:
    """Half of them prunings, then merges; few different genomes, as reports read none but the winner's."""
    rng = np.random.default_rng(seed)
    prunings = [pruning(shape, num_kept, rng) for _ in range(8)]
    merges = [merged(one, rng) for one in prunings]
    initial, merging = min(31, max(number // 4, 1)), max(number // 2, 1)
    for n in range(number):
        genome = (prunings if n < merging else merges)[n % 8]
        if n < initial:
            yield Candidate(n, genome, "random_pruning")
        elif rng.random() < 0.3:
            first, second = rng.choice(n, 2, replace=False)
            yield Candidate(n, genome, "row_crossover", (int(first), int(second)))
        else:
            operator = "swap_mutation" if n < merging else "gaussian_mutation"
            yield Candidate(n, genome, operator, (int(rng.integers(n)),))


def evaluation(fitness: float, task: str, examples: int = 200) -> Evaluation:
    fitness = round(float(np.clip(fitness, 0, 1)) * examples) / examples
    error = float(np.sqrt(fitness * (1 - fitness) / examples))
    metrics = {f"{task}/accuracy": fitness, f"{task}/log_likelihood": fitness - 1.5}
    return Evaluation(fitness, fitness - 1.5, error, examples, 0.25, metrics)


def outcomes(number: int, rng: np.random.Generator, task: str, failures: int = 0) -> list[Outcome]:
    """Fitness that rises to 0.9 with noise; some fail."""
    found: list[Outcome] = [
        evaluation(0.5 + 0.4 * (1 - np.exp(-4 * n / number)) + rng.normal(0, 0.04), task) for n in range(number)
    ]
    for n in rng.choice(number, failures, replace=False):
        found[n] = EvaluationFailure("non_finite", "logits are not finite <b>in layer 2</b>", 0.1)
    return found


def make_run(
    path: Path,
    *,
    num_kept: int = 4,
    seed: int = 0,
    evaluations: int = 60,
    done: int | None = None,
    failures: int = 0,
    task: str = "nli",
    shape: ModelShape | None = None,
    template: Path | None = None,
    parameters: bool = False,
) -> RunFolder:
    """A run; done: how many evaluations an unfinished one has. template: a journal with candidates alone, to copy."""
    shape = shape or shape_of()
    run = RunFolder(path)
    path.mkdir(parents=True)
    config = RunConfig(
        tasks=[TaskConfig(name=task, data="syll")],
        search=SearchConfig(algorithm="eep", num_kept=num_kept, evaluations=evaluations, seed=seed),
        folder=str(path),
    )
    run.config.write_text(yaml.safe_dump(asdict_plain(config), sort_keys=False, allow_unicode=True), "utf-8")
    if template is None:
        write_candidates(run.journal, shape, num_kept, evaluations)
    else:
        shutil.copy(template, run.journal)
    rng = np.random.default_rng([seed, num_kept])
    found = outcomes(evaluations, rng, task, failures)[: evaluations if done is None else done]
    full = evaluation(0.93, task)
    with Journal(run.journal) as journal:
        journal.record([("search", n, "search", outcome) for n, outcome in enumerate(found)])
        journal.record([("reference", 0, "search", full)])
        if done is not None:
            return run
        fitness = [one.fitness if isinstance(one, Evaluation) else -1.0 for one in found]
        finalists = [int(n) for n in np.argsort(fitness)[-10:]]
        noise = {n: evaluation(fitness[n] + rng.normal(0, 0.02), task) for n in finalists}
        journal.record([("search", n, "validation", outcome) for n, outcome in noise.items()])
    _write_result(run, config, shape, finalists[-1], found, full, rng, parameters=parameters)
    return run


def write_candidates(path: Path, shape: ModelShape, num_kept: int, number: int) -> None:
    with Journal(path) as journal:
        journal.propose("search", list(candidates(shape, num_kept, number)))
        journal.propose("reference", [Candidate(0, shape.identity(), "full")])


def _write_result(
    run: RunFolder,
    config: RunConfig,
    shape: ModelShape,
    winner: int,
    found: list[Outcome],
    full: Evaluation,
    rng: np.random.Generator,
    *,
    parameters: bool,
) -> None:
    task, num_kept = config.tasks[0].name, int(np.mean(config.search.num_kept))
    genome = merged(pruning(shape, num_kept, rng), rng)
    score = found[winner].fitness  # type: ignore[union-attr]
    kept = Candidate(1, pruning(shape, num_kept, rng), "frequency")
    entries = [
        ("full", "full model", Candidate(0, shape.identity(), "full"), 0, full),
        ("frequency", "frequency pruning", kept, 0, evaluation(score - 0.2, task)),
        ("best_pruning", "EEP prune", replace(kept, number=3), 30, evaluation(score - 0.05, task)),
        ("best", "EEP prune + merge", Candidate(winner, genome, "gaussian_mutation", (1,)), len(found),
         evaluation(score - 0.02, task)),
    ]  # fmt: skip
    rows = [
        TableRow(
            key,
            title,
            one,
            spent,
            dict.fromkeys(("search", "validation", "test"), Score.of(outcome, is_share=True, rule="mean")),
        )
        for key, title, one, spent, outcome in entries
    ]
    space = SearchSpace.build(shape, num_kept=num_kept)
    save_individual(run.best, Individual(entries[-1][2], found[winner]), space, {})
    failed = [one for one in found if isinstance(one, EvaluationFailure)]
    model = ModelFacts(
        path="embedded",
        hash="0" * 64,
        family=shape.family,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        decoder_layers=shape.decoder_layers,
    )
    search = SearchFacts(
        algorithm="eep",
        seed=config.search.seed,
        evaluations=len(found),
        failures=len(failed),
        failure_reasons=tuple(sorted({one.reason for one in failed})),
        evaluation_s=0.25 * len(found),
    )
    examples = {"search": 200, "validation": 200, "test": 200}
    run.write_result(
        RunResult(
            software={"python": "3.11", "moe_evo": "0.1.0", "torch": "2.13.0"},
            model=model,
            tasks=(TaskFacts(task, "choice", "accuracy", "1" * 64, examples),),
            search=search,
            rows=tuple(
                row.to_row(1_000_000 * sum(row.candidate.genome.num_kept) if parameters else None) for row in rows
            ),
        )
    )
