"""Is our training as fast as the library's own loop, and what memory do they take?

    python benchmarks/training.py [--models embedded qwen3] [--steps 40]

The same student learns from the same prompts: by `Training`, from what the full model said once; by two workers of
DeepSpeed's ZeRO, stages 2 and 3, from the same; and by transformers' Trainer, with the full model beside it in memory,
which is how distillation is mostly written. Each in processes of its own, in turn. Prints tokens a second of the CPU's
time (of both workers together), and the most memory of a process, and one JSON line a model. Prompts with the answers
of the full model, 32 a step, experts, router and norms are trained; reading lessons is part of our time.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from figures import print_figures
from models import KEPT, loaded, model_path
from rich.console import Console
from rich.table import Table

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.recover import RecoverConfig, Stage
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.genome import Genome
from moe_evo.models.export.export import export_checkpoint
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel
from moe_evo.recovery.lessons import Reading, write_lessons
from moe_evo.tasks.data import check_tasks

PROMPTS = {"embedded": 300, "mixtral": 64, "qwen3": 64}
PARTS = ("experts", "router", "norms")
WORKERS = {"ours": 1, "ZeRO-2": 2, "ZeRO-3": 2, "Trainer": 1}
"""Processes of each way."""


@dataclass(frozen=True)
class Setting:
    """One measurement. folder: of the student, the lessons and what is read. port: where workers meet."""

    way: str
    full: str
    folder: str
    steps: int
    port: int


def prepare(name: str, folder: Path) -> str:
    """A student, lessons, and what is read as one file; returns the path of the full model."""
    tasks = check_tasks([TaskConfig(data="syll", num_search=PROMPTS[name], num_test=16, num_validation=16)])
    path = model_path(name, folder)
    model = loaded(path, tasks, EvaluationConfig(), self_check=False).model
    kept = [list(range(KEPT[name]))] * model.shape.num_layers
    genome = Genome.from_kept(kept, model.shape.num_experts, model.shape.top_k)
    export_checkpoint(model, genome, folder / "student", provenance={})
    texts = [f"{one.prompt}{one.choices[one.label or 0]}" for one in tasks[0].splits["search"]]
    rows = [tuple(model.tokenizer(text)["input_ids"][:-1]) for text in texts]
    readings = [Reading(row, len(row) - 3) for row in rows]
    for lessons in ("learned", "validation"):
        chosen = readings if lessons == "learned" else readings[:16]
        write_lessons(folder, lessons, chosen, model.language_model, model.device, top_k=64, batch_tokens=4096)
    return path


def student_of(setting: Setting) -> MoEModel:
    return load_model(ModelSource(ModelConfig(path=f"{setting.folder}/student", self_check=False)))


def ours(setting: Setting) -> tuple[int, float]:
    """Train; returns how many tokens were read, and the seconds of the CPU."""
    from moe_evo.recovery.lessons import read_lessons
    from moe_evo.recovery.material import Material
    from moe_evo.recovery.parts import trained_parameters
    from moe_evo.recovery.training import Training

    model, folder = student_of(setting), Path(setting.folder)
    material = Material(read_lessons(folder, "learned"), read_lessons(folder, "validation"))
    config = RecoverConfig(steps=setting.steps, checks=1)
    parameters = trained_parameters(model, PARTS)
    training = Training(model.language_model, parameters, material, config, 0.0, folder / f"state-{os.getpid()}")
    started = time.process_time()
    return training.run().tokens, time.process_time() - started


def trainer(setting: Setting) -> tuple[int, float]:
    """The same by transformers' Trainer: padded batches, the full model asked in every step."""
    import transformers

    from moe_evo.recovery.lessons import read_lessons
    from moe_evo.recovery.parts import trained_parameters

    library: Any = transformers
    model = student_of(setting)
    full = load_model(ModelSource(ModelConfig(path=setting.full, self_check=False))).language_model
    lessons = read_lessons(Path(setting.folder), "learned")
    rows = [row.long() for row in lessons.rows(range(len(lessons)))]
    for one in trained_parameters(model, PARTS).values():
        one.requires_grad_(True)
    read = 0

    def collate(batch: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal read
        read += sum(map(len, batch))
        ids = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True)
        return {
            "input_ids": ids,
            "mask": torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in batch], True),
        }

    class Distiller(library.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            with torch.no_grad():
                wanted = full(input_ids=inputs["input_ids"], use_cache=False).logits.float().log_softmax(-1)
            got = model(input_ids=inputs["input_ids"], use_cache=False).logits.float().log_softmax(-1)
            kl = (wanted.exp() * (wanted - got)).sum(-1)
            return (kl * inputs["mask"]).sum() / inputs["mask"].sum()

    with tempfile.TemporaryDirectory() as folder:
        arguments = library.TrainingArguments(
            folder, max_steps=setting.steps, per_device_train_batch_size=32, learning_rate=1e-3, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
        )  # fmt: skip
        distiller = Distiller(model.language_model, arguments, data_collator=collate, train_dataset=rows)
        started = time.process_time()
        distiller.train()
        return read, time.process_time() - started


def worker(setting: Setting, rank: int) -> tuple[int, float]:
    """A worker's share of the same by DeepSpeed; the tokens are those of all workers."""
    from moe_evo.models.ranks import join_ranks
    from moe_evo.recovery.sharded import ShardedJob, train_share

    folder = Path(setting.folder)
    stage: Stage = 2 if setting.way == "ZeRO-2" else 3
    model = ModelConfig(path=f"{folder}/student", device="cpu", sharding="zero3", self_check=False)
    config = RecoverConfig(steps=setting.steps, checks=1, zero_stage=stage)
    names, state = ("learned", "validation"), folder / f"state-{setting.way}-{setting.port}"
    state.mkdir(exist_ok=True)
    job = ShardedJob(model, ModelSource(model).hash, folder, names, PARTS, 0.0, config, state)
    ranks = join_ranks(rank, WORKERS[setting.way], "127.0.0.1", setting.port, 600.0)
    started = 0.0

    def begin() -> None:
        nonlocal started
        started = time.process_time()

    return train_share(job, ranks, ready=begin).tokens, time.process_time() - started


def measure(setting: Setting, rank: int) -> tuple[int, float, float]:
    """Tokens, seconds of the CPU, and most memory of this process beside what it had imported, in MiB."""
    import transformers.trainer  # noqa: F401 - for all, so that it counts for none

    from moe_evo.models.zero3 import imported_deepspeed

    imported_deepspeed()
    torch.set_num_threads(1)
    before = most_memory()
    if WORKERS[setting.way] > 1:
        tokens, seconds = worker(setting, rank)
    else:
        tokens, seconds = ours(setting) if setting.way == "ours" else trainer(setting)
    return tokens, seconds, (most_memory() - before) / 2**10


def measured(setting: Setting) -> tuple[float, float]:
    """Tokens a second of the CPU's time, and the most memory of a process in MiB."""
    with get_context("spawn").Pool(WORKERS[setting.way]) as pool:
        found = pool.starmap(measure, [(setting, rank) for rank in range(WORKERS[setting.way])], chunksize=1)
    return found[0][0] / sum(seconds for _, seconds, _ in found), max(memory for *_, memory in found)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def most_memory() -> int:
    """Of this process so far, in KiB; ru_maxrss would count the process that it was forked from."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0])


def compare(name: str, steps: int, repeats: int, folder: Path) -> None:
    path = prepare(name, folder)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WORKERS}
    for _ in range(repeats):
        for way in WORKERS:
            found[way].append(measured(Setting(way, path, str(folder), steps, free_port())))
    table = Table("", "tokens/s", "most memory", title=f"{name}: {steps} steps of 32 prompts, one thread, median")
    medians = {way: np.median(values, axis=0) for way, values in found.items()}
    for way, (rate, mib) in medians.items():
        table.add_row(way, f"{rate:,.0f}", f"{mib:,.0f} MiB")
    Console().print(table)
    ratios = {
        way: [round(one[0] / other[0], 2) for one, other in zip(found[way], found["Trainer"], strict=True)]
        for way in WORKERS
        if way != "Trainer"
    }
    memory = {way: round(float(values[1])) for way, values in medians.items()}
    print_figures("training", {"model": name, "times_the_rate_of_trainer": ratios, "memory_mib": memory})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PROMPTS), default=["embedded", "qwen3"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            compare(name, options.steps, options.repeats, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
