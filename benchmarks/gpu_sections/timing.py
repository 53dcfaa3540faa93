"""Seconds, kernels, host syncs and memory of a call on a device."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
T = TypeVar("T")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: torch.device, *, inner: int = 1) -> tuple[float, T]:
    """Seconds of a call, from an idle device to an idle device, and its result; the mean of `inner` calls in a row."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(inner):
        found = call()
    synchronise(device)
    return (time.perf_counter() - started) / inner, found


def seconds_of(call: Call, device: torch.device, *, inner: int = 1) -> float:
    """As `timed`, without the result."""
    return timed(call, device, inner=inner)[0]


def median_s(
    call: Call, device: torch.device, *, repeats: int = 5, inner: int = 1, most_s: float = 1.0, warm: bool = False
) -> float:
    """Median seconds of a call, after one that warms up, unless it is warm already.

    Of `repeats` measurements, or fewer once `most_s` seconds are spent.
    """
    if not warm:
        seconds_of(call, device)
    spent: list[float] = []
    while not spent or (len(spent) < repeats and sum(spent) * inner < most_s):
        spent.append(seconds_of(call, device, inner=inner))
    return statistics.median(spent)


@dataclass(frozen=True)
class Kernels:
    """What a call launched. longest: name, launches and share of the time of all, longest first."""

    launches: int
    seconds: float
    longest: list[dict[str, Any]]

    @property
    def first(self) -> str:
        """The beginning of the name of the longest one; empty where the profiler saw none."""
        return str(self.longest[0]["name"])[:50] if self.longest else ""


def kernels_of(call: Call, device: torch.device, *, number: int = 15) -> Kernels:
    """Profile a call; on a CPU its operators stand for kernels."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        call()
        synchronise(device)
    events: list[Any] = [
        event for event in found.key_averages() if str(event.device_type).endswith("CUDA" if on_gpu else "CPU")
    ]
    spent = {
        event.key: (event.count, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6)
        for event in events
    }
    total = sum(seconds for _, seconds in spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1][1])[:number]
    shown = [
        {"name": name.removeprefix("void ")[:300], "launches": count, "share": seconds / max(total, 1e-12)}
        for name, (count, seconds) in longest
    ]
    return Kernels(sum(count for count, _ in spent.values()), total, shown)


def host_syncs(call: Call) -> Counter[str]:
    """How often a call waits for the GPU, by the line of Python that did (file:line)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [one for one in caught if "called a synchronizing" in str(one.message)]
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found)


@contextmanager
def peak_gib(device: torch.device) -> Iterator[dict[str, float | None]]:
    """Most memory that the block takes beside what was allocated before; None on a CPU, which does not tell."""
    found: dict[str, float | None] = {"peak_gib": None}
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    yield found
    if device.type == "cuda":
        found["peak_gib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
