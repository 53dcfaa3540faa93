"""What the page of a report says of one run in words and tables: values for the template, all of them plain."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import yaml

from moe_evo.genomes.population import Evaluation
from moe_evo.records.result import Score, runs_stock_experts
from moe_evo.report.lines import SPLITS, Line, kept_label, lines_of, parameters_label
from moe_evo.report.plan import count_label, time_label
from moe_evo.report.record import Record
from moe_evo.report.table import experts_label
from moe_evo.tasks.kinds import UNITS

_MOST_EVENTS = 100

Facts = list[tuple[str, str]]


def section(record: Record, number: int) -> dict[str, Any]:
    """Everything that the template shows of run `number`."""
    lines = lines_of(record)
    return {
        "number": number,
        "label": record.label,
        "folder": str(record.folder),
        "finished": record.is_finished,
        "headline": _headline(record, lines),
        "lines": lines,
        "scale": _scale(lines),
        "facts": _facts(record),
        "versions": _versions(record),
        "tasks": task_table(record),
        "failures": _failures(record),
        "gangs": _gangs(record),
        "commands": commands(record),
        "config": yaml.safe_dump(dict(record.config), sort_keys=False, allow_unicode=True),
    }


def _headline(record: Record, lines: list[Line]) -> list[tuple[str, str, str]]:
    """Figures that are seen first, as (name, value, remark)."""
    best, full = _line(lines, "best"), _line(lines, "full")
    if record.result is None:
        done = f"{len(record.outcomes)} of {record.search.evaluations}"
        shown = [("evaluations done", done, "this run is not finished")]
        if best is not None and best.search is not None:
            remark = "" if full is None or full.search is None else f"full model {full.search:.3f}"
            shown.append(("best on the search split", f"{best.search:.3f}", remark))
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
    lost = (record.result.get("winners_curse") or {}).get("search_test")
    if lost is not None:
        remark = "of its lead over the full model, 95 % interval {low:.3f} to {high:.3f}".format(**lost)
        shown.append(("lost from search to test", f"{lost['value']:.3f}", remark))
    share = "" if best.kept_share is None else f"{100 * best.kept_share:.0f} % of all experts"
    shown.append(("experts kept a layer", kept_label(best), share))
    if best.parameters:
        share = "" if best.parameters_share is None else f"{100 * best.parameters_share:.0f} % of "
        whole_model = "" if full is None else f"{share}the full model's {parameters_label(full)}"
        shown.append(("parameters", count_label(best.parameters), whole_model))
    search = record.result["search"]
    spent = time_label(search["evaluation_s"] / 3600)
    shown.append(("evaluations", str(search["evaluations"]), f"{spent} of evaluation, {search['failures']} failed"))
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
    """What was searched, on what, how."""
    search, model = record.search, record.config["model"]
    facts = [("model", str(model["path"]) + (f" ({model['revision']})" if model.get("revision") else ""))]
    if record.result is not None:
        shape = record.result["model"]
        facts += [
            ("family", shape["family"]),
            ("MoE layers", str(len(shape["num_experts"]))),
            (
                "experts a layer",
                f"{experts_label(shape['num_experts'])}, {experts_label(shape['top_k'])} active a token",
            ),
        ]
        full = _line(lines_of(record), "full")
        if full is not None and full.parameters:
            facts.append(("parameters", count_label(full.parameters)))
        facts += [
            (f"task {task['name']}", f"{task['kind']}, {task['metric']}; "
             + ", ".join(f"{size} {split}" for split, size in task["examples"].items()))
            for task in record.result["tasks"]
        ]  # fmt: skip
    else:
        facts.append(("tasks", ", ".join(record.task_names)))
    kept = search.num_kept
    facts += [
        ("fitness", f"{record.config['evaluation']['fitness']} over tasks, higher is better"),
        ("algorithm", search.algorithm),
        ("experts to keep", str(kept) if isinstance(kept, int) else experts_label(kept)),
        ("budget", f"{search.evaluations} evaluations, seed {search.seed}"),
        ("router", str(model["router"])),
        ("number format", str(model["dtype"])),
        ("folder", str(record.folder)),
    ]
    return facts


def _versions(record: Record) -> Facts:
    """Software, and hashes of what was read."""
    if record.result is None:
        return []
    hashes = [("model hash", str(record.result["model"]["hash"]))]
    hashes += [(f"data of {task['name']}", str(task["hash"])) for task in record.result["tasks"]]
    winner = next((row for row in record.result["rows"] if row["key"] == "best"), None)
    if winner is not None:
        hashes.append(("winner's digest", winner["digest"]))
    return [*record.result["software"].items(), *hashes]


def task_table(record: Record) -> dict[str, Any] | None:
    """Every metric of every task on every split, with 95 % intervals where the metric is a share.

    Of a metric that is no share, the interval is known of the fitness alone; so it is shown for a single task.
    """
    if record.result is None:
        return None
    rows, tasks = record.result["rows"][::-1], record.result["tasks"]  # the winner first
    metrics = []
    for task in tasks:
        prefix = f"{task['name']}/"
        names = dict.fromkeys(
            name
            for row in rows
            for score in row["scores"].values()
            for name in score["metrics"]
            if name.startswith(prefix)
        )
        for name in sorted(names, key=lambda one: one != prefix + task["metric"]):
            metric = name.removeprefix(prefix)
            is_counted = metric == task["metric"]
            for split in reversed(SPLITS):
                cells = [_cell(row, split, name, metric, task, alone=is_counted and len(tasks) == 1) for row in rows]
                if any(cell is not None for cell in cells):
                    metrics.append(
                        {"task": task["name"], "metric": metric, "unit": UNITS.get(metric, ""), "split": split,
                         "counted": is_counted, "cells": cells}
                    )  # fmt: skip
    return {"titles": [row["title"] for row in rows], "keys": [row["key"] for row in rows], "metrics": metrics}


def _cell(
    row: Mapping[str, Any], split: str, name: str, metric: str, task: Mapping[str, Any], *, alone: bool
) -> tuple[float, float | None, float | None] | None:
    """Value, low and high; alone: whether the row's fitness is this very metric."""
    score = row["scores"].get(split)
    value = None if score is None else score["metrics"].get(name)
    if score is None or value is None or not math.isfinite(value):
        return None
    if alone:
        return (value, score["low"], score["high"])
    number = task["examples"][split]
    if metric in UNITS or not 0 <= value <= 1 or not number:
        return (value, None, None)
    error = math.sqrt(value * (1 - value) / number)
    wilson = Score.of(Evaluation(value, standard_error=error, num_examples=number), is_share=True)
    return (value, wilson.low, wilson.high)


