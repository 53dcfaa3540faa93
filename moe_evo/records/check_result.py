"""Checks that the parts of a result.json fit together, so that what reads it need not ask."""

from __future__ import annotations

from collections.abc import Sequence

from moe_evo.config.task import SPLITS
from moe_evo.plain import PlainError
from moe_evo.records.result import FrontPoint, ModelFacts, Row, RunResult, Score
from moe_evo.shown import shown

_ROUNDING = 1e-9


def check_result(result: RunResult) -> None:
    """Raise PlainError where a result's parts contradict each other, or a number is none that it can be."""
    _check_model(result.model)
    _check_tasks(result)
    _check_search(result)
    keys = [row.key for row in result.rows]
    _expect({"full", "best"} <= set(keys), "rows", keys, "those of the full model and of the winner")
    for name in ("rows", "recovered"):
        rows: Sequence[Row] = getattr(result, name)
        _expect_distinct(f"{name}.key", [row.key for row in rows])
        for number, row in enumerate(rows):
            _check_row(row, result.model, f"{name}[{number}]")
    for number, point in enumerate(result.front):
        _check_point(point, result, f"front[{number}]")


def _check_model(model: ModelFacts) -> None:
    layers = len(model.num_experts)
    _expect(layers > 0, "model.num_experts", model.num_experts, "a number for each MoE layer")
    for name in ("top_k", "decoder_layers"):
        _expect(len(getattr(model, name)) == layers, f"model.{name}", getattr(model, name), f"{layers} numbers")
    fits = all(1 <= active <= number for active, number in zip(model.top_k, model.num_experts, strict=True))
    _expect(fits, "model.top_k", model.top_k, "numbers from 1 to that of experts")
    layers_ok = list(model.decoder_layers) == sorted(set(model.decoder_layers)) and model.decoder_layers[0] >= 0
    _expect(layers_ok, "model.decoder_layers", model.decoder_layers, "ascending numbers from 0")
    for name in ("num_expert_groups", "top_k_groups", "min_kept_per_group"):
        _expect(getattr(model, name) >= 1, f"model.{name}", getattr(model, name), "1 or more")


def _check_tasks(result: RunResult) -> None:
    _expect(bool(result.tasks), "tasks", result.tasks, "at least one")
    _expect_distinct("tasks.name", [task.name for task in result.tasks])
    for number, task in enumerate(result.tasks):
        known = set(task.examples) == set(SPLITS) and min(task.examples.values()) >= 0
        _expect(known, f"tasks[{number}].examples", task.examples, f"numbers for {', '.join(SPLITS)}")
    _expect(result.fitness in ("mean", "worst"), "fitness", result.fitness, "'mean' or 'worst'")
    _expect(result.router in ("exported", "eep"), "router", result.router, "'exported' or 'eep'")
    _expect(result.experts in ("own", "meo"), "experts", result.experts, "'own' or 'meo'")


def _check_search(result: RunResult) -> None:
    for name in ("seed", "evaluations", "failures", "stopped_early", "evaluation_s"):
        _expect(getattr(result.search, name) >= 0, f"search.{name}", getattr(result.search, name), "0 or more")
    counts = {} if result.gangs is None else result.gangs.counts
    _expect(min(counts.values(), default=0) >= 0, "gangs", counts, "numbers from 0")


def _check_row(row: Row, model: ModelFacts, where: str) -> None:
    experts = model.num_experts
    for name in ("num_kept", "top_k", "kept"):
        value = getattr(row, name)
        _expect(len(value) == len(experts), f"{where}.{name}", value, f"{len(experts)} values, one a MoE layer")
    for kept, active, slots, number in zip(row.num_kept, row.top_k, row.kept, experts, strict=True):
        _expect(1 <= active <= kept <= number, f"{where}.num_kept", kept, f"a number from top_k ({active}) to {number}")
        in_range = len(slots) == kept and min(slots) >= 0 and max(slots) < number
        _expect(in_range, f"{where}.kept", slots, f"{kept} experts from 0 to {number - 1}")
    for name in ("evaluations", "candidate"):
        _expect(getattr(row, name) >= 0, f"{where}.{name}", getattr(row, name), "0 or more")
    _expect(min(row.parents, default=0) >= 0, f"{where}.parents", row.parents, "numbers from 0")
    for name in ("parameters", "bytes"):
        value = getattr(row, name)
        _expect(value is None or value > 0, f"{where}.{name}", value, "1 or more")
    _expect(set(row.scores) <= set(SPLITS), f"{where}.scores", list(row.scores), f"some of {', '.join(SPLITS)}")
    for split, score in row.scores.items():
        _check_score(score, f"{where}.scores.{split}")


def _check_score(score: Score, where: str) -> None:
    is_ordered = score.low - _ROUNDING <= score.fitness <= score.high + _ROUNDING
    interval = [score.low, score.fitness, score.high]
    _expect(is_ordered, f"{where}.fitness", interval, "a number between low and high")
    for name in ("standard_error", "num_examples"):
        _expect(getattr(score, name) >= 0, f"{where}.{name}", getattr(score, name), "0 or more")


def _check_point(point: FrontPoint, result: RunResult, where: str) -> None:
    _check_row(point.row, result.model, f"{where}.row")
    expected = result.front[0].values.get("expected", {})
    has_quality = any(name.startswith("quality") for name in expected)
    _expect(has_quality, f"{where}.values", point.values, "what was 'expected' of the quality")
    for split, values in point.values.items():
        same = set(values) == set(expected)
        _expect(same or split != "expected", f"{where}.values.{split}", list(values), f"{', '.join(expected)}")
    _expect("expected" in point.values, f"{where}.values", list(point.values), "'expected' among them")


def _expect_distinct(where: str, names: Sequence[str]) -> None:
    _expect(len(set(names)) == len(names), where, names, "each once")


def _expect(condition: bool, where: str, got: object, expected: str) -> None:
    if not condition:
        raise PlainError(f"{where}: got {shown(got, 80)}, expected {expected}")
