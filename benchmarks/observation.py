"""How much longer does it take to observe a model's experts than to run it?

    python benchmarks/observation.py [--models embedded qwen3] [--repeats 15]

The same batches of prompts are run forward, plainly and observed, in turn. Prints the median ratio of a pair
and one JSON line a model. What one-shot criteria mostly ask (`routed`) should cost at most 1.3 forward passes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
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
from moe_evo.criteria.answering import answer
from moe_evo.criteria.questions import GateRatios, Outputs, Question, Routed, Trials
from moe_evo.criteria.routed import prompts
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.tasks.data import check_tasks

EXAMPLES = {"embedded": 200, "mixtral": 20, "qwen3": 20}


def run_plainly(evaluator: Evaluator, task: str) -> None:
    """One forward pass over the prompts that an observation sees."""
    with torch.inference_mode():
        for batch, _ in prompts(evaluator, task, "search"):
            evaluator.forward(batch)


def seconds(function: Callable[[], object]) -> float:
    """Of the CPU, on one thread: what a busy machine makes of it would hide the difference."""
    started = time.process_time()
    function()
    return time.process_time() - started


def compare(name: str, task: str, repeats: int, folder: Path) -> None:
    """One model: plain and observed passes in turn, as the machine may be busy for a while."""
    tasks = check_tasks([TaskConfig(data=task, num_search=EXAMPLES[name])])
    evaluator = loaded(model_path(name, folder), tasks, EvaluationConfig(), self_check=False)
    questions: dict[str, Question] = {
        "routed": Routed(task),
        "outputs": Outputs(task),
        "gate ratios": GateRatios(task),
        "trials, all but one": Trials(task),
    }
    ratios: dict[str, list[float]] = {way: [] for way in questions}
    plain: list[float] = []
    run_plainly(evaluator, task)  # tokens are made once
    for repeat in range(repeats):
        for way, question in questions.items():
            if way == "routed" or repeat < 3:
                plain.append(seconds(partial(run_plainly, evaluator, task)))
                ratios[way].append(seconds(partial(answer, question, evaluator)) / plain[-1])
    table = Table("question", "times a forward pass", title=f"{name}, {EXAMPLES[name]} prompts of {task}")
    figures = {way: float(np.median(of_way)) for way, of_way in ratios.items()}
    for way, ratio in figures.items():
        table.add_row(way, f"{ratio:.2f}")
    Console().print(table)
    ways = {way.replace(",", "").replace(" ", "_"): ratio for way, ratio in figures.items()}
    print_figures("observation", {"model": name, "forward_s": float(np.median(plain)), "repeats": repeats, **ways})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "qwen3"], choices=list(KEPT))
    parser.add_argument("--task", default="syll", help="an embedded task of choices")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            compare(name, options.task, options.repeats, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
