"""Do genomes that go through a layer together take less time than one after the other, and is the choice right?

    python benchmarks/packing.py

Random prunings of a model go through it with batches of several sizes, so many together at a time, turn by
turn with one at a time, and as many together as the choice by measured speed says
(`--evaluation.pack_tokens measured`; tries included). Prints a table of the speed as a ratio to one at a time
and of what was chosen, for whole layers and for the last experts, and one JSON line.
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
import torch
from figures import print_figures
from models import KEPT, loaded, model_path
from rich.console import Console
from rich.table import Table

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.engine.engine import Engine
from moe_evo.evaluation.engine.packing import ALL, MeasuredPacking, Packing, packing_for
from moe_evo.evaluation.engine.states import StateCache
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import random_pruning
from moe_evo.genomes.space import SearchSpace
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import ForwardBatch
from moe_evo.tasks.batches import forward_batches
from moe_evo.tasks.data import check_tasks
from moe_evo.tasks.rows import BatchLimits, Row

TOGETHER = (1, 2, 4, 8, 16)
TOKENS = (32, 128, 512, 2048)
ROW = 16  # tokens of a prompt, of which one is scored


def batch_of(model: MoEModel, num_tokens: int) -> ForwardBatch:
    """Prompts of random words that have nothing in common."""
    words = np.random.default_rng(num_tokens).integers(3, 1000, (num_tokens // ROW, ROW))
    rows = [Row(number, tuple(prompt.tolist()), ROW - 1) for number, prompt in enumerate(words)]
    (batch,) = forward_batches(rows, BatchLimits(2 * num_tokens, 2048, trees=False))
    assert batch.num_tokens == num_tokens, batch.num_tokens
    return batch.to(model.device)


@torch.inference_mode()
def seconds(model: MoEModel, batch: ForwardBatch, genomes: Sequence[Genome], copies: int, packing: Packing) -> float:
    """Of all genomes, with nothing kept from before."""
    engine = Engine(model, StateCache(0, model.device))
    started = time.perf_counter()
    engine.run(batch, genomes, lambda number, scored: None, copies=copies, keep=False, packing=packing)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", choices=list(KEPT))
    parser.add_argument("--genomes", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9, help="medians of so many turns")
    options = parser.parse_args(argv)
    figures: dict[str, object] = {"model": options.model}
    with tempfile.TemporaryDirectory() as folder:
        tasks = check_tasks([TaskConfig(data="syll", num_search=8)])
        model = loaded(model_path(options.model, Path(folder)), tasks, EvaluationConfig()).model
        space = SearchSpace.build(model.shape, num_kept=KEPT[options.model])
        genomes = [random_pruning(space, np.random.default_rng([0, number])) for number in range(options.genomes)]
        title = f"{options.model}: speed against one genome at a time"
        table = Table("tokens a genome", *map(str, TOGETHER), "measured", "chosen", title=title)
        for num_tokens in TOKENS:
            batch = batch_of(model, num_tokens)
            measured = packing_for(EvaluationConfig(pack_tokens="measured"), model, None)
            assert isinstance(measured, MeasuredPacking)
            ways = [*((number, ALL) for number in TOGETHER), (max(TOGETHER), measured)]
            for way in (*ways, *[ways[-1]] * 2):  # no way pays for what is made once, such as the choice
                seconds(model, batch, genomes, *way)
            spent = [[seconds(model, batch, genomes, *way) for way in ways] for _ in range(options.repeats)]
            speed = [float(np.median([turn[0] / turn[way] for turn in spent])) for way in range(len(ways))]
            chosen = {_words(kind): number for kind, number in measured.fastest.items()}
            shown = ", ".join(map(str, chosen.values()))
            table.add_row(str(num_tokens), *(f"{one:.2f}" for one in speed), shown)
            figures[str(num_tokens)] = {
                "speed": dict(zip([*TOGETHER, "measured"], speed, strict=True)),
                "chosen": chosen,
            }
    Console().print(table)
    print_figures("packing", figures)
    return 0


def _words(kind: object) -> str:
    """What a pass computes."""
    assert isinstance(kind, tuple)
    return "experts and attention" if kind[1] else "experts of scored tokens"


if __name__ == "__main__":
    sys.exit(main())
