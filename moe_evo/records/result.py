"""The content of result.json, the result of a finished run, as frozen values: the final table and facts about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moe_evo.config.evaluation import FitnessRule
from moe_evo.errors import RunError
from moe_evo.genomes.population import Candidate, Evaluation, mean_active_experts
from moe_evo.plain import Plain, PlainError, fields_of, plain_fields, value_of
from moe_evo.records.paired import PairedByTask
from moe_evo.records.statistics import Z_95, WinnersCurse, share_interval, wilson_interval
from moe_evo.shown import shown

RESULT_VERSION = 1


class VersionError(PlainError):
    """A result was written by a version of moe_evo whose results cannot be read."""


@dataclass(frozen=True)
class Score:
    """Fitness on one split with its 95 % interval over examples.

    A share (a fitness between 0 and 1) has a Wilson interval (`share_interval`), an unbounded metric a normal one.
    metrics: `task/metric` -> value.
    """

    fitness: float
    low: float
    high: float
    standard_error: float = 0.0
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, evaluation: Evaluation, *, is_share: bool, rule: FitnessRule) -> Score:
        """rule: how the fitness was made of the scores of the tasks."""
        low, high = _of_share(evaluation, rule) if is_share else _normal(evaluation)
        return cls(
            fitness=evaluation.fitness,
            low=low,
            high=high,
            standard_error=evaluation.standard_error,
            num_examples=evaluation.num_examples,
            metrics=dict(evaluation.metrics),
        )

    @classmethod
    def of_share(cls, share: float, number: int) -> Score:
        """That of so many answers, each right or wrong; scores between the two vary less. share: from 0 to 1."""
        return cls(share, *wilson_interval(share, number), num_examples=number)

    @property
    def active_experts(self) -> float | None:
        """Experts that a token ran, mean over MoE layers and tasks; None without dynamic routing."""
        return mean_active_experts(self.metrics)

    def __str__(self) -> str:
        return f"{self.fitness:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _normal(evaluation: Evaluation) -> tuple[float, float]:
    margin = Z_95 * evaluation.standard_error
    return (evaluation.fitness - margin, evaluation.fitness + margin)


def _of_share(evaluation: Evaluation, rule: FitnessRule) -> tuple[float, float]:
    if evaluation.scores:
        return share_interval(evaluation.scores, rule)
    return wilson_interval(evaluation.fitness, evaluation.num_examples)


@dataclass(frozen=True)
class Row:
    """One line of the final table: a genome and its scores.

    key: full | random_search | soup | best_pruning | best | recovered, or the name of a one-shot method. evaluations:
    how many were spent to find the genome. candidate: its number in its search. num_kept, top_k: one number a MoE
    layer. kept: the experts that each layer keeps; where experts are merged, the one with the largest weight in each
    slot. scores: by split, `search`, `validation` and `test`; without the splits on which the evaluation failed.
    parameters, bytes: of its checkpoint; None in results of older versions, which did not record them.
    """

    key: str
    title: str
    evaluations: int
    candidate: int
    operator: str
    parents: tuple[int, ...]
    digest: str
    is_pruning: bool
    num_kept: tuple[int, ...]
    top_k: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    scores: Mapping[str, Score] = field(default_factory=dict, hash=False)
    parameters: int | None = None
    bytes: int | None = None

    @property
    def loader(self) -> str:
        """Who loads its checkpoint: 'transformers', or 'moe_evo' where layers differ in experts or in top_k."""
        return "transformers" if len(set(self.num_kept)) == 1 and len(set(self.top_k)) == 1 else "moe_evo"

    @property
    def search(self) -> Score | None:
        """The score on the examples that the search used; None where the evaluation failed."""
        return self.scores.get("search")

    @property
    def validation(self) -> Score | None:
        """The score on the examples by which the winner was chosen; None where the evaluation failed."""
        return self.scores.get("validation")

    @property
    def test(self) -> Score | None:
        """The score on held-out examples, used for no choice; None where the evaluation failed."""
        return self.scores.get("test")

    def __str__(self) -> str:
        scores = ", ".join(f"{split} {score}" for split, score in self.scores.items())
        return f"{self.title}: {scores or 'no scores'}"


@dataclass(frozen=True)
class FrontPoint:
    """A genome that no other one of its search beats in all objectives.

    row: with the key front-1, front-2, ... values: its objectives by split and name, such as quality or experts; under
    'expected' what the search expected of it, by which the front was chosen.
    """

    row: Row
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class TableRow:
    """A line of the final table together with its candidate, which has the genome."""

    key: str
    title: str
    candidate: Candidate
    evaluations: int
    scores: Mapping[str, Score]

    def to_row(self, parameters: int | None = None, size: int | None = None) -> Row:
        """The line in the form of result.json. parameters: of its checkpoint; size: bytes of it."""
        genome = self.candidate.genome
        return Row(
            key=self.key,
            title=self.title,
            evaluations=self.evaluations,
            candidate=self.candidate.number,
            operator=self.candidate.operator,
            parents=self.candidate.parents,
            digest=genome.digest,
            is_pruning=genome.is_pruning,
            num_kept=genome.num_kept,
            top_k=genome.top_k,
            kept=genome.kept,
            scores=self.scores,
            parameters=parameters,
            bytes=size,
        )


@dataclass(frozen=True)
class ModelFacts:
    """The model that was searched: where it was, the hash of its files, and the shape of its MoE layers.

    See `ModelShape` for the numbers.
    """

    path: str
    hash: str | None
    family: str
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    num_expert_groups: int = 1
    top_k_groups: int = 1
    min_kept_per_group: int = 1


@dataclass(frozen=True)
class TaskFacts:
    """A task that was searched for.

    metric: what is reported. hash: of its data. examples: how many, by split. search_metric: what the search maximised
    on the search split, where that is not `metric`. chance: what guessing among the choices scores on the test split;
    None where there is nothing to guess from, and in older results.
    """

    name: str
    kind: str
    metric: str
    hash: str
    examples: Mapping[str, int] = field(hash=False)
    search_metric: str | None = None
    chance: float | None = None

    def to_plain(self) -> Plain:
        """The fields, without a search metric and a chance level where there are none."""
        return {name: value for name, value in plain_fields(self).items() if value is not None}


@dataclass(frozen=True)
class FailureFacts:
    """The number of evaluations that gave no fitness, and each distinct reason once."""

    failures: int = 0
    failure_reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchFacts:
    """Figures of the search. stopped_early: evaluations that ended before the last example. evaluation_s: in total."""

    algorithm: str
    seed: int
    evaluations: int
    failures: int = 0
    failure_reasons: tuple[str, ...] = ()
    stopped_early: int = 0
    evaluation_s: float = 0.0


@dataclass(frozen=True)
class RecoveredFinalist:
    """A finalist's fitness on the validation split before and after it was recovered; None where it failed."""

    candidate: int
    pruned: float | None
    recovered: float | None

    def __str__(self) -> str:
        before, after = ("failed" if one is None else f"{one:.3f}" for one in (self.pruned, self.recovered))
        return f"#{self.candidate} {before} -> {after}"


