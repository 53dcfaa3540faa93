"""How many genomes go through the model together, where there is room for several: all, or what is fastest.

What packing gains depends on model, device and how many tokens a genome has, so it is measured on the very
passes that score genomes. Two numbers, one twice the other, are tried in turn; while the larger one is
faster, it goes on from there.
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
_GAIN = 0.98  # less is noise, and larger packs take more memory

Clock = Callable[[], float]
"""Tells the time in seconds."""


class Packing:
    """As many genomes as there is room for."""

    def together(self, kind: Hashable, most: int) -> int:
        """How many of `most` genomes go through a pass of this kind next."""
        return most

    @contextmanager
    def timed(self, kind: Hashable, number: int) -> Iterator[None]:
        """In this block the pass runs that `together` was asked for last."""
        yield


ALL = Packing()
"""Packing that needs no measuring."""


class MeasuredPacking(Packing):
    """As many genomes as are fastest, for each kind of pass.

    All ranks have to make the same calls: what the first one measures counts for all. clock: tells the time
    when the device has done all that it was given.
    """

    def __init__(self, ranks: Ranks, clock: Clock) -> None:
        self._ranks = ranks
        self._clock = clock
        self._climbs: dict[Hashable, _Climb] = {}

    def together(self, kind: Hashable, most: int) -> int:
        return self._climbs.setdefault(kind, _Climb()).next(most)

    @contextmanager
    def timed(self, kind: Hashable, number: int) -> Iterator[None]:
        climb = self._climbs[kind]
        if not climb.is_trying:
            yield
            return
        started = self._clock()
        yield
        climb.note(number, self._ranks.gather(self._clock() - started)[0] / number)

    @property
    def fastest(self) -> dict[Hashable, int]:
        """The fastest number that is known, by kind."""
        return {kind: climb.number for kind, climb in self._climbs.items()}


class _Climb:
    """From one genome up, for one kind of pass."""

    def __init__(self) -> None:
        self.number = 1
        self.is_trying = False  # in the pass that comes next
        self._is_over = False
        self._seconds: dict[int, list[float]] = {1: [], 2: []}  # a genome; of `number` and of twice as many

    def next(self, most: int) -> int:
        self.is_trying = not self._is_over and 2 * self.number <= most
        if not self.is_trying:
            return min(self.number, most)
        # in turn, so that a device that slows down is no reason against the larger number
        return min(self._seconds, key=lambda number: (len(self._seconds[number]), number))

    def note(self, number: int, seconds: float) -> None:
        self._seconds[number].append(seconds)
        if any(len(tries) < TRIES for tries in self._seconds.values()):
            return
        one, twice = map(min, self._seconds.values())  # what else runs on the machine only adds
        if twice < _GAIN * one:
            self.number *= 2
            self._seconds = {self.number: [], 2 * self.number: []}
        else:
            self._is_over = True


def packing_for(config: EvaluationConfig, model: MoEModel, clock: Clock | None) -> Packing:
    """What the config asks for, or suits the model's device; clock: default is the one of that device."""
    measures = config.pack_tokens == "measured" or (config.pack_tokens is None and model.device.type != "cpu")
    return MeasuredPacking(model.ranks, clock or _clock_of(model)) if measures else ALL


def most_tokens(config: EvaluationConfig, model: MoEModel, batch_tokens: int) -> int:
    """Of how many tokens the genomes that go together may have batches, all in all; 0 where they go alone."""
    if isinstance(config.pack_tokens, int):
        return min(config.pack_tokens, batch_tokens)
    # scores do not depend on company, not even in the last bits, where genomes go alone
    return 0 if config.pack_tokens is None and model.device.type == "cpu" else batch_tokens


def size_class(num_tokens: int) -> int:
    """The same for numbers of tokens of the same magnitude, to a power of two."""
    return num_tokens.bit_length()


def _clock_of(model: MoEModel) -> Clock:
    devices = {tensor.device for tensor in model.language_model.parameters()} | {model.device}
    gpus = [device for device in devices if device.type == "cuda"]

    def now() -> float:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        return time.perf_counter()

    return now
