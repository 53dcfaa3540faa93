"""What does Weights & Biases cost a search?

    python benchmarks/tracking.py

The same search of the embedded model in three ways, turn by turn: without a tracker, with an offline run of
W&B, and with a service that takes connections and never answers. The model is loaded once and wandb imported
before. Prints, with ratios to no tracker in the same round, the time from the first search evaluation to the
last and the CPU time of the whole search, W&B's own process included; then what is not between those
evaluations, the wait for W&B at the end among it; and one JSON line.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from figures import print_figures
from rich.console import Console
from rich.table import Table

from moe_evo.commands.search import search as search_command
from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig, SelectionConfig, TrackingConfig
from moe_evo.config.search import SearchConfig
from moe_evo.config.task import TaskConfig
from moe_evo.genomes.population import Individual
from moe_evo.models.load import load_model
from moe_evo.models.source import ModelSource
from moe_evo.models.view import MoEModel
from moe_evo.records.journal import MAIN
from moe_evo.report.table import print_whole
from moe_evo.tracking import wandb_log  # noqa: F401 - what its import takes is no part of a search
from moe_evo.tracking.terminal import TerminalTracker

ARMS = {
    "no tracker": TrackingConfig(wandb="disabled"),
    "offline": TrackingConfig(wandb="offline"),
    "hanging service": TrackingConfig(wandb="online"),
}
Seconds = tuple[float, float, float]
"""From the first evaluation of the search to the last, on CPUs from start to end, and all but the first."""


class Clock(TerminalTracker):
    """When the evaluations of the search were recorded."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.times: list[float] = []

    def recorded(self, search: str, split: str, individual: Individual) -> None:
        if (search, split) == (MAIN, "search"):
            self.times.append(time.perf_counter())


@contextmanager
def hanging_service() -> Iterator[None]:
    """W&B's service is for a while a socket that nobody reads."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        os.environ["WANDB_API_KEY"] = "0" * 40
        try:
            yield
        finally:
            del os.environ["WANDB_BASE_URL"], os.environ["WANDB_API_KEY"]


def measured(config: RunConfig, model: MoEModel) -> Seconds:
    """One whole search in a new folder."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w", encoding="utf-8") as nowhere:
        clock = Clock(Console(file=nowhere))
        with clock:
            started, used_s = time.perf_counter(), cpu_s()
            search_command(replace(config, folder=str(Path(folder) / "run")), clock, model)
            whole_s, used_s = time.perf_counter() - started, cpu_s() - used_s
        assert len(clock.times) == config.search.evaluations
        evaluations_s = clock.times[-1] - clock.times[0]
        return evaluations_s, used_s, whole_s - evaluations_s


def cpu_s() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="syll", help="embedded task")
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--examples", type=int, default=64, help="of each split")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    number = options.examples
    config = RunConfig(
        model=ModelConfig(self_check=False),
        tasks=[TaskConfig(data=options.task, num_search=number, num_validation=number, num_test=number)],
        evaluation=EvaluationConfig(threads=1),
        search=SearchConfig(num_kept=4, evaluations=options.evaluations),
        selection=SelectionConfig(finalists=5),
    )
    model = load_model(ModelSource(config.model))
    seconds: dict[str, list[Seconds]] = {arm: [] for arm in ARMS}
    with hanging_service():
        measured(replace(config, tracking=ARMS["no tracker"]), model)  # the first one warms up
        for turn in range(options.rounds):
            names = list(ARMS)[turn % len(ARMS) :] + list(ARMS)[: turn % len(ARMS)]
            for arm in names:
                seconds[arm].append(measured(replace(config, tracking=ARMS[arm]), model))
    table = Table(
        "", "evaluations, s", "ratio [min, max]", "CPU, s", "ratio [min, max]", "else, s",
        title=f"{options.evaluations} evaluations, {number} examples of {options.task}; "
        f"medians of {options.rounds} rounds",
    )  # fmt: skip
    plain = np.array(seconds["no tracker"])
    figures: dict[str, object] = {}
    for arm, values in seconds.items():
        evaluations_s, used_s, else_s = np.median(values, axis=0)
        ratios, cpu_ratios, _ = (np.array(values) / plain).T
        table.add_row(
            arm, f"{evaluations_s:.2f}", _spread(ratios), f"{used_s:.2f}", _spread(cpu_ratios), f"{else_s:.2f}"
        )
        figures[arm] = {
            "evaluations_s": evaluations_s,
            "ratio": np.median(ratios),
            "cpu_s": used_s,
            "cpu_ratio": np.median(cpu_ratios),
            "else_s": else_s,
        }
    print_whole(Console(), table)
    print_figures("tracking", figures)


def _spread(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    return f"{np.median(values):.2f} [{values.min():.2f}, {values.max():.2f}]"


if __name__ == "__main__":
    main()