@dataclass(frozen=True)
class FinalistRecoveries:
    """The finalists that were recovered before the winner, the first of them, was chosen.

    methods: of recovery. steps: gradient steps of each. evaluations: of the budget, that all of it is counted as.
    """

    methods: tuple[str, ...]
    steps: int
    evaluations: int
    finalists: tuple[RecoveredFinalist, ...]

    def __str__(self) -> str:
        how = " + ".join(self.methods) + (f", {self.steps} steps" if self.steps else "")
        told = ", ".join(map(str, self.finalists))
        return f"recovered on the validation split ({how}; for {self.evaluations} evaluations): {told}"


@dataclass(frozen=True)
class GangFacts:
    """Events of the gangs of a run on a cluster. counts: number of events by kind. reasons: why gangs broke."""

    counts: Mapping[str, int] = field(default_factory=dict, hash=False)
    reasons: tuple[str, ...] = ()

    def to_plain(self) -> Plain:
        """The counts, with the reasons beside them."""
        return {**self.counts, "reasons": list(self.reasons)}

    @classmethod
    def from_plain(cls, data: object, where: str) -> GangFacts:
        """Raises PlainError."""
        found = dict(value_of(dict[str, Any], data, where))
        reasons = value_of(tuple[str, ...], found.pop("reasons", ()), f"{where}.reasons")
        return cls(value_of(dict[str, int], found, where), reasons)


