"""How much faster are generated answers if prompts are read once for what genomes and examples have in common?

    python benchmarks/generation.py [--models embedded mixtral]

Random prunings and their swap-mutated children write answers of a fixed length, one genome after the other as
a search asks for them: once with prompts read by the engine and a static cache (the default), and once with stock
`generate` for every genome, from the first token on (--evaluation.share_layers false). Both write the same
scores. Prints a table of the times and one JSON line a model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from baselines import fitness_of
from figures import print_figures
from models import KEPT, loaded, model_path
from rich.console import Console
from rich.table import Table
from shots import few_shot_task

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.search import EEPConfig
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import random_pruning, swap_mutation
from moe_evo.genomes.space import SearchSpace
from moe_evo.tasks.data import check_tasks

EXAMPLES = {"embedded": 100, "mixtral": 20, "qwen3": 20}


def family(space: SearchSpace, number: int) -> list[Genome]:
    """A few random prunings, then their children."""
    rng, rates = np.random.default_rng(0), EEPConfig()
    genomes = [random_pruning(space, rng) for _ in range(1 + number // 4)]
    while len(genomes) < number:
        parent = genomes[int(rng.integers(len(genomes)))]
        genomes.append(swap_mutation(parent, space, rng, layer_rate=rates.layer_rate, swap_rate=rates.swap_rate))
    return genomes


def compare(name: str, shots: int, new_tokens: int, number: int, folder: Path) -> tuple[float, float]:
    """Mean seconds of an evaluation with what is shared, and with stock `generate`."""
    options = {"kind": "generation", "max_new_tokens": new_tokens, "stop": "", "num_search": EXAMPLES[name]}
    tasks = check_tasks([few_shot_task("city", shots, folder, metric="first_option", **options)])
    path = model_path(name, folder)
    ways = [loaded(path, tasks, EvaluationConfig(share_layers=shares)) for shares in (True, False)]
    genomes = family(SearchSpace.build(ways[0].model.shape, num_kept=KEPT[name]), number)
    spent = np.zeros((2, number))
    for place, genome in enumerate([genomes[0], *genomes]):  # the first makes tokens and batches
        found = []
        for way, evaluator in enumerate(ways):
            if not place:
                fitness_of(evaluator, None)
                continue
            started = time.perf_counter()
            found.append(fitness_of(evaluator, genome))
            spent[way, place - 1] = time.perf_counter() - started
        assert not found or abs(found[0] - found[1]) < 1.01 / EXAMPLES[name], found
    shared, stock = spent.mean(axis=1)
    return float(shared), float(stock)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "mixtral"], choices=list(KEPT))
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 5], help="few-shot examples before every prompt")
    parser.add_argument("--new_tokens", nargs="+", type=int, default=[4, 32], help="length of the answers")
    parser.add_argument("--genomes", type=int, default=12)
    options = parser.parse_args(argv)
    table = Table("model", "shots", "new tokens", "ms an evaluation", "stock generate", "faster by")
    for name in options.models:
        figures: dict[str, float] = {}
        for shots in options.shots:
            for new_tokens in options.new_tokens:
                with tempfile.TemporaryDirectory() as folder:
                    shared, stock = compare(name, shots, new_tokens, options.genomes, Path(folder))
                times = (f"{shared * 1e3:.0f}", f"{stock * 1e3:.0f}", f"{stock / shared:.2f}")
                table.add_row(name, str(shots), str(new_tokens), *times)
                figures[f"{shots}_shots_{new_tokens}_tokens"] = stock / shared
        print_figures("generation", {"model": name, **figures})
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
