"""What does a GPU make of all this: is it right, how fast is it, and how near to what the card can do?

    python benchmarks/gpu.py [--minutes 8] [--sections scoring decode] [--to FILE.json]

For one GPU and no network: models of real shapes (OLMoE-1B-7B, Qwen3-30B-A3B with as many layers as fit, two layers
of DeepSeek-V3) get random weights where they run. Every section has its share of the time; points for which none is
left are named, and a point or section that fails is written down with its error while the rest goes on (exit code 1
where a section broke or scores are not right). Figures go to the file after every point. Without a GPU, or with
--small, tiny models on the CPU show that all of it works.
Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler says nothing

import torch
import transformers
from figures import print_figures
from gpu_sections.bench import Bench
from gpu_sections.correctness import correctness
from gpu_sections.decode import decode
from gpu_sections.hardware import attention, ceilings
from gpu_sections.made_models import MadeModels
from gpu_sections.memory import out_of_memory
from gpu_sections.merging import merging
from gpu_sections.other_ways import baselines
from gpu_sections.record import Record, free_memory
from gpu_sections.recovery import recovery
from gpu_sections.scoring import scoring
from gpu_sections.tables import headline, print_tables, rounded

SECTIONS: dict[str, tuple[Callable[[Bench, Record], None], float]] = {
    "ceilings": (ceilings, 0.05),
    "correctness": (correctness, 0.13),
    "scoring": (scoring, 0.28),
    "attention": (attention, 0.06),
    "decode": (decode, 0.15),
    "merging": (merging, 0.1),
    "out_of_memory": (out_of_memory, 0.07),
    "baselines": (baselines, 0.16),
    "recovery": (recovery, 0.15),
}
"""What is measured, and its share of the time."""

_GRACE_S = 30.0  # after its time, before a section is ended in the middle of a point


class OutOfTime(Exception):
    """A section has taken much longer than it may."""


class Results:
    """All that was found so far, in a file if there is one."""

    def __init__(self, machine: dict[str, Any], path: Path | None) -> None:
        self._machine = machine
        self._path = path
        self.records: dict[str, Record] = {}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        sections = {name: record.to_json() for name, record in self.records.items()}
        return {"machine": self._machine, "sections": rounded(sections)}

    def save(self) -> None:
        """Write the file anew, whole or not at all."""
        if self._path is not None:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")
            partial.replace(self._path)


def run(bench: Bench, names: Sequence[str], ends: float, results: Results) -> None:
    """Sections in turn; each has its share of the time that is left, so that what one saves is for the others."""
    left = sum(SECTIONS[name][1] for name in names)
    for name in names:
        section, share = SECTIONS[name]
        budget_s = max(ends - time.monotonic(), 0.0) * share / left
        left -= share
        record = results.records[name] = Record(budget_s, results.save)
        print(f"{name}: {budget_s:.0f} s", file=sys.stderr, flush=True)
        try:
            with _ended_after(budget_s + _GRACE_S):
                section(bench, record)
        except Exception as error:  # noqa: BLE001 - the border of a section: the others are measured all the same
            record.fail(error)
        if "the section" in record.failed:  # who knows in what state the model is
            bench.models.forget()
        record.finish()
        free_memory()


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block once so many seconds have gone by."""

    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"{seconds:.0f} s have gone by")

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def went_wrong(results: Results) -> bool:
    """Whether a section ended before its time, or scores cannot be trusted on this device."""
    if any("the section" in record.failed for record in results.records.values()):
        return True
    correct = results.records.get("correctness")
    return correct is not None and (bool(correct.failed) or any(one.get("differs") for one in correct.figures.values()))


def machine_of(device: torch.device, models: MadeModels) -> dict[str, Any]:
    """What the figures were measured with."""
    found: dict[str, Any] = {"card": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        **found,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "dtype": str(models.dtype).removeprefix("torch."),
        "qwen3_layers": models.shapes["qwen3"][1]["num_hidden_layers"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic() - time.process_time()  # imports count, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of everything, the models included")
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--qwen3_layers", type=int, help="decoder layers of Qwen3; default: as many as fit well")
    parser.add_argument("--to", type=Path, help="JSON file for all figures")
    options = parser.parse_args(argv)
    is_small = options.small or not torch.cuda.is_available()
    device = torch.device("cpu" if is_small else "cuda:0")
    models = MadeModels(device, is_small=is_small, qwen3_layers=options.qwen3_layers)
    results = Results(machine_of(device, models), options.to)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, models, Path(folder))
        run(bench, options.sections, started + 60 * options.minutes, results)
    found = results.to_json()
    print_tables(found)
    print_figures("gpu", {"device": found["machine"]["card"], **found["machine"], **headline(found)})
    return 1 if went_wrong(results) else 0


if __name__ == "__main__":
    sys.exit(main())
