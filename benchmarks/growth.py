"""What does an evaluation's time grow with?

    python benchmarks/growth.py [--to growth.png]

A small random Mixtral and prompts of equal length, of which one thing is varied at a time. Random prunings,
which share nothing but what comes before the first MoE block, are scored with no states kept; the time is the
median of some of them, in CPU time of the process (one thread), which other processes disturb least. A
slope is the exponent p of time ~ factor ** p over the whole range; beside it stands that of the operations
that are needed (see `models.Work`). What is proportional has slope 1. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from figures import print_figures
from models import EMBEDDED, Work, evaluate, loaded, random_model
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.tasks.data import TaskData, check_tasks

TOLERANCE = 0.1
TOKENS_BESIDE = 2  # the beginning of a row, and the answer's space


@dataclass(frozen=True)
class Point:
    """What is evaluated: a model, a task and a request."""

    layers: int = 4
    experts: int = 8
    kept: int = 4
    examples: int = 200
    tokens: int = 32
    population: int = 1


BASE = Point()
FEW_EXAMPLES = replace(BASE, examples=50)
MANY_EXPERTS = replace(BASE, experts=64)
FACTORS = {
    "layers": [replace(BASE, layers=n) for n in (2, 4, 8, 16)],
    "experts": [replace(BASE, experts=n) for n in (8, 16, 32, 64)],
    "kept": [replace(MANY_EXPERTS, kept=n) for n in (4, 8, 16, 32, 64)],
    "examples": [replace(BASE, examples=n) for n in (50, 100, 200, 400, 800)],
    "tokens": [replace(BASE, examples=100, tokens=n) for n in (16, 32, 64, 128, 256)],
    "population": [replace(FEW_EXAMPLES, population=n) for n in (1, 2, 4, 8, 16, 32)],
}
SHOWN = {
    "layers": "layers",
    "experts": "experts, 4 kept",
    "kept": "experts kept of 64",
    "examples": "examples",
    "tokens": "tokens an example",
    "population": "genomes in a request",
}


def task_of(point: Point, folder: Path) -> TaskData:
    """Random prompts of so many tokens, with two answers of one token each."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    texts = {tokenizer.decode([token]) for token in range(len(tokenizer))}
    words = sorted(text for text in texts if text[:1] == " " and len(tokenizer(text)["input_ids"]) == 2)
    rng = np.random.default_rng(0)
    data = folder / f"{point.examples}x{point.tokens}"
    data.mkdir(exist_ok=True)
    for split, number in (("search", point.examples), ("validation", 2), ("test", 2)):
        rows = [
            {"prompt": "".join(rng.choice(words, point.tokens - TOKENS_BESIDE)), "choices": [" yes", " no"], "label": 0}
            for _ in range(number)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return check_tasks([TaskConfig(data=str(data))])[0]


def measure(point: Point, path: str, task: TaskData, number: int) -> tuple[float, float]:
    """Seconds of an evaluation of all genomes of the request, and the operations that it needs."""
    evaluator = loaded(path, [task], EvaluationConfig(state_cache_gib=0))
    space = SearchSpace.build(evaluator.model.shape, num_kept=point.kept)
    rng = np.random.default_rng(0)
    requests = [[random_pruning(space, rng) for _ in range(point.population)] for _ in range(number)]
    evaluate(evaluator, requests[0][:1])  # the first one makes tokens and batches, too
    work, seconds = Work(evaluator), []
    for request in requests:
        started = time.process_time()
        evaluate(evaluator, request)
        seconds.append(time.process_time() - started)
    del evaluator
    gc.collect()
    return float(np.median(seconds)), sum(map(work.of, requests[0]))


def slope(factor: Sequence[float], values: Sequence[float]) -> float:
    """Of the logarithms."""
    return float(np.polyfit(np.log(factor), np.log(values), 1)[0])


def write_figure(found: dict[str, dict[str, list[float]]], to: str) -> None:
    """Time against each factor, both relative to the first point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(2, 3, sharey=True).flat, found.items(), strict=True):
        for label, style in (("time", "o-"), ("work", "--")):
            axes.loglog(lines["factor"], np.array(lines[label]) / lines[label][0], style, label=label)
        axes.set_xticks(lines["factor"], [f"{value:g}" for value in lines["factor"]])
        axes.set_xlabel(SHOWN[name])
        axes.minorticks_off()
    figure.supylabel("relative to the first point")
    figure.axes[0].legend()
    figure.savefig(to, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", nargs="+", default=list(FACTORS), choices=list(FACTORS))
    parser.add_argument("--genomes", type=int, default=5, help="requests of which the median is taken")
    parser.add_argument("--to", help="write the figure to this file")
    options = parser.parse_args(argv)
    found: dict[str, dict[str, list[float]]] = {}
    table = Table("factor", "range", "s", "work", "slope", "of work", title="time of an evaluation")
    slopes: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[tuple[int, int], str] = {}
        for name in options.factors:
            lines: dict[str, list[float]] = {"factor": [], "time": [], "work": []}
            for point in FACTORS[name]:
                key = (point.layers, point.experts)
                if key not in paths:
                    paths[key] = random_model(
                        Path(folder) / "-".join(map(str, key)), "mixtral", num_hidden_layers=point.layers,
                        num_local_experts=point.experts, hidden_size=128, intermediate_size=256,
                        num_attention_heads=4, num_key_value_heads=2,
                    )  # fmt: skip
                task = task_of(point, Path(folder))
                seconds, operations = measure(point, paths[key], task, options.genomes)
                for line, value in zip(lines.values(), (getattr(point, name), seconds, operations), strict=True):
                    line.append(value)
            found[name] = lines
            slopes[name] = {line: slope(lines["factor"], lines[line]) for line in ("time", "work")}
            (first, *_, last), (quick, *_, slow) = lines["factor"], lines["time"]
            table.add_row(
                SHOWN[name], f"{first} to {last}", f"{quick:.2f} to {slow:.2f}",
                f"x {lines['work'][-1] / lines['work'][0]:.1f}",
                f"{slopes[name]['time']:.2f}", f"{slopes[name]['work']:.2f}",
            )  # fmt: skip
    console = Console()
    console.print(table)
    steep = [SHOWN[name] for name, of in slopes.items() if of["time"] > of["work"] + TOLERANCE]
    console.print(f"grows faster than its work (slope more than {TOLERANCE} above): {', '.join(steep) or 'nothing'}")
    if options.to:
        write_figure(found, options.to)
    print_figures("growth", {"slopes": slopes, "points": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
