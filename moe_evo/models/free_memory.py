"""How much memory is free on a device now, within the limits that a container sets; and whether it has run out.

A full memory shows in several ways: torch.OutOfMemoryError on a GPU, a RuntimeError of torch's allocator on the CPU,
and Python's MemoryError.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

MEMORY_ERRORS = (RuntimeError, MemoryError)
"""What may tell that memory ran out; torch.OutOfMemoryError is a RuntimeError, and so are others."""

_SIGNS = ("can't allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
_CGROUPS = Path("/sys/fs/cgroup")
_num_sharing = 1
_UNLIMITED = 1 << 60  # what version 1 writes where nothing is limited is larger


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on `device` now; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS does not tell
        return None
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_in_cgroups(_own_cgroup())])


def held_bytes() -> int:
    """Memory of the host that this process uses now; the most that it has used where the system tells no more."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:  # macOS has no /proc
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether one of `MEMORY_ERRORS` tells that memory ran out."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(sign in str(error) for sign in _SIGNS)


def half_of_free_gib(device: torch.device) -> float:
    """Half of the memory that is free on `device` now: the other half is for activations.

    Of memory that several processes share (`share_memory`), a fair part.
    """
    free = free_bytes(device)
    return (1.0 if free is None else free / 2**31) / _num_sharing


def share_memory(num_processes: int) -> None:
    """Tell this process that so many take memory side by side from the device that it computes on."""
    global _num_sharing
    _num_sharing = num_processes


def _own_cgroup() -> str:
    """The path of this process below the cgroups' root; '' where there are none."""
    try:
        lines = Path("/proc/self/cgroup").read_text("ascii").splitlines()
    except OSError:
        return ""
    paths = dict(line.split(":", 2)[1:] for line in lines)
    return paths.get("memory", paths.get("", "")).lstrip("/")


def _left_in_cgroups(own: str) -> list[int]:
    """Bytes that this process may still take in its cgroup and in those around it that have a limit."""
    left = []
    for root, limit, used, evictable in (
        (_CGROUPS, "memory.max", "memory.current", "inactive_file"),
        (_CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in (root / own, *(root / own).parents):
            if not folder.is_relative_to(root):
                break
            try:
                most, taken = (int((folder / name).read_text("ascii")) for name in (limit, used))
                counted = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
            except (OSError, ValueError):  # not there, or 'max'
                continue
            if most < _UNLIMITED:
                left.append(max(most - taken + int(counted.get(evictable, 0)), 0))
    return left
