"""The plain data that a report's page draws with JavaScript: curves, maps of experts, lineage, configs.

The data of each run are compressed separately, so that a browser decompresses only those of the run that it shows.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from moe_evo.config.task import fitness_label
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, Outcome
from moe_evo.records.folder import asdict_plain
from moe_evo.report.lines import Line
from moe_evo.report.record import Record
from moe_evo.searches.base import Phase
from moe_evo.shown import printable

MOST_POINTS = 4000
"""About the most evaluations of a run that are drawn; improvements and finalists are always drawn."""

_MOST_FAILURES = 200


def packed(data: Any) -> str:
    """JSON, gzipped and in base64; equal data give equal text."""
    text = json.dumps(drawable(data), separators=(",", ":"), ensure_ascii=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), compresslevel=9, mtime=0)).decode()


def drawable(data: Any) -> Any:
    """The data with None for numbers that JSON does not have, and without control characters in texts."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, Mapping):
        return {printable(str(key)): drawable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [drawable(value) for value in data]
    return data


def run_payload(record: Record) -> dict[str, Any]:
    """The data for all drawings of one run."""
    return {
        "curve": curve(record),
        "maps": expert_maps(record),
        "lineage": lineage(record),
        "config": flat({key: value for key, value in asdict_plain(record.config).items() if key != "folder"}),
    }


def index_payload(records: Sequence[Record], lines: Sequence[Line]) -> dict[str, Any]:
    """The data for drawings over all runs: one entry for each line of their tables, with the number of its run."""
    numbers = {record.label: number for number, record in enumerate(records)}
    return {
        "runs": [{"label": one.label, "finished": one.is_finished} for one in records],
        "lines": [
            {
                "run": numbers[line.run],
                "group": f"{line.tasks}; {line.model}",
                "key": line.key,
                "title": line.title,
                "kept": line.num_kept,
                "share": line.kept_share,
                "parameters": line.parameters,
                "seed": line.seed,
                "algorithm": line.algorithm,
                **{split: line.interval(split) or _alone(line, split) for split in ("search", "validation", "test")},
            }
            for line in lines
        ],
    }


def _alone(line: Line, split: str) -> list[float] | None:
    score = getattr(line, split)
    return None if score is None else [score]


def curve(record: Record) -> dict[str, Any]:
    """The learning curve: fitness of each evaluation, in the order in which they finished, from position 1.

    label: see `fitness_label`. best and random_best: (position, fitness) where the best so far rises, and at the end.
    validation: (position, candidate, fitness) of finalists; none where the search maximised another metric, which the
    same axis cannot show. failed: (position, candidate, reason).
    """
    positions = {number: place for place, number in enumerate(record.outcomes, start=1)}
    evaluated = {number: one for number, one in record.outcomes.items() if isinstance(one, Evaluation)}
    best = rises(list(record.outcomes.values()))
    shown = _thinned(list(evaluated), keep={place for place, _ in best}, positions=positions, record=record)
    operators = sorted({record.ancestry[number].operator for number in shown})
    phases = record.phases()
    starts = [start for _, start in phases]
    has_one_metric = not any(task.sets_search_metric for task in record.config.tasks)
    return {
        "label": fitness_label(record.config.tasks),
        "operators": operators,
        "phase_names": [phase.name for phase, _ in phases],
        "phase_tones": _tones([phase for phase, _ in phases]),
        "positions": [positions[number] for number in shown],
        "numbers": [] if all(positions[one] == one + 1 for one in shown) else shown,
        "fitness": [_short(evaluated[number].fitness) for number in shown],
        "operator": [operators.index(record.ancestry[number].operator) for number in shown],
        "phase": [sum(number >= first for first in starts[1:]) for number in shown],
        "best": best,
        "random_best": rises(list(record.random.values())),
        "validation": [
            (positions[number], number, _short(one.fitness))
            for number, one in record.validation.items()
            if isinstance(one, Evaluation) and number in positions and has_one_metric
        ],
        "failed": [(positions[number], number, one.reason) for number, one in record.failures.items()][:_MOST_FAILURES],
        "full": None if record.full is None else _short(record.full.fitness),
        "budget": record.search.evaluations,
        "total": len(record.outcomes),
    }


def _tones(phases: Sequence[Phase]) -> list[str]:
    """The colour of each phase, by its name in report.css: one for the first, for other pruning, and for merging."""
    only_prune = ["pruning" if place else "initial" for place in range(len(phases))]
    return [tone if phase.only_prunes else "merging" for tone, phase in zip(only_prune, phases, strict=True)]


def rises(outcomes: Sequence[Outcome]) -> list[tuple[int, float]]:
    """(position, best fitness so far) wherever the latter rises, and at the end."""
    fitness = [one.fitness if isinstance(one, Evaluation) and not one.is_stopped else -math.inf for one in outcomes]
    best = list(accumulate(fitness, max))
    rises = [
        (place, _short(value))
        for place, value in enumerate(best, start=1)
        if math.isfinite(value) and (place in (1, len(best)) or value > best[place - 2])
    ]
    return rises


def _thinned(numbers: Sequence[int], *, keep: set[int], positions: Mapping[int, int], record: Record) -> list[int]:
    """About MOST_POINTS candidates, evenly spaced, with all finalists and all candidates at positions in `keep`."""
    step = math.ceil(len(numbers) / MOST_POINTS) or 1
    return [
        number
        for place, number in enumerate(numbers)
        if place % step == 0 or positions[number] in keep or number in record.validation
    ]


def _short(value: float) -> float:
    """A number rounded to the digits that a plot shows."""
    return float(f"{value:.5g}")


def expert_maps(record: Record) -> list[dict[str, Any]]:
    """The experts that each contender keeps: for each MoE layer every expert's weight in thousandths.

    A weight is None where the layer has no such expert. Contenders with merges also have, for each expert, the slot
    in which its weight is largest.
    """
    if record.result is None:
        genome = record.genomes.get("best")
        return [] if genome is None else [_map("best", "best so far", genome, list(range(len(genome.layers))))]
    model = record.result.model
    maps = []
    front = [point.row for point in record.result.front]
    for row in [*reversed(record.result.rows), *front]:  # the winner first
        if row.key == "full":
            continue
        genome = record.genomes.get(row.key)
        if genome is None or genome.digest != row.digest:
            kept = [sorted(set(layer)) for layer in row.kept]
            genome = Genome.from_kept(kept, model.num_experts, [1] * len(kept))
        one = _map(row.key, row.title, genome, model.decoder_layers)
        maps.append(one | {"top_k": list(row.top_k), "num_kept": list(row.num_kept)})
    return maps


def _map(key: str, title: str, genome: Genome, decoder_layers: Sequence[int]) -> dict[str, Any]:
    widest = max(layer.num_experts for layer in genome.layers)
    weights, slots = [], []
    for layer in genome.layers:
        missing = [None] * (widest - layer.num_experts)
        largest = np.abs(layer.expert_merging).argmax(axis=0)
        signed = layer.expert_merging[largest, np.arange(layer.num_experts)]
        weights.append([round(1000 * float(weight)) for weight in signed] + missing)
        slots.append([int(slot) for slot in largest] + missing)
    return {
        "key": key,
        "title": title,
        "layers": list(decoder_layers),
        "weights": weights,
        "slots": [] if genome.is_pruning else slots,
        "num_kept": list(genome.num_kept),
        "top_k": list(genome.top_k),
    }


def lineage(record: Record) -> dict[str, Any]:
    """The winner's ancestors as columns: number, position, operator, fitness and parents of each.

    label: see `fitness_label`.
    """
    ancestors = record.ancestors()
    positions = {number: place for place, number in enumerate(record.outcomes, start=1)}
    operators = sorted({record.ancestry[number].operator for number in ancestors})
    outcomes = (record.outcomes.get(number) for number in ancestors)
    return {
        "label": fitness_label(record.config.tasks),
        "winner": record.best,
        "operators": operators,
        "number": ancestors,
        "position": [positions.get(number) for number in ancestors],
        "operator": [operators.index(record.ancestry[number].operator) for number in ancestors],
        "fitness": [_short(one.fitness) if isinstance(one, Evaluation) else None for one in outcomes],
        "parents": [record.ancestry[number].parents for number in ancestors],
    }


def flat(data: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as one dict, with keys as on the command line, such as `search.num_kept`."""
    if isinstance(data, Mapping) and data:
        parts = [flat(value, f"{path}.{key}" if path else str(key)) for key, value in data.items()]
    elif isinstance(data, list) and any(isinstance(one, Mapping) for one in data):
        parts = [flat(value, f"{path}[{index}]") for index, value in enumerate(data)]
    else:
        return {path: data}
    return {key: value for part in parts for key, value in part.items()}
