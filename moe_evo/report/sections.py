"""The texts and tables of one run on a report's page, as plain values for the template."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import yaml

from moe_evo.config.task import SPLITS, fitness_label
from moe_evo.genomes.population import Evaluation
from moe_evo.records.folder import asdict_plain
from moe_evo.report.front import FrontTable, export_line, front_cells, front_picture
from moe_evo.report.lines import Line, kept_label, lines_of, parameters_label
from moe_evo.report.plan import count_label, time_label
from moe_evo.report.record import GangNow, Record
from moe_evo.report.table import experts_label
from moe_evo.report.task_scores import Cell, task_score, unit_of
from moe_evo.report.verdict import Remark, remarks, word_for

_MOST_EVENTS = 100

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class MetricRow:
    """One metric of one task on one split, a cell for each contender. counted: whether fitness is made of it."""

    task: str
    metric: str
    unit: str
    split: str
    counted: bool
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class TaskTable:
    """A table of all metrics; titles, keys: of the contenders, which are its columns."""

    titles: Sequence[str]
    keys: Sequence[str]
    metrics: Sequence[MetricRow]


@dataclass(frozen=True)
class FailureGroup:
    """Evaluations that failed for the same reason."""

    kind: str
    reason: str
    count: int
    candidates: str


@dataclass(frozen=True)
class GangTable:
    """Events of gangs. events: the latest, as (after, at, gang, kind, detail). left_out: number of earlier ones."""

    counts: Sequence[tuple[str, int]]
    reasons: Sequence[str]
    gangs: Sequence[GangNow]
    events: Sequence[tuple[str, str, int, str, str]]
    left_out: int


@dataclass(frozen=True)
class Section:
    """Everything that the template shows of one run.

    note: see `RunResult.search_note`. remarks: what the table means. front, picture: of a run with several objectives;
    the picture is an SVG.
    """

    number: int
    label: str
    folder: str
    finished: bool
    headline: Sequence[tuple[str, str, str]]
    lines: Sequence[Line]
    scale: tuple[float, float] | None
    note: str | None
    remarks: Sequence[Remark]
    facts: Facts
    versions: Facts
    tasks: TaskTable | None
    front: FrontTable | None
    picture: str
    failures: Sequence[FailureGroup]
    gangs: GangTable | None
    commands: Sequence[tuple[str, str]]
    config: str


def section(record: Record, number: int) -> Section:
    """Everything that the template shows of run `number`."""
    lines = lines_of(record)
    return Section(
        number=number,
        label=record.label,
        folder=str(record.folder),
        finished=record.is_finished,
        headline=_headline(record, lines),
        lines=lines,
        scale=_scale(lines),
        note=None if record.result is None else record.result.search_note,
        remarks=[] if record.result is None else remarks(record.result),
        facts=_facts(record),
        versions=_versions(record),
        tasks=task_table(record),
        front=front_cells(record.result) if record.result is not None and record.result.front else None,
        picture=front_picture(record.result) if record.result is not None else "",
        failures=_failures(record),
        gangs=_gangs(record),
        commands=commands(record),
        config=yaml.safe_dump(asdict_plain(record.config), sort_keys=False, allow_unicode=True),
    )


def _headline(record: Record, lines: list[Line]) -> list[tuple[str, str, str]]:
    """The main figures, at the top of the page, as (name, value, remark)."""
    best, full = _line(lines, "best"), _line(lines, "full")
    if record.result is None:
        done = f"{len(record.outcomes)} of {record.search.evaluations - record.recovery_cost}"
        shown = [("evaluations done", done, "this run is not finished")]
        found = None if record.best is None else record.outcomes[record.best]
        if isinstance(found, Evaluation):
            remark = "" if record.full is None else f"full model {record.full.fitness:.3f}"
            shown.append((f"best {fitness_label(record.config.tasks)}, search split", f"{found.fitness:.3f}", remark))
        return shown
    if best is None:
        return []
    shown = []
    interval = best.interval("test")
    if interval is not None:
        shown.append(
            ("test score of the winner", f"{best.test:.3f}", "95 % interval {1:.3f} to {2:.3f}".format(*interval))
        )
    whole = None if full is None else full.interval("test")
    if whole is not None:
        shown.append(("full model", f"{whole[0]:.3f}", f"95 % interval {whole[1]:.3f} to {whole[2]:.3f}"))
    if record.result.against_full is not None:
        paired = record.result.against_full.overall
        low, high = paired.difference.low, paired.difference.high
        remark = f"{word_for(paired)}, 95 % interval {low:+.3f} to {high:+.3f}"
        shown.append(("winner minus full model, test split", f"{paired.difference.value:+.3f}", remark))
    if record.result.expected is not None:
        remark = "the best of several validation scores is partly luck"
        shown.append(("expected of the winner on new examples", f"{record.result.expected:.3f}", remark))
    share = "" if best.kept_share is None else f"{100 * best.kept_share:.0f} % of all experts"
    shown.append(("experts kept a layer", kept_label(best), share))
    if best.parameters:
        share = "" if best.parameters_share is None else f"{100 * best.parameters_share:.0f} % of "
        whole_model = "" if full is None else f"{share}the full model's {parameters_label(full)}"
        shown.append(("parameters", count_label(best.parameters), whole_model))
    search = record.result.search
    spent = time_label(search.evaluation_s / 3600)
    shown.append(("evaluations", str(search.evaluations), f"{spent} of evaluation, {search.failures} failed"))
    return shown


def _line(lines: list[Line], key: str) -> Line | None:
    return next((line for line in lines if line.key == key), None)


def _scale(lines: list[Line]) -> tuple[float, float] | None:
    """The range of all test intervals with a little margin, for drawing them one below the other."""
    intervals = [interval for line in lines if (interval := line.interval("test")) is not None]
    if not intervals:
        return None
    low, high = min(one[1] for one in intervals), max(one[2] for one in intervals)
    margin = 0.04 * (high - low) or 0.5
    return (low - margin, high + margin)


def _facts(record: Record) -> Facts:
    """Model, tasks and options of the search."""
    search, model = record.search, record.config.model
    facts = [("model", model.path + (f" ({model.revision})" if model.revision else ""))]
    if record.result is not None:
        shape = record.result.model
        facts += [
            ("family", shape.family),
            ("MoE layers", str(len(shape.num_experts))),
            ("experts a layer", f"{experts_label(shape.num_experts)}, {experts_label(shape.top_k)} active a token"),
        ]
        full = _line(lines_of(record), "full")
        if full is not None and full.parameters:
            facts.append(("parameters", count_label(full.parameters)))
        facts += [
            (f"task {task.name}", f"{task.kind}, {task.metric}; "
             + ", ".join(f"{size} {split}" for split, size in task.examples.items()))
            for task in record.result.tasks
        ]  # fmt: skip
    else:
        facts.append(("tasks", ", ".join(record.task_names)))
    kept = experts_label(search.num_kept) if isinstance(search.num_kept, list) else search.kept_label
    facts += [
        (fitness_label(record.config.tasks), f"{record.config.evaluation.fitness} over tasks, higher is better"),
        ("algorithm", search.algorithm),
        ("experts to keep", kept),
        *([("objectives", ", ".join(search.objectives))] if search.has_front else []),
        ("budget", f"{search.evaluations} evaluations, seed {search.seed}"),
        *_finalists(record),
        ("router", model.router),
        ("number format", model.dtype),
        ("folder", str(record.folder)),
    ]
    return facts


def _finalists(record: Record) -> Facts:
    """Which finalists were recovered, where any were."""
    found = None if record.result is None else record.result.finalists
    return [] if found is None else [("finalists", str(found))]


def _versions(record: Record) -> Facts:
    """Versions of the software, and hashes of the model and data."""
    if record.result is None:
        return []
    hashes = [("model hash", str(record.result.model.hash))]
    hashes += [(f"data of {task.name}", task.hash) for task in record.result.tasks]
    winner = record.result.row("best")
    if winner is not None:
        hashes.append(("winner's digest", winner.digest))
    return [*record.result.software.items(), *hashes]


def task_table(record: Record) -> TaskTable | None:
    """Every metric of every task on every split, with 95 % intervals where the metric is a share.

    For other metrics an interval is known only for the fitness, so it is shown only where there is a single task.
    """
    if record.result is None:
        return None
    full, *others = record.result.lines
    rows, tasks = [full, *others[::-1]], record.result.tasks  # beside the full model the winner
    metrics = []
    for task in tasks:
        prefix = f"{task.name}/"
        told = (name for row in rows for score in row.scores.values() for name in score.metrics)
        names = dict.fromkeys(name for name in told if name.startswith(prefix))
        for name in sorted(names, key=lambda one: one != prefix + task.metric):
            metric = name.removeprefix(prefix)
            for split in reversed(SPLITS):
                cells = [task_score(row, split, task, metric, num_tasks=len(tasks)) for row in rows]
                if any(cell is not None for cell in cells):
                    is_counted = metric == task.metric
                    metrics.append(MetricRow(task.name, metric, unit_of(task, metric), split, is_counted, cells))
    return TaskTable([row.title for row in rows], [row.key for row in rows], metrics)


def _failures(record: Record) -> list[FailureGroup]:
    """Failed evaluations by kind and reason, the most frequent first."""
    failures = record.failures
    counts = Counter((one.kind, one.reason) for one in failures.values())
    return [
        FailureGroup(kind, reason, count, _listed(
            [number for number, one in failures.items() if (one.kind, one.reason) == (kind, reason)]
        ))
        for (kind, reason), count in counts.most_common()
    ]  # fmt: skip


def _listed(numbers: list[int]) -> str:
    head = ", ".join(f"#{number}" for number in sorted(numbers)[:8])
    return head + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _gangs(record: Record) -> GangTable | None:
    """The number of gang events of each kind, why gangs broke, their last status, and the latest events."""
    summary = record.gang_summary()
    if summary is None:
        return None
    began = record.gang_events[0][0] if record.gang_events else 0.0
    return GangTable(
        counts=[(kind.replace("_", " "), count) for kind, count in summary.counts.items()],
        reasons=summary.reasons,
        gangs=record.gangs,
        events=[
            (f"+{time_label((at - began) / 3600)}", str(datetime.fromtimestamp(at).replace(microsecond=0)), gang,
             kind.replace("_", " "), detail)
            for at, gang, kind, detail in record.gang_events[-_MOST_EVENTS:]
        ],
        left_out=max(0, len(record.gang_events) - _MOST_EVENTS),
    )  # fmt: skip


def commands(record: Record) -> list[tuple[str, str]]:
    """Commands to continue the run, to show it, to export it and to repeat it, each with what it does."""
    folder = shlex.quote(str(record.folder))
    if record.result is None:
        return [("go on with this run", f"moe-evo search --resume {folder}")]
    target = shlex.quote(str(record.folder / "checkpoint"))
    shown = [("table, kept experts and files in the terminal", f"moe-evo show {folder}")]
    is_stock = record.result.runs_stock_experts
    winner = record.result.row("best")
    if is_stock and (record.result.router == "exported" or (winner is not None and winner.is_pruning)):
        shown.append(("the smaller checkpoint, in stock format", f"moe-evo export {folder} --to {target}"))
    if is_stock and record.result.row("best_pruning") is not None:
        pruned = shlex.quote(str(record.folder / "checkpoint-pruned"))
        what = "the same of the best that only prunes"
        shown.append((what, f"moe-evo export {folder} --which best_pruning --to {pruned}"))
    if is_stock and record.result.front:
        shown.append(("a point of the front as a checkpoint", export_line(record.folder, record.result)))
    again = shlex.quote(f"{record.folder}-again")
    software = record.result.software
    releases = {name: version.split("+")[0] for name, version in software.items()}  # package indexes have no '+cpu'
    pinned = " ".join(f"{name}=={version}" for name, version in releases.items() if name not in ("python", "moe_evo"))
    shown.append(("score the winner anew", f"moe-evo evaluate {folder} --split test"))
    if pinned:
        ours = f"Python {software.get('python', 'unknown')}, moe_evo {software.get('moe_evo', 'unknown')}"
        shown.append((f"the versions of this run ({ours})", f"pip install {pinned}"))
    return [
        *shown,
        ("the same search again, in a new folder", f"moe-evo search {folder} --folder {again}"),
    ]
