"""Ranks without a model, which misbehave on purpose; a genome's fitness is made of its digest.

All around them is real: processes, Ray, the service and the pool.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray import cloudpickle

from moe_evo.criteria.questions import Question
from moe_evo.criteria.sums import LayerObservation, Observation
from moe_evo.errors import OutOfMemory, RowOutOfMemory
from moe_evo.gangs.rank import Rank, Work
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Evaluation, Outcome

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks' processes cannot import tests

_LONG_S = 60.0


def outcome_of(genome: Genome, split: str) -> Outcome:
    """What every stand-in says of a genome."""
    fitness = zlib.crc32(f"{genome.digest} {split}".encode()) / 2**32
    return Evaluation(fitness, num_examples=16, scores={"syll": np.full(16, fitness)})


class StandIn(Rank):
    """Scores genomes by their digests; what misbehaves overrides `evaluate_one` or `load`."""

    pause_s = 0.01

    def share_memory(self, num_ranks: int) -> None:
        self._num_sharing = num_ranks

    def load(self, *arguments: Any) -> None:
        pass

    def begin(self, work: Work, halvings: int) -> Sequence[str]:
        self._halvings = halvings
        return ()

    def evaluate(self, key: str, genomes: Sequence[Genome], split: str, *rivals: Any) -> list[Outcome]:
        return [self.evaluate_one(genome, split) for genome in genomes]

    def evaluate_one(self, genome: Genome, split: str) -> Outcome:
        time.sleep(self.pause_s)
        return outcome_of(genome, split)

    def ask(self, key: str, question: Question) -> Observation[Any]:
        return Observation((LayerObservation(*[np.arange(8.0)] * len(LayerObservation.names())),) * 4)


def telling(*notes: str) -> type[Rank]:
    """Every rank has something to tell when it begins a work."""

    class Telling(StandIn):
        def begin(self, work: Work, halvings: int) -> Sequence[str]:
            super().begin(work, halvings)
            return notes

    return Telling


def telling_its_share() -> type[Rank]:
    """Every rank tells how many take memory side by side."""

    class TellingItsShare(StandIn):
        def begin(self, work: Work, halvings: int) -> Sequence[str]:
            super().begin(work, halvings)
            return (f"{self._num_sharing} share",)

    return TellingItsShare


def writing_works_down(file: Path) -> type[Rank]:
    """Works that are begun and forgotten are lines of `file`."""

    class WritingWorksDown(StandIn):
        def begin(self, work: Work, halvings: int) -> Sequence[str]:
            self._write("begin", work.key)
            return super().begin(work, halvings)

        def forget(self, works: Sequence[str]) -> None:
            for key in works:
                self._write("forget", key)

        def _write(self, *words: str) -> None:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(" ".join(words) + "\n")

    return WritingWorksDown


def slow(seconds: float) -> type[Rank]:
    class Slow(StandIn):
        pause_s = seconds

    return Slow


def progressing(seconds: float) -> type[Rank]:
    """As `slow`, and tells that it makes progress meanwhile."""

    class Progressing(StandIn):
        def evaluate_one(self, genome: Genome, split: str) -> Outcome:
            for _ in range(int(seconds / 0.1)):
                time.sleep(0.1)
                self._count()
            return outcome_of(genome, split)

    return Progressing


def writing_down(file: Path, seconds: float) -> type[Rank]:
    """Every evaluation is a line of `file`: the genome's digest."""

    class WritingDown(StandIn):
        pause_s = seconds

        def evaluate_one(self, genome: Genome, split: str) -> Outcome:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(f"{genome.digest}\n")
            return super().evaluate_one(genome, split)

    return WritingDown


def once(digest: str, folder: Path, misbehave: Callable[[], None]) -> type[Rank]:
    """`misbehave` at the first evaluation of one genome."""

    class Once(StandIn):
        def evaluate_one(self, genome: Genome, split: str) -> Outcome:
            flag = folder / "misbehaved"
            if genome.digest == digest and not flag.exists():
                flag.touch()
                misbehave()
            return super().evaluate_one(genome, split)

    return Once


def always(digest: str, misbehave: Callable[[], None]) -> type[Rank]:
    """`misbehave` at every evaluation of one genome."""

    class Always(StandIn):
        def evaluate_one(self, genome: Genome, split: str) -> Outcome:
            if genome.digest == digest:
                misbehave()
            return super().evaluate_one(genome, split)

    return Always


def short_of_memory(halvings: int) -> type[Rank]:
    """Batches fit into memory once they were halved so often."""

    class ShortOfMemory(StandIn):
        def evaluate_one(self, genome: Genome, split: str) -> Outcome:
            if self._halvings < halvings:
                raise OutOfMemory("out of memory on cpu: lower evaluation.batch_tokens")
            return super().evaluate_one(genome, split)

    return ShortOfMemory


def loading_when(file: Path) -> type[Rank]:
    """The model is loaded once `file` is there."""

    class LoadingWhen(StandIn):
        def load(self, *arguments: Any) -> None:
            deadline = time.monotonic() + _LONG_S
            while not file.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)

    return LoadingWhen


def reporting_when(file: Path) -> type[Rank]:
    """As `loading_when`, telling how far it is."""

    class ReportingWhen(StandIn):
        def load(self, *arguments: Any) -> None:
            arguments[-1]("1.5 GiB a rank after 3 s")
            deadline = time.monotonic() + _LONG_S
            while not file.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)

    return ReportingWhen


def in_a_collective(inside: Path) -> type[Rank]:
    """Ranks with a real process group; once, rank 0 waits in an all-reduce that rank 1 does not enter."""

    class InACollective(StandIn):
        def load(self, *arguments: Any) -> None:
            from moe_evo.models.ranks import join_ranks

            _, _, meeting_point, timeout_s, _ = arguments
            join_ranks(self._rank, self._size, *meeting_point, timeout_s)

        def evaluate_one(self, genome: Genome, split: str) -> Outcome:
            import torch

            if self._rank == 1 and not inside.exists():
                time.sleep(1.0)  # rank 0 is in the collective long since
                inside.touch()
                time.sleep(_LONG_S)
            total = torch.ones(1)
            torch.distributed.all_reduce(total)
            assert float(total) == self._size
            return outcome_of(genome, split)

    return InACollective


def unable_to_load(error: Exception) -> type[Rank]:
    class UnableToLoad(StandIn):
        def load(self, *arguments: Any) -> None:
            raise error

    return UnableToLoad


def unable_to_start() -> type[Rank]:
    class UnableToStart(StandIn):
        def __init__(self, rank: int, size: int) -> None:
            raise ImportError("libcuda.so.1: cannot open shared object file")

    return UnableToStart


def raise_value_error() -> None:
    raise ValueError("logits have 3 dimensions")


def raise_row_out_of_memory() -> None:
    raise RowOutOfMemory("out of memory on cpu with one row in a batch")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(_LONG_S)