@dataclass(frozen=True, kw_only=True, repr=False)
class RunResult:
    """The content of result.json of a finished run.

    software: versions of everything that can change a number. fitness: how the scores of several tasks become one.
    router, experts, dynamic_skipping, top_p: as in the model's config. winners_curse: how much of the winner's lead
    over the full model is gone from one split to the next. expected: what the winner can be expected to score on new
    examples of the validation split's kind, as the best of several validation scores is partly luck; None in older
    results. against_full: the winner minus the full model on the same test examples; None where one of them has no
    score, and in older results. gangs: None for a run in one process. rows: the final table, the full model first and
    the winner last. front: of a search with several objectives. recovered: genomes whose model learned from the full
    one afterwards. finalists: those that did so before the winner was chosen; None where none did.
    """

    software: Mapping[str, str] = field(default_factory=dict, hash=False)
    model: ModelFacts
    tasks: tuple[TaskFacts, ...]
    fitness: str = "mean"
    router: str = "exported"
    experts: str = "own"
    dynamic_skipping: float | tuple[float, ...] | None = None
    top_p: float | None = None
    search: SearchFacts
    winners_curse: WinnersCurse | None = None
    expected: float | None = None
    against_full: PairedByTask | None = None
    gangs: GangFacts | None = None
    rows: tuple[Row, ...]
    front: tuple[FrontPoint, ...] = ()
    recovered: tuple[Row, ...] = ()
    finalists: FinalistRecoveries | None = None

    @property
    def lines(self) -> tuple[Row, ...]:
        """What tables show: the final table, and what was recovered afterwards."""
        return (*self.rows, *self.recovered)

    def with_recovered(self, row: Row) -> RunResult:
        """The result with this line of a recovered model, in place of one with the same key."""
        others = (one for one in self.recovered if one.key != row.key)
        return replace(self, recovered=(*others, row))

    def row(self, key: str) -> Row | None:
        """The line with this key, such as 'full', 'best_pruning' or 'front-1'; None where there is none."""
        lines = (*self.lines, *(point.row for point in self.front))
        return next((row for row in lines if row.key == key), None)

    def is_on_front(self, key: str) -> bool:
        """Whether this is the key of a point of the front."""
        return any(point.row.key == key for point in self.front)

    @property
    def best(self) -> Row:
        """The line of the winner: the genome with the best score on the validation split."""
        return self._known("best")

    @property
    def full(self) -> Row:
        """The line of the unpruned model."""
        return self._known("full")

    def _known(self, key: str) -> Row:
        row = self.row(key)
        if row is None:
            raise RunError(f"result.json: has no row {key!r}, only {', '.join(one.key for one in self.rows)}")
        return row

    @property
    def tasks_label(self) -> str:
        """The tasks with what is reported of them, such as 'nli (accuracy), syll (accuracy)'."""
        return ", ".join(f"{task.name} ({task.metric})" for task in self.tasks)

    @property
    def search_note(self) -> str | None:
        """In words what the search maximised, where that is something else than the final table shows."""
        if not any(task.search_metric for task in self.tasks):
            return None
        searched = ", ".join(f"{task.name} ({task.search_metric or task.metric})" for task in self.tasks)
        return f"the search maximised {searched}; every column shows {self.tasks_label}"

    @property
    def runs_stock_experts(self) -> bool:
        """Whether tokens ran all experts that they were routed to, as a stock architecture does."""
        return self.experts == "own" and self.dynamic_skipping is None and self.top_p is None

    def to_plain(self) -> Plain:
        """The content of result.json, without what not every result has where there is none of it."""
        told = plain_fields(self)
        absent = {name for name in ("top_p", "expected", "front", "recovered", "finalists") if told[name] in (None, [])}
        return {"version": RESULT_VERSION} | {name: value for name, value in told.items() if name not in absent}

    @classmethod
    def from_plain(cls, data: object, where: str = "") -> RunResult:
        """The result that `to_plain` of this version, or an older one, wrote; raises PlainError for anything else."""
        version = data.get("version") if isinstance(data, Mapping) else None
        if version != RESULT_VERSION:
            raise VersionError(
                f"version {shown(version, 40)}, expected {RESULT_VERSION}; use the moe_evo that wrote it"
            )
        result = fields_of(cls, data, where)
        if not result.rows:
            raise PlainError("rows: got none, expected the final table")
        return result

    def __repr__(self) -> str:
        rows = "; ".join(f"{row.key} {row.test or 'without a test score'}" for row in self.rows)
        return f"<RunResult of {self.model.path} on {self.tasks_label}; on the test split: {rows}>"
