"""The rows of a journal's tables: how candidates and outcomes become columns, and values of their types again.

SQLite takes any value in any column, so every one is checked on the way back; what does not fit is a ValueError.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from moe_evo.files.json_text import json_of
from moe_evo.genomes.file import genome_from_bytes, genome_to_bytes, unpacked
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, ExampleScores, Outcome
from moe_evo.plain import PlainError, value_of
from moe_evo.tasks.samples import Sample

GangEvent = tuple[float, int, str, str]
"""Seconds since the epoch, gang, kind, detail."""


def candidate_columns(search: str, one: Candidate) -> tuple[object, ...]:
    """A candidate as values of all columns of its table."""
    return (search, one.number, one.genome.digest, one.operator, json.dumps(one.parents), genome_to_bytes(one.genome))


def candidate_of(number: object, genome: object, digest: object, operator: object, parents: object) -> Candidate:
    """The candidate of these columns; raises ValueError."""
    made_by, made_of = ancestry_of(operator, parents)
    known = value_of(str, digest, "digest")  # to make it again takes longer than to read the genome
    return Candidate(number_of(number), genome_from_bytes(value_of(bytes, genome, "genome"), known), made_by, made_of)


def ancestry_of(operator: object, parents: object) -> tuple[str, tuple[int, ...]]:
    """Operator and parents of a candidate; raises ValueError."""
    numbers = value_of(tuple[int, ...], json_of(value_of(str, parents, "parents")), "parents")
    return value_of(str, operator, "operator"), tuple(map(number_of, numbers))


def number_of(value: object) -> int:
    """The number of a candidate; raises ValueError."""
    number = value_of(int, value, "number")
    if number < 0:
        raise PlainError(f"number: got {number}, expected 0 or more")
    return number


def gang_event_of(columns: Sequence[object]) -> GangEvent:
    """The event of a gang in these columns; raises ValueError."""
    at, gang, kind, detail = columns
    told = value_of(float, at, "at"), value_of(int, gang, "gang")
    return (*told, value_of(str, kind, "kind"), value_of(str, detail, "detail"))


def outcome_columns(outcome: Outcome) -> tuple[object, ...]:
    """An outcome as values of the table's columns from fitness to failure_reason."""
    if isinstance(outcome, EvaluationFailure):
        return (None,) * 6 + (outcome.kind, outcome.reason)
    metrics = json.dumps(dict(outcome.metrics), sort_keys=True)
    scores = None if outcome.scores is None else zlib.compress(save(dict(outcome.scores)))
    numbers = (outcome.fitness, outcome.tie_break, outcome.standard_error, outcome.num_examples)
    return (*numbers, metrics, scores, None, None)


@dataclass(frozen=True)
class _Numbers:
    """The columns of an evaluation that are numbers."""

    fitness: float
    tie_break: float
    standard_error: float
    num_examples: int

    def __post_init__(self) -> None:
        if self.standard_error < 0 or self.num_examples < 0:
            raise PlainError(f"outcomes: got {self}, expected numbers from 0")


def outcome_of(split: object, columns: Sequence[object]) -> Outcome:
    """The outcome in these columns, in which the duration comes last; raises ValueError."""
    *numbers, metrics, scores, kind, reason, duration = columns
    duration_s = value_of(float, duration, "duration_s")
    if kind is not None:
        return EvaluationFailure(
            value_of(str, kind, "failure_kind"), value_of(str, reason, "failure_reason"), duration_s
        )
    given = dict(zip(("fitness", "tie_break", "standard_error", "num_examples"), numbers, strict=True))
    sample = Sample.read(value_of(str, split, "split"))
    return Evaluation(
        **vars(value_of(_Numbers, given, "outcomes")),
        duration_s=duration_s,
        metrics=value_of(dict[str, float], json_of(value_of(str, metrics, "metrics")), "metrics"),
        scores=None if scores is None else _scores(value_of(bytes, scores, "scores")),
        sample=None if sample is None else sample.number,
    )


def _scores(content: bytes) -> ExampleScores:
    try:
        found: Mapping[str, np.ndarray[Any, Any]] = load(unpacked(content))
    except KeyError as error:  # a type of numbers that numpy has not
        raise PlainError(f"scores: got numbers of the type {error}, expected float64") from error
    for task, scores in found.items():
        if scores.ndim != 1 or scores.dtype.kind != "f" or not np.isfinite(scores).all():
            raise PlainError(f"scores.{task}: got {scores.dtype} of shape {scores.shape}, expected finite numbers (N,)")
    return found
