"""`Packing`: how many genomes pass a layer together, where memory allows several.

What is gained by it depends on the model, the device and the number of tokens, so it is measured on the passes that
score genomes. Two numbers of genomes, n and 2n, are timed in turn; as long as 2n is faster, n is doubled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from moe_evo.config.evaluation import EvaluationConfig
from moe_evo.models.ranks import Ranks
from moe_evo.models.view import MoEModel

TRIES = 3
_GAIN = 0.98  # a smaller gain may be noise, and more genomes take more memory

Clock = Callable[[], float]
"""Tells the time in seconds."""


class Packing:
    """Packing without measuring: as many genomes as memory allows."""

    def together(self, kind: Hashable, most: int) -> int:
        """How many genomes the next pass of this kind takes, at most `most`."""
        return most

    @contextmanager
    def timed(self, kind: Hashable, number: int) -> Iterator[None]:
        """A block in which the pass runs for which `together` was called last; `number`: its genomes."""
        yield


ALL = Packing()
"""The packing that measures nothing."""


class MeasuredPacking(Packing):
    """The number of genomes that is fastest, found for each kind of pass.

    All ranks must make the same calls; the times of rank 0 count for all. clock: waits for the device, then tells
    the time.
    """

    def __init__(self, ranks: Ranks, clock: Clock) -> None:
        self._ranks = ranks
        self._clock = clock
        self._searches: dict[Hashable, _PackSizeSearch] = {}

    def together(self, kind: Hashable, most: int) -> int:
        return self._searches.setdefault(kind, _PackSizeSearch()).next(most)

    @contextmanager
    def timed(self, kind: Hashable, number: int) -> Iterator[None]:
        search = self._searches[kind]
        if not search.is_trying:
            yield
            return
        started = self._clock()
        yield
        search.note(number, self._ranks.gather(self._clock() - started)[0] / number)

    @property
    def fastest(self) -> dict[Hashable, int]:
        """The fastest number of genomes so far, by kind of pass."""
        return {kind: search.number for kind, search in self._searches.items()}


class _PackSizeSearch:
    """The search for the fastest number of genomes for one kind of pass, doubling from 1."""

    def __init__(self) -> None:
        self.number = 1
        self.is_trying = False  # whether the next pass is timed
        self._is_over = False
        self._seconds: dict[int, list[float]] = {1: [], 2: []}  # a genome, for `number` and twice `number`

    def next(self, most: int) -> int:
        self.is_trying = not self._is_over and 2 * self.number <= most
        if not self.is_trying:
            return min(self.number, most)
        # in turn, so that a device that slows down meanwhile slows both numbers
        return min(self._seconds, key=lambda number: (len(self._seconds[number]), number))

    def note(self, number: int, seconds: float) -> None:
        self._seconds[number].append(seconds)
        if any(len(tries) < TRIES for tries in self._seconds.values()):
            return
        one, twice = map(min, self._seconds.values())  # the fastest try: other work on the machine only adds time
        if twice < _GAIN * one:
            self.number *= 2
            self._seconds = {self.number: [], 2 * self.number: []}
        else:
            self._is_over = True


def packing_for(config: EvaluationConfig, model: MoEModel, clock: Clock | None) -> Packing:
    """The packing that `pack_tokens` asks for; by default measured on a GPU and `ALL` on the CPU.

    clock: default: one that waits for the model's devices.
    """
    measures = config.pack_tokens == "measured" or (config.pack_tokens is None and model.device.type != "cpu")
    return MeasuredPacking(model.ranks, clock or _clock_of(model)) if measures else ALL


def most_tokens(config: EvaluationConfig, model: MoEModel, batch_tokens: int) -> int:
    """The most tokens of one pass, summed over the genomes in it; 0 where each genome passes alone."""
    if isinstance(config.pack_tokens, int):
        return min(config.pack_tokens, batch_tokens)
    # alone, a genome's scores are the same to the last bit whatever else is evaluated
    return 0 if config.pack_tokens is None and model.device.type == "cpu" else batch_tokens


def size_class(num_tokens: int) -> int:
    """Equal for numbers of tokens between the same two powers of two."""
    return num_tokens.bit_length()


def _clock_of(model: MoEModel) -> Clock:
    devices = {tensor.device for tensor in model.language_model.parameters()} | {model.device}
    gpus = [device for device in devices if device.type == "cuda"]

    def now() -> float:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        return time.perf_counter()

    return now
