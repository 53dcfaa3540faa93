"""The commands' results as frozen values, shown as text, as JSON (--json) or as HTML in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_evo.config.run import RunConfig
from moe_evo.plain import Plain, plain, plain_fields
from moe_evo.records.folder import asdict_plain
from moe_evo.records.paired import Paired
from moe_evo.records.result import FailureFacts, GangFacts, Score
from moe_evo.records.statistics import Difference
from moe_evo.report.html import scores_table, table
from moe_evo.report.table import loader_label
from moe_evo.report.verdict import Remark, compared, levels_in_words, needed, word_for
from moe_evo.shown import in_html

if TYPE_CHECKING:  # these import torch, which reading old runs does not need
    from moe_evo.models.carve.carve import CarvedLayer
    from moe_evo.models.compress.compression import ExpertSize, LayerChange
    from moe_evo.models.export.export import ExportReport
    from moe_evo.recovery.state import Learned


@dataclass(frozen=True)
class Progress:
    """How far an unfinished run has come.

    evaluations: how many are done. under_way: how many candidates are proposed and not done. gangs: None for a run in
    one process. best_fitness, best_kept: fitness of the best candidate so far on the search split, and the number of
    experts that each layer of it keeps; None before the first success.
    """

    evaluations: int
    budget: int
    under_way: int
    failed: FailureFacts
    gangs: GangFacts | None
    best_fitness: float | None
    best_kept: tuple[tuple[int, ...], ...] | None
    config: RunConfig

    def to_plain(self) -> Plain:
        """The form that `moe-evo show --json` prints."""
        return {
            "unfinished": True,
            "evaluations": self.evaluations,
            "of": self.budget,
            "under_way": self.under_way,
            **plain(self.failed),
            "gangs": plain(self.gangs),
            "best_fitness": self.best_fitness,
            "best_kept": plain(self.best_kept),
            "config": asdict_plain(self.config),
        }


@dataclass(frozen=True)
class AgainstBaseline:
    """A genome against a baseline on the same examples. score: of the baseline. paired: the genome minus it."""

    baseline: str
    digest: str
    score: Score
    paired: Paired

    def to_plain(self) -> Plain:
        """The fields, with the verdict in a word; see `word_for`."""
        return {**plain_fields(self), "verdict": word_for(self.paired)}


@dataclass(frozen=True)
class ScoredGenome:
    """One genome's score on one split.

    genome: name by which it was given. num_kept, top_k: one number a MoE layer. chance: what guessing scores, by task,
    where that means something. against: a baseline, if one was asked for. samples: the file of examples and answers.
    """

    genome: str
    digest: str
    num_kept: tuple[int, ...]
    top_k: tuple[int, ...]
    split: str
    duration_s: float
    score: Score
    chance: Mapping[str, float] = field(default_factory=dict, hash=False)
    against: AgainstBaseline | None = None
    samples: Path | None = None

    def to_plain(self) -> Plain:
        """A flat dict: the fields of the score beside the other fields, without a baseline and samples if none are."""
        told = plain_fields(self)
        absent = {name for name in ("against", "samples") if told[name] is None} | {"score"}
        return {**{name: value for name, value in told.items() if name not in absent}, **told["score"]}

    @property
    def remarks(self) -> list[Remark]:
        """What the score means: against the baseline, and against guessing."""
        found = [] if self.against is None else [("baseline", f"{self.against.baseline}: {self.against.score}")]
        if self.against is not None:
            examples = f"{self.split} examples"
            found.append(("verdict", compared(self.against.paired, self.genome, self.against.baseline, examples)))
        return [*found, *(("chance", f"guessing scores {levels}") for levels in levels_in_words(self.chance))]

    def __str__(self) -> str:
        return f"{self.genome}: {self.score} on {self.score.num_examples} {self.split} examples"

    def _repr_html_(self) -> str:
        metrics = [[name, f"{value:.4f}"] for name, value in sorted(self.score.metrics.items())]
        told = "".join(f"<p>{in_html(f'{name}: {sentence}')}</p>" for name, sentence in self.remarks)
        return table(str(self), ["metric", "value"], metrics) + told


@dataclass(frozen=True)
class MethodFacts:
    """Name, description and source of a one-shot method."""

    name: str
    description: str
    source: str


@dataclass(frozen=True)
class ExportedRun:
    """A checkpoint that was exported from a run. which, title: key and title of the genome's row in the final table."""

    report: ExportReport
    which: str
    title: str

    @property
    def folder(self) -> Path:
        """Where the checkpoint is."""
        return self.report.folder

    def to_plain(self) -> Plain:
        """The export's report, with the other fields beside it."""
        return {**plain(self.report), "which": self.which, "title": self.title}

    def _repr_html_(self) -> str:
        return _report_table(f"{self.title} ({self.which} of the run)", self.report)


@dataclass(frozen=True, repr=False)
class PrunedModel:
    """A checkpoint that a one-shot method made.

    genome, alignment: files with which the genome can be evaluated again; alignment only where neurons were reordered.
    kept: experts of each layer; where experts are merged, the one with the largest weight in each slot. made_of: all
    experts of each slot. scores: on the test split, of the 'full' and the 'smaller' model. dynamic_skipping_beta: for
    NAEE the threshold of its dynamic skipping in each layer, which no checkpoint holds.
    """

    report: ExportReport
    genome: str
    alignment: str | None
    method: str
    aligned: bool
    kept: tuple[tuple[int, ...], ...]
    made_of: tuple[tuple[tuple[int, ...], ...], ...]
    scores: Mapping[str, Score] = field(hash=False)
    dynamic_skipping_beta: tuple[float, ...] | None = None

    @property
    def folder(self) -> Path:
        """Where the checkpoint is."""
        return self.report.folder

    def to_plain(self) -> Plain:
        """The export's report, with the other fields beside it; fields that are not set are left out."""
        told = plain_fields(self)
        optional = ("alignment", "dynamic_skipping_beta")
        absent = {name for name in optional if told[name] is None} | {"report"}
        return {**told["report"], **{name: value for name, value in told.items() if name not in absent}}

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} model {score}" for name, score in self.scores.items())
        return f"<PrunedModel by {self.method} in {self.folder}; on the test split: {scores}>"

    def _repr_html_(self) -> str:
        return _report_table(self.method, self.report) + scores_table("test split", self.scores)


