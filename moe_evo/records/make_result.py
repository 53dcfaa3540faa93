"""Makes the result of a run from its journal and its final table."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from moe_evo.config.run import RunConfig
from moe_evo.config.task import SPLITS
from moe_evo.genomes.population import Evaluation, EvaluationFailure, ExampleScores, Outcome
from moe_evo.records.journal import MAIN, REFERENCE, Journal
from moe_evo.records.paired import PairedByTask, paired_by_task
from moe_evo.records.result import (
    FailureFacts,
    FinalistRecoveries,
    FrontPoint,
    GangFacts,
    ModelFacts,
    RunResult,
    SearchFacts,
    TableRow,
    TaskFacts,
)
from moe_evo.records.statistics import WinnersCurse
from moe_evo.tasks.chance import chance_level
from moe_evo.tasks.data import TaskData, reported

if TYPE_CHECKING:  # torch is imported when a model is looked at, not before
    from moe_evo.models.source import ModelSource


def software_versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    packages = ("moe_evo", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def run_result(
    config: RunConfig,
    source: ModelSource,
    journal: Journal,
    data: Sequence[TaskData],
    rows: Sequence[TableRow],
    expected: float | None = None,
    front: Sequence[tuple[TableRow, Mapping[str, Mapping[str, float]]]] = (),
    finalists: FinalistRecoveries | None = None,
) -> RunResult:
    """The result of a run whose evaluations are all in its journal.

    rows: its final table. expected, finalists: see `RunResult`. front: as rows with their objectives by split and name.
    """
    from moe_evo.models.size.memory import exported_size
    from moe_evo.models.size.size import read_size

    size = read_size(source, ranks=1)
    sizes = [exported_size(size, row.candidate.genome.num_kept) for row in rows]
    skipping = config.model.dynamic_skipping
    return RunResult(
        software=software_versions(),
        model=ModelFacts(path=config.model.path, hash=journal.meta("hash/model"), **asdict(source.shape)),
        tasks=tuple(task_facts(one) for one in data),
        fitness=config.evaluation.fitness,
        router=config.model.router,
        experts=config.model.experts,
        dynamic_skipping=tuple(skipping) if isinstance(skipping, list) else skipping,
        top_p=config.model.top_p,
        search=_search_facts(config, journal),
        winners_curse=_winners_curse(journal, data, rows, is_fresh=config.evaluation.is_fresh),
        expected=expected,
        against_full=against_full(journal, rows[0].candidate.number, rows[-1].candidate.number),
        gangs=gang_facts(journal.gang_events()),
        rows=tuple(row.to_row(*one) for row, one in zip(rows, sizes, strict=True)),
        front=tuple(
            FrontPoint(row.to_row(*exported_size(size, row.candidate.genome.num_kept)), values) for row, values in front
        ),
        finalists=finalists,
    )


def task_facts(data: TaskData) -> TaskFacts:
    """A task's name, kind, metrics and hash, and the number of examples in each split."""
    examples = {split: len(found) for split, found in data.splits.items()}
    search_metric = None if data.search_metric == data.metric else data.search_metric
    chance = chance_level(data.metric, data.splits["test"])
    return TaskFacts(data.name, data.kind, data.metric, data.hash, examples, search_metric, chance)


def _search_facts(config: RunConfig, journal: Journal) -> SearchFacts:
    outcomes = journal.told(MAIN)
    failed = failure_facts(outcomes.values())
    return SearchFacts(
        algorithm=config.search.algorithm,
        seed=config.search.seed,
        evaluations=len(outcomes),
        failures=failed.failures,
        failure_reasons=failed.failure_reasons,
        stopped_early=sum(isinstance(one, Evaluation) and one.is_stopped for one in outcomes.values()),
        evaluation_s=sum(one.duration_s for one in outcomes.values()),
    )


def _winners_curse(
    journal: Journal, data: Sequence[TaskData], rows: Sequence[TableRow], *, is_fresh: bool
) -> WinnersCurse | None:
    """How much of the winner's lead over the full model is lost from one split to the next; see `winners_curse`.

    Scores are those that are reported, on every split. None where the winner or the full model has none on one of them.
    """
    import numpy as np

    from moe_evo.records.statistics import winners_curse

    def scores(search: str, row: TableRow) -> dict[str, ExampleScores]:
        scorings = {split: reported(split, data, is_fresh=is_fresh) for split in SPLITS}
        found = {split: journal.outcomes(search, name)[row.candidate.number] for split, name in scorings.items()}
        return {split: one.scores for split, one in found.items() if isinstance(one, Evaluation) and one.scores}

    full, winner = scores(REFERENCE, rows[0]), scores(MAIN, rows[-1])
    if not len(full) == len(winner) == len(SPLITS):
        return None
    return winners_curse(winner, np.random.default_rng(0), full)


def against_full(journal: Journal, full: int, winner: int) -> PairedByTask | None:
    """The winner of a search minus the full model on the same test examples; None where one of them has no scores.

    full, winner: their numbers among the references and in the search.
    """
    found = [journal.outcomes(REFERENCE, "test").get(full), journal.outcomes(MAIN, "test").get(winner)]
    reference, own = (one.scores if isinstance(one, Evaluation) else None for one in found)
    return paired_by_task(own, reference) if own and reference else None


def gang_facts(events: Sequence[tuple[float, int, str, str]]) -> GangFacts | None:
    """The number of gang events of each kind, and the reasons why gangs broke; None where there were no gangs.

    events: as `Journal.gang_events` returns them.
    """
    if not events:
        return None
    counts = Counter(kind for _, _, kind, _ in events)
    return GangFacts(dict(counts), tuple(sorted({detail for _, _, kind, detail in events if kind == "broken"})))


def failure_facts(outcomes: Iterable[Outcome]) -> FailureFacts:
    """The number of failures among these outcomes, and each distinct reason once."""
    failed = [one for one in outcomes if isinstance(one, EvaluationFailure)]
    return FailureFacts(len(failed), tuple(sorted({one.reason for one in failed})))