def _failures(record: Record) -> list[dict[str, Any]]:
    """Failed evaluations by kind and reason, the most frequent first."""
    failures = record.failures
    counts = Counter((one.kind, one.reason) for one in failures.values())
    return [
        {
            "kind": kind,
            "reason": reason,
            "count": count,
            "candidates": _listed(
                [number for number, one in failures.items() if (one.kind, one.reason) == (kind, reason)]
            ),
        }
        for (kind, reason), count in counts.most_common()
    ]


def _listed(numbers: list[int]) -> str:
    head = ", ".join(f"#{number}" for number in sorted(numbers)[:8])
    return head + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _gangs(record: Record) -> dict[str, Any] | None:
    """Counts of what happened to gangs, why they broke, how they were last, and the latest events."""
    summary = record.gang_summary()
    if summary is None:
        return None
    began = record.gang_events[0][0] if record.gang_events else 0.0
    status = record.gangs or {}
    return {
        "counts": [(kind.replace("_", " "), count) for kind, count in summary.items() if isinstance(count, int)],
        "reasons": [str(reason) for reason in summary.get("reasons", [])],
        "gangs": [
            {key: one.get(key, "") for key in ("number", "node", "evaluations", "evaluations_per_s", "restarts")}
            for one in status.get("gangs", [])
        ],
        "events": [
            (f"+{time_label((at - began) / 3600)}", str(datetime.fromtimestamp(at).replace(microsecond=0)), gang,
             kind.replace("_", " "), detail)
            for at, gang, kind, detail in record.gang_events[-_MOST_EVENTS:]
        ],
        "left_out": max(0, len(record.gang_events) - _MOST_EVENTS),
    }  # fmt: skip


def commands(record: Record) -> list[tuple[str, str]]:
    """What to type to go on, to look again, to export, and to run the same again, each with what it does."""
    folder = shlex.quote(str(record.folder))
    if record.result is None:
        return [("go on with this run", f"moe-evo search --resume {folder}")]
    target = shlex.quote(str(record.folder / "checkpoint"))
    shown = [("table, kept experts and files in the terminal", f"moe-evo show {folder}")]
    is_stock = runs_stock_experts(record.result)
    if is_stock and (record.result["router"] == "exported" or _only_prunes(record, "best")):
        shown.append(("the smaller checkpoint, in stock format", f"moe-evo export {folder} --to {target}"))
    if is_stock and any(row["key"] == "best_pruning" for row in record.result["rows"]):
        pruned = shlex.quote(str(record.folder / "checkpoint-pruned"))
        what = "the same of the best that only prunes"
        shown.append((what, f"moe-evo export {folder} --which best_pruning --to {pruned}"))
    again = shlex.quote(f"{record.folder}-again")
    software = record.result["software"]
    releases = {name: version.split("+")[0] for name, version in software.items()}  # an index knows no '+cpu'
    pinned = " ".join(f"{name}=={version}" for name, version in releases.items() if name not in ("python", "moe_evo"))
    return [
        *shown,
        ("score the winner anew", f"moe-evo evaluate {folder} --split test"),
        (
            f"the versions of this run (Python {software['python']}, moe_evo {software['moe_evo']})",
            f"pip install {pinned}",
        ),
        ("the same search again, in a new folder", f"moe-evo search {folder} --folder {again}"),
    ]


def _only_prunes(record: Record, key: str) -> bool:
    assert record.result is not None
    return any(row["key"] == key and row["is_pruning"] for row in record.result["rows"])