@dataclass(frozen=True)
class CompressedModel:
    """A checkpoint with compressed experts.

    description: how they were compressed. needs: software that runs such experts at their compressed size. scores: on
    the test split, of the 'original' and the 'compressed' model. layers: reconstruction error of each layer. experts:
    their size.
    """

    report: ExportReport
    method: str
    description: str
    needs: str
    scores: Mapping[str, Score] = field(hash=False)
    layers: tuple[LayerChange, ...]
    experts: ExpertSize = field(hash=False)

    def to_plain(self) -> Plain:
        """The export's report, with the other fields beside it."""
        told = plain_fields(self)
        return {**told.pop("report"), **told}


@dataclass(frozen=True)
class CarvedModel:
    """An MoE that was made of a dense model.

    family: its model type. num_experts, top_k, expert_size: experts of a layer, how many are active, and their neurons;
    shared_size: neurons of the shared expert. all_active_difference: the largest difference of a logit from the dense
    model's, on random tokens, with all experts active. layers: how far each layer is from the dense one with top_k of
    them; () where every expert is the whole FFN. scores: on the test split, of the 'dense' and the 'carved' model.
    """

    report: ExportReport
    method: str
    family: str
    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int
    active_parameters: int
    all_active_difference: float
    layers: tuple[CarvedLayer, ...]
    scores: Mapping[str, Score] = field(hash=False)

    @property
    def folder(self) -> Path:
        """Where the checkpoint is."""
        return self.report.folder

    def to_plain(self) -> Plain:
        """The export's report, with the other fields beside it."""
        told = plain_fields(self)
        return {**told.pop("report"), **told}

    def _repr_html_(self) -> str:
        return _report_table("carved", self.report) + scores_table("test split", self.scores)


@dataclass(frozen=True)
class Stage:
    """What one method of a recovery did. unit: what its steps are called."""

    method: str
    unit: str
    learned: Learned

    @property
    def in_words(self) -> str:
        """Steps, losses and time, as the model card and the terminal tell them."""
        learned = self.learned
        before, best = learned.checks[0].validation, learned.best
        return (
            f"{learned.steps:,} {self.unit}s, {learned.tokens:,} tokens read, in {learned.duration_s:.0f} s; "
            f"validation loss {before:.4f} -> {best.validation:.4f} nats ({self.unit} {best.step:,})"
        )


@dataclass(frozen=True)
class RecoveryFacts:
    """How a pruned model was recovered, and what that gained.

    prompts, positions: how many were learned from, and how many tokens they and their answers have. stages: the methods
    that were used, one after the other. scores: on the test split, of the 'full', the 'pruned' and the 'recovered'
    model. gained, missing: the recovered model less the pruned and less the full one, on the same examples.
    """

    prompts: int
    positions: int
    stages: tuple[Stage, ...]
    scores: Mapping[str, Score] = field(hash=False)
    gained: Difference
    missing: Difference

    @property
    def verdict(self) -> str:
        """In plain words whether it was worth it."""
        lost = self.scores["full"].fitness - self.scores["pruned"].fitness
        if all(stage.learned.best.step == 0 for stage in self.stages):
            return "learning never lowered the validation loss, so the pruned model is left as it was"
        if lost > 0:
            back = f", {self.gained.value / lost:.0%} of what pruning cost" if self.gained.value > 0 else ""
        else:
            back = ""
        gained = Paired(self.gained)
        if gained.sign > 0:
            return f"recovery gained {self.gained.value:.3f} on the test split{back}"
        if gained.sign < 0:
            return f"recovery lost {-self.gained.value:.3f} on the test split: keep the pruned model"
        told = f"{self.gained.value:+.3f} on the {self.gained.num_examples} examples of the test split"
        return f"no gain that could be told from luck ({told}; {needed(gained)})"


@dataclass(frozen=True)
class RecoveredModel:
    """A checkpoint that learned from the full model. figure: picture of the losses."""

    report: ExportReport
    facts: RecoveryFacts
    figure: Path

    @property
    def folder(self) -> Path:
        """Where the checkpoint is."""
        return self.report.folder

    def to_plain(self) -> Plain:
        """The export's report, with the other fields beside it."""
        return {**plain(self.report), **plain(self.facts), "figure": str(self.figure)}

    def _repr_html_(self) -> str:
        return _report_table("recovered", self.report) + scores_table("test split", self.facts.scores)


@dataclass(frozen=True)
class WrittenReport:
    """An HTML page that was written about runs. unfinished: folders of those that are not finished."""

    report: str
    bytes: int
    runs: int
    unfinished: tuple[str, ...]


def _report_table(title: str, report: ExportReport) -> str:
    rows = [
        ["folder", f"{report.folder} ({loader_label(report.loader)})"],
        ["parameters", f"{report.parameters_before:,} → {report.parameters_after:,}"],
        ["bytes", f"{report.bytes_before:,} → {report.bytes_after:,}"],
        ["largest difference of a logit after reloading", f"{report.max_logit_difference:.1e}"],
    ]
    return table(title, ["", ""], rows)
