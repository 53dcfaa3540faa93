"""The functions of `import moe_evo`, such as `moe_evo.search`: the commands of `moe-evo`, called from Python.

Every function takes the command's flags as keywords (see `moe_evo.api.options`), prints nothing unless
`progress=True`, and raises a `MoeEvoError` whose message is the line that the command would print. Calls from several
threads take turns (see `moe_evo.api.turns`). They also work inside a running event loop, as in a notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from moe_evo.api.options import Config, Model, Tasks, config_of
from moe_evo.api.run import GenomeLike, Run, Split, Sweep, Which, genome_named, run_of
from moe_evo.api.turns import turn
from moe_evo.config.recover import RecoveryConfig
from moe_evo.config.run import RunConfig, ScoringConfig
from moe_evo.config.sweep import SweepConfig
from moe_evo.errors import ConfigError
from moe_evo.report.answers import CarvedModel, ExportedRun, PrunedModel, RecoveredModel, ScoredGenome
from moe_evo.report.write import Comparison


def search(
    model: Model | None = None,
    tasks: Tasks | None = None,
    *,
    config: Config | None = None,
    progress: bool = False,
    **options: object,
) -> Run:
    """Search which experts of a model to keep, or continue an unfinished call with the same config.

    model: checkpoint folder or Hugging Face name; default: the small model of this package. tasks: data files,
    folders or names of embedded tasks, or dicts with a task's options. config: a YAML file, a run's folder or a
    config, which the other arguments change. options: any flag of `moe-evo search` by its last part.

    >>> import moe_evo
    >>> task = {"data": "syll", "num_search": 8, "num_validation": 8, "num_test": 8}
    >>> run = moe_evo.search(tasks=[task], num_kept=4, evaluations=6, finalists=2, folder="my-run")
    >>> run.is_finished
    True
    >>> [row.key for row in run.result.rows]
    ['full', 'frequency', 'reap', 'best']
    >>> 0 <= run.result.best.test.low <= run.result.best.test.fitness <= 1
    True
    """
    from moe_evo.commands.search import search as command

    checked = config_of(RunConfig, config, model, tasks, options)
    with turn(progress=progress) as tracker:
        return Run(command(checked, tracker).path)


def load_run(folder: str | Path) -> Run:
    """The run in a folder, finished or not, of this or an older version; raises RunError where there is none.

    >>> import moe_evo
    >>> run = moe_evo.load_run("my-run")
    >>> run.config.search.num_kept, run.genome().num_kept
    (4, (4, 4, 4, 4))
    """
    return Run(folder)


def evaluate(
    model: Model | Run | None = None,
    tasks: Tasks | None = None,
    *,
    genome: GenomeLike | None = None,
    split: Split = "validation",
    top_k: int | None = None,
    baseline: GenomeLike | None = None,
    samples: str | Path | None = None,
    config: Config | None = None,
    progress: bool = False,
    **options: object,
) -> ScoredGenome:
    """Score one genome on one split.

    model: as for `search`, or a run, whose winner is scored. genome: a file, a run, the kept experts of each layer, or
    'full', the default for a model. Where no other config is given, that of the run is used: its model and tasks.
    top_k: experts active a token, in place of the genome's own. baseline: another genome, to be scored on the same
    examples. samples: a new file of JSONL with what was answered to every example.

    >>> import moe_evo
    >>> task = {"data": "syll", "num_validation": 8}
    >>> scored = moe_evo.evaluate("embedded", [task], genome=[[0, 1, 2, 3]] * 4)
    >>> scored.split, scored.score.num_examples, scored.num_kept
    ('validation', 8, (4, 4, 4, 4))
    >>> moe_evo.evaluate(moe_evo.load_run("my-run"), split="test").digest == moe_evo.load_run("my-run").genome().digest
    True
    """
    from moe_evo.commands.evaluate import evaluate as command

    run = model if isinstance(model, Run) else run_of(genome)
    if isinstance(model, Run):
        if config is not None:
            raise ConfigError("config: got it beside a run, expected one of them")
        genome, model = model if genome is None else genome, None
    if run is not None and config is None:
        config = run.config
    checked = config_of(ScoringConfig, config, model, tasks, options)
    named = genome_named("full" if genome is None else genome)
    with turn(progress=progress) as tracker:
        return command(
            checked,
            named,
            split,
            top_k,
            None if run is None else str(run.folder),
            tracker,
            baseline=None if baseline is None else genome_named(baseline),
            samples=None if samples is None else Path(samples),
        )


def prune(
    model: Model | None = None,
    tasks: Tasks | None = None,
    *,
    method: str,
    num_kept: int,
    to: str | Path,
    observations: str | Path | None = None,
    allocation: Literal["uniform", "global"] = "uniform",
    blend: Mapping[str, float] | None = None,
    progressive: bool = False,
    base_model: str | None = None,
    aligned: bool | None = None,
    overwrite: bool = False,
    config: Config | None = None,
    progress: bool = False,
    **options: object,
) -> PrunedModel:
    """Prune or merge experts by a one-shot method, without a search, and write the checkpoint into the folder `to`.

    method: one of those that `moe-evo criteria` lists. See `moe-evo prune --help` for the other arguments.

    >>> import moe_evo
    >>> task = {"data": "syll", "num_search": 8, "num_validation": 8, "num_test": 8}
    >>> small = moe_evo.prune(tasks=[task], method="reap", num_kept=4, to="pruned")
    >>> small.report.loader, [len(kept) for kept in small.kept]
    ('transformers', [4, 4, 4, 4])
    """
    from moe_evo.commands.prune import PruneOptions
    from moe_evo.commands.prune import prune as command

    checked = config_of(ScoringConfig, config, model, tasks, options)
    wanted = PruneOptions(
        method=method,
        num_kept=num_kept,
        observations=None if observations is None else Path(observations),
        allocation=allocation,
        blend=blend,
        progressive=progressive,
        base_model=base_model,
        aligned=aligned,
    )
    with turn(progress=progress) as tracker:
        return command(checked, wanted, Path(to), overwrite=overwrite, tracker=tracker)


def carve(
    model: Model,
    tasks: Tasks | None = None,
    *,
    to: str | Path,
    method: Literal["cluster", "upcycle"] = "cluster",
    num_experts: int = 8,
    top_k: int | None = None,
    shared_size: int | None = None,
    router: Literal["least_squares", "centroid"] | None = None,
    prompts: str | Path | None = None,
    profile_tokens: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    config: Config | None = None,
    progress: bool = False,
    **options: object,
) -> CarvedModel:
    """Make an MoE of a dense model, without training, and write the checkpoint into the folder `to`.

    See `moe-evo carve --help` for the arguments. With all experts active it computes what the dense model computes.

    >>> import moe_evo
    >>> carved = moe_evo.carve("dense", [{"data": "syll", "num_search": 8, "num_test": 8}], to="carved", top_k=2)
    >>> carved.family, carved.num_experts, carved.top_k, carved.expert_size
    ('mixtral', 8, 2, 16)
    >>> carved.all_active_difference < 1e-5
    True
    """
    from moe_evo.commands.carve import CarveOptions
    from moe_evo.commands.carve import carve as command

    checked = config_of(ScoringConfig, config, model, tasks, options)
    wanted = CarveOptions(
        method=method,
        num_experts=num_experts,
        top_k=top_k,
        shared_size=shared_size,
        router=router,
        prompts=None if prompts is None else str(prompts),
        profile_tokens=profile_tokens,
        seed=seed,
    )
    with turn(progress=progress) as tracker:
        return command(checked, wanted, Path(to), overwrite=overwrite, tracker=tracker)


def recover(
    pruned: Run | str | Path,
    to: str | Path,
    *,
    model: Model | None = None,
    tasks: Tasks | None = None,
    which: Which = "best",
    overwrite: bool = False,
    config: Config | None = None,
    progress: bool = False,
    **options: object,
) -> RecoveredModel:
    """Let a pruned model learn from the full one what pruning broke, and write its checkpoint into the folder `to`.

    pruned: an exported folder, whose full model is `model`; or a finished run, whose config is used where no other is
    given, and whose genome `which` is taken. options: any flag of `moe-evo recover` by its last part.

    >>> import moe_evo
    >>> healed = moe_evo.recover("my-run", "recovered", steps=4, batch_size=4, checks=2)
    >>> list(healed.facts.scores), healed.report.loader
    (['full', 'pruned', 'recovered'], 'transformers')
    >>> [check.step for check in healed.facts.learned.checks]
    [0, 2, 4]
    """
    from moe_evo.commands.recover import recover as command
    from moe_evo.commands.recovery_input import is_run

    folder = str(pruned.folder if isinstance(pruned, Run) else pruned)
    if config is None and is_run(Path(folder)):
        config = load_run(folder).config
    checked = config_of(RecoveryConfig, config, model, tasks, options)
    with turn(progress=progress) as tracker:
        return command(checked, folder, Path(to), which, overwrite=overwrite, tracker=tracker)


def export(
    run: Run | str | Path,
    to: str | Path,
    *,
    which: Which = "best",
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> ExportedRun:
    """Write the checkpoint of a finished run into the folder `to`, and check that it computes the evaluated logits.

    >>> import moe_evo
    >>> exported = moe_evo.export("my-run", "exported")
    >>> exported.report.loader, exported.report.max_logit_difference < 1e-4
    ('transformers', True)
    """
    found = run if isinstance(run, Run) else Run(run)
    return found.export(to, which=which, device=device, overwrite=overwrite, progress=progress)


def sweep(
    model: Model | None = None,
    tasks: Tasks | None = None,
    *,
    no_tune: bool = False,
    config: Config | None = None,
    progress: bool = False,
    **options: object,
) -> Sweep:
    """Run a search for every combination of numbers of experts, seeds, algorithms and tasks.

    Called again with the same config, it makes only the runs that are not finished. Which runs there are is told by
    the keyword `sweep`, as in YAML. no_tune: one run after the other in this process, without Ray Tune.

    >>> import moe_evo
    >>> task = {"data": "syll", "num_search": 8, "num_validation": 8, "num_test": 8}
    >>> swept = moe_evo.sweep(
    ...     tasks=[task], sweep={"num_kept": [4, 6]}, evaluations=4, finalists=1, no_tune=True, folder="my-sweep"
    ... )
    >>> sorted(swept.runs), swept.result.unfinished
    (['keep4-seed0', 'keep6-seed0'], ())
    """
    from moe_evo.commands.sweep import sweep as command

    checked = config_of(SweepConfig, config, model, tasks, options)
    with turn(progress=progress) as tracker:
        return Sweep(command(checked, tracker, use_tune=not no_tune).path)


def compare(*runs: Run | Sweep | str | Path, in_pairs: bool = True) -> Comparison:
    """The final tables of several runs as one, with each run's winner tested against that of the first run.

    in_pairs: compare winners on the same examples, by bootstrap; False saves its time and gives only the tables.

    >>> import moe_evo
    >>> found = moe_evo.compare("my-run", *moe_evo.load_run("my-sweep/runs/keep4-seed0").folder.parent.iterdir())
    >>> len(found.paired), {line.run for line in found.lines} == {"my-run", "keep4-seed0", "keep6-seed0"}
    (2, True)
    """
    from moe_evo.report.write import compare as command

    if not runs:
        raise ConfigError("compare: got no runs, expected one or more")
    return command(_folders(runs), in_pairs=in_pairs)


def _folders(runs: Sequence[Run | Sweep | str | Path]) -> list[str]:
    found: list[str] = []
    for one in runs:
        if isinstance(one, Sweep):
            found += [str(run.folder) for run in one.runs.values()]
        else:
            found.append(str(one.folder if isinstance(one, Run) else one))
    return found
