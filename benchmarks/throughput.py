"""How many genomes does a second evaluate, against other ways to score the same ones?

    python benchmarks/throughput.py [--models embedded mixtral qwen3] [--evaluations 120]

A real EEP search is run and its genomes are written down. They are then evaluated again, in their order
and one by one as a search asks for them, with nothing known at the start; and a sample of them in every
other way. All ways must agree on every genome that they score. Prints a table and one JSON line a model.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from baselines import Checkpoint, Harness, PublishedLoop, fitness_of
from figures import print_figures
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import moe_evo
from moe_evo import evaluators
from moe_evo.config import EvaluationConfig, ModelConfig, TaskConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genome import Genome
from moe_evo.population import Individual
from moe_evo.search import build_search
from moe_evo.search_config import SearchConfig
from moe_evo.space import SearchSpace
from moe_evo.tasks.data import check_tasks
from moe_evo.tracking.terminal import TerminalTracker

EMBEDDED = Path(moe_evo.__file__).parent / "data" / "model"
SHAPES = {
    "mixtral": ("mixtral", {"num_hidden_layers": 8, "intermediate_size": 1024, "num_local_experts": 8}),
    "qwen3": (
        "qwen3_moe",
        {
            "num_hidden_layers": 6,
            "moe_intermediate_size": 128,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "head_dim": 64,
        },
    ),
}
KEPT = {"embedded": 4, "mixtral": 4, "qwen3": 32}
EXAMPLES = {"embedded": 200, "mixtral": 40, "qwen3": 40}


def written_model(name: str, folder: Path) -> str:
    """Path of a random model of that shape, with the embedded model's tokenizer."""
    model_type, sizes = SHAPES[name]
    torch.manual_seed(0)
    common = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048}
    made: Any = AutoModelForCausalLM
    model = made.from_config(AutoConfig.for_model(model_type, **common, **sizes))
    model.save_pretrained(folder / name)
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copy(file, folder / name)
    return str(folder / name)


def recorded_genomes(evaluator: Evaluator, num_kept: int, evaluations: int) -> tuple[list[Genome], int]:
    """The genomes of an EEP search in their order, and how many of them are prunings of its first phase."""
    space = SearchSpace.build(evaluator.model.shape, num_kept=num_kept)
    search = build_search(space, SearchConfig(num_kept=num_kept, evaluations=evaluations))
    genomes = []
    for _ in range(evaluations):
        (candidate,) = search.ask(1)
        genomes.append(candidate.genome)
        search.tell([Individual(candidate, evaluator.evaluate([candidate.genome], "search")[0])])
    return genomes, sum(genome.is_pruning for genome in genomes)


def seconds_of(fitness: Callable[[Genome], float], genomes: Sequence[Genome]) -> tuple[list[float], list[float]]:
    """Seconds and fitness of each genome."""
    seconds, found = [], []
    for genome in genomes:
        started = time.perf_counter()
        found.append(fitness(genome))
        seconds.append(time.perf_counter() - started)
    return seconds, found


def compare(name: str, task_names: Sequence[str], evaluations: int, sample: int, folder: Path) -> None:
    """One model: record, evaluate again in every way, print."""
    tasks = check_tasks([TaskConfig(data=task, num_search=EXAMPLES[name]) for task in task_names])
    config = ModelConfig(path="embedded" if name == "embedded" else written_model(name, folder))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        tracker = TerminalTracker(Console(file=nowhere))

        def loaded(*, share_layers: bool = True) -> Evaluator:
            return evaluators.load_evaluator(config, tasks, EvaluationConfig(share_layers=share_layers), tracker)

        evaluator, alone = loaded(), loaded(share_layers=False)
        genomes, num_prunings = recorded_genomes(evaluator, KEPT[name], evaluations)
        phases = {"pruning": range(num_prunings), "merging": range(num_prunings, evaluations)}
        ours = loaded()
        model = ours.model
        (harness_folder := folder / f"harness-{name}").mkdir()
        loop = PublishedLoop(model, tasks, KEPT[name], genomes[0].top_k[0])
        ways: dict[str, Callable[[Genome], float]] = {
            "one by one": lambda genome: fitness_of(alone, genome),
            loop.name: loop.fitness,
            Checkpoint.name: Checkpoint(evaluator, tasks, tracker).fitness,
        }
        if importlib.util.find_spec("lm_eval") is not None:  # an extra of the package
            ways[Harness.name] = Harness(model, tasks, harness_folder).fitness
        loop.tune(genomes[0])
        fitness_of(ours, None)  # tokens and batches are made once a run
        seconds, fitness = seconds_of(lambda genome: fitness_of(ours, genome), genomes)
        table = Table("phase", "way", "ms an evaluation", "ours is faster by", title=f"{name}, {evaluations} genomes")
        figures: dict[str, float] = {}
        for phase, numbers in phases.items():
            own = float(np.mean([seconds[number] for number in numbers]))
            table.add_row(phase, "moe_evo", f"{own * 1e3:.1f}", "")
            chosen = np.linspace(numbers[0], numbers[-1], sample).round().astype(int).tolist()
            for way, score in ways.items():
                score(genomes[chosen[0]])
                spent, found = seconds_of(score, [genomes[number] for number in chosen])
                differences = np.abs(np.array(found) - [fitness[number] for number in chosen])
                assert differences.max() < 1e-9 + 1.01 / EXAMPLES[name] / len(tasks), (way, differences)
                figures[f"{phase}_{way.replace(' ', '_')}"] = ratio = float(np.mean(spent)) / own
                table.add_row(phase, way, f"{np.mean(spent) * 1e3:.1f}", f"{ratio:.1f}")
        Console().print(table)
        print_figures("throughput", {"model": name, "evaluations": evaluations, **figures})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(KEPT), choices=list(KEPT))
    parser.add_argument("--tasks", nargs="+", default=["syll", "infl", "sarcasm"], help="embedded tasks of choices")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--sample", type=int, default=3, help="genomes of each phase that the other ways score")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            compare(name, options.tasks, options.evaluations, options.sample, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
