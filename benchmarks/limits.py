"""How near is an evaluation to what the machine can compute?

    python benchmarks/limits.py [--models embedded mixtral qwen3]

Scores random prunings and their swap-mutated children one by one. The operations of the matrix
multiplications that they need (see `models.Work`), divided by their time, are given as a fraction of the
fastest float32 multiplication of this machine, measured in the same run on the same threads. A profile shows
where the time goes, and a search in a process of its own how much memory comes on top of the model and
the states that it keeps. Times are CPU times of the process, which other processes disturb least, so a
fraction is per core that is used. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler says nothing

import numpy as np
import torch
from figures import print_figures
from models import KEPT, Work, evaluate, loaded, model_path
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.search import EEPConfig, SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.evaluation.evaluator import Evaluator
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.operators import random_pruning, swap_mutation
from moe_evo.genomes.population import Individual
from moe_evo.genomes.space import SearchSpace
from moe_evo.searches.registry import build_search
from moe_evo.tasks.data import TaskData, check_tasks

GENOMES = {"embedded": 8, "mixtral": 2, "qwen3": 2}  # of each kind
SQUARES = ((512, 512, 512), (1024, 1024, 1024))  # multiplications: rows, columns of the first, of the second

MULTIPLICATION, ATTENTION, ELEMENTWISE = "matrix multiplication", "attention kernel", "elementwise, norms, softmax"
COPIES, OTHER = "gather, scatter, copy", "other, Python"
OPERATORS = {
    MULTIPLICATION: "mm addmm bmm baddbmm _grouped_mm linear matmul",
    ATTENTION: "_scaled_dot_product_flash_attention_for_cpu scaled_dot_product_attention _flash_attention_forward",
    ELEMENTWISE: "mul mul_ add add_ sub sub_ div div_ neg pow rsqrt silu silu_ exp exp_ log log_ cos sin sum mean amax "
    "_softmax softmax _log_softmax logsumexp topk clamp clamp_ where lt le eq ne bitwise_and abs floor_divide isfinite",
    COPIES: "index index_select _index_put_impl_ index_put_ index_add_ gather scatter cat copy_ _to_copy clone "
    "fill_ zero_ masked_fill_ repeat repeat_interleave sort histc cumsum arange nonzero contiguous",
}
GROUP = {f"aten::{name}": group for group, names in OPERATORS.items() for name in names.split()}


def rate(sizes: tuple[int, int, int], repeats: int = 7) -> float:
    """Operations a CPU second of one float32 multiplication (rows, inner) by (inner, columns), at best."""
    rows, inner, columns = sizes
    first, second = torch.randn(rows, inner), torch.randn(columns, inner)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.process_time()
            first @ second.T
            seconds.append(time.process_time() - started)
    return 2 * rows * inner * columns / min(seconds)


def own_sizes(evaluator: Evaluator, work: Work, num_kept: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A projection of the attention in a whole batch, and an expert with its share of the batch."""
    hidden = evaluator.model.language_model.config.hidden_size
    width = evaluator.model.layers[0].expert_tensors()["gate_up_proj"].shape[1]
    rows = work.tokens // len(work.batches)
    return (rows, hidden, hidden), (rows * evaluator.model.shape.top_k[0] // num_kept, hidden, width)


def measured(evaluator: Evaluator, work: Work, genomes: Sequence[Genome]) -> tuple[list[float], float]:
    """Operations a second that each genome needed, and those of all together."""
    needed, seconds = [], []
    for genome in genomes:
        needed.append(work.of(genome))
        started = time.process_time()
        evaluate(evaluator, [genome])
        seconds.append(time.process_time() - started)
    return [one / spent for one, spent in zip(needed, seconds, strict=True)], sum(needed) / sum(seconds)


def profiled(evaluator: Evaluator, genomes: Sequence[Genome]) -> dict[str, float]:
    """Share of the time that each group of operators takes itself."""
    with profile(activities=[ProfilerActivity.CPU]) as found, record_function("evaluations"):
        for genome in genomes:
            evaluate(evaluator, [genome])
    spent = dict.fromkeys([*OPERATORS, OTHER], 0.0)
    for event in found.key_averages():
        spent[GROUP.get(event.key, OTHER)] += event.self_cpu_time_total
    return {group: one / sum(spent.values()) for group, one in spent.items()}


def children(parents: Sequence[Genome], space: SearchSpace, number: int, seed: int) -> list[Genome]:
    """So many, each of any of the parents, with the rates of a search."""
    rng, rates = np.random.default_rng([2, seed]), EEPConfig()
    return [
        swap_mutation(
            parents[int(rng.integers(len(parents)))], space, rng, layer_rate=rates.layer_rate, swap_rate=rates.swap_rate
        )
        for _ in range(number)
    ]


def measure(name: str, path: str, tasks: Sequence[TaskData], number: int) -> dict[str, object]:
    """One model: fractions and profile, printed."""
    evaluator = loaded(path, tasks, EvaluationConfig())
    work = Work(evaluator)
    space = SearchSpace.build(evaluator.model.shape, num_kept=KEPT[name])
    known, *prunings, last = [random_pruning(space, np.random.default_rng([1, n])) for n in range(number + 2)]
    attention, expert = own_sizes(evaluator, work, KEPT[name])
    rates = {sizes: rate(sizes) for sizes in (*SQUARES, attention, expert)}
    measured(evaluator, work, [known])  # the first evaluation makes tokens and batches, too
    kinds = {"random prunings": prunings, "children": children([known, *prunings], space, number, 0)}
    found = {kind: measured(evaluator, work, genomes) for kind, genomes in kinds.items()}
    more = {"random prunings": [last], "children": children([known, *prunings], space, 1, 1)}
    profiles = {kind: profiled(evaluator, genomes) for kind, genomes in more.items()}
    best = max([*rates.values(), *(rate(sizes) for sizes in rates)])  # before and after, as the machine is shared
    title = f"{name}: {work.tokens} tokens, {work.scored} scored; best {best / 1e9:.0f} Gflop/s"
    table = Table("", *kinds, title=title)
    table.add_row("of that rate", *(f"{whole / best:.2f}" for _, whole in found.values()))
    spans = [f"{min(each) / best:.2f} to {max(each) / best:.2f}" for each, _ in found.values()]
    table.add_row("  of single genomes", *spans, end_section=True)
    for group in [*OPERATORS, OTHER]:
        table.add_row(f"time: {group}", *(f"{profiles[kind][group]:.0%}" for kind in kinds))
    Console().print(table)
    shares = {"attention": rates[attention] / best, "expert": rates[expert] / best}
    shown = ", ".join(
        f"{what} ({' x '.join(map(str, sizes))}) {shares[what]:.2f}"
        for what, sizes in (("attention", attention), ("expert", expert))
    )
    Console().print(f"of that rate, alone: {shown}\n")
    return {
        "best_gflops": best / 1e9,
        "alone": shares,
        "fraction": {kind: whole / best for kind, (_, whole) in found.items()},
        "time": profiles,
    }


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, of it RssFile of files, VmHWM at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def search_memory(path: str, gib: float, evaluations: int, merges: bool) -> None:
    """Load a model, search, and print the bytes in memory as JSON; runs in a process of its own.

    gib: for states. merges: nearly all genomes merge, with room for the merged layers of one of them.
    """
    num_kept = KEPT["mixtral"]
    tasks = check_tasks([TaskConfig(data="syll", num_search=60)])
    loaded("embedded", tasks, EvaluationConfig())  # imports what is imported late
    before, files_before = resident("VmRSS"), resident("RssFile")
    forget_peak()
    evaluator = loaded(path, tasks, EvaluationConfig(state_cache_gib=gib), merged_cache_gib=0)
    after, loading = resident("VmRSS"), resident("VmHWM")
    forget_peak()
    tensors = [tensor for layer in evaluator.model.layers for tensor in layer.expert_tensors().values()]
    merged = sum(num_kept * tensor[0].numel() * tensor.element_size() for tensor in tensors) if merges else 0
    evaluator.model.merged_cache.budget_bytes = merged
    space = SearchSpace.build(evaluator.model.shape, num_kept=num_kept)
    eep = EEPConfig(num_initial=4 if merges else 10, num_pruning=8 if merges else evaluations)
    search = build_search(space, SearchConfig(algorithm="eep", evaluations=evaluations, eep=eep))
    for _ in range(evaluations):
        (candidate,) = search.ask(1)
        search.tell([Individual(candidate, evaluator.evaluate([candidate.genome], "search")[0])])
    size = sum(tensor.numel() * tensor.element_size() for tensor in evaluator.model.language_model.parameters())
    print(
        json.dumps(
            {
                "model": size,
                "states": int(gib * 2**30),
                "merged_layers": merged,
                "peak_while_loading": loading - before,
                "loaded": after - before,
                "peak_of_search": resident("VmHWM") - before,
                "of_it_the_mapped_checkpoint": resident("RssFile") - files_before,
            }
        )
    )


def memory_of(path: str, gib: float, evaluations: int) -> dict[str, dict[str, float]]:
    """Peak memory of searches, of that of the model, its states and its merged layers, printed."""
    table = Table("MiB", title=f"memory beside the libraries: {evaluations} evaluations, mixtral")
    columns: dict[str, dict[str, float]] = {}
    for phase in ("pruning", "merging"):
        command = [sys.executable, __file__, "--memory-of", path, "--gib", str(gib), "--evaluations", str(evaluations)]
        command += ["--merging"] if phase == "merging" else []
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found: dict[str, int] = json.loads(lines[-1])
        expected = found["model"] + found["states"] + found["merged_layers"]
        columns[phase] = {
            **{what: size / 2**20 for what, size in found.items()},
            "ratio": found["peak_of_search"] / expected,
            "ratio_without_mapped_checkpoint": (found["peak_of_search"] - found["of_it_the_mapped_checkpoint"])
            / expected,
        }
        table.add_column(phase)
    for what in columns["pruning"]:
        digits = 2 if what.startswith("ratio") else 0
        table.add_row(what.replace("_", " "), *(f"{column[what]:.{digits}f}" for column in columns.values()))
    Console().print(table)
    return columns


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(KEPT), choices=list(KEPT))
    parser.add_argument("--tasks", nargs="+", default=["syll", "infl", "sarcasm"], help="embedded tasks of choices")
    parser.add_argument("--genomes", type=int, help=f"random prunings, and as many children; default: {GENOMES}")
    parser.add_argument("--gib", type=float, default=0.05, help="for states, where memory is measured")
    parser.add_argument("--evaluations", type=int, default=200, help="where memory is measured")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--merging", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.memory_of:
        search_memory(options.memory_of, options.gib, options.evaluations, options.merging)
        return 0
    tasks = check_tasks([TaskConfig(data=task, num_search=200) for task in options.tasks])
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            path = model_path(name, Path(folder))
            figures[name] = measure(name, path, tasks, options.genomes or GENOMES[name])
            if name == "mixtral" and Path("/proc/self/clear_refs").exists():
                figures["memory"] = memory_of(path, options.gib, options.evaluations)
    print_figures("limits", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
