"""The arithmetic of merging: linear combinations of whatever is stacked by expert.

Pure functions. The view and the export both call them, so that what is scored is what is shipped.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from moe_evo.genome import Matrix

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # of a float32 working copy: what a core's cache holds; 64 MiB
_ROWS, _COLUMNS = 8, 2  # least sizes of a multiplication: below, other kernels would give a row other last bits


def copied_experts(matrix: Matrix) -> tuple[int | None, ...]:
    """For each row of a (K, E) matrix the expert that it copies, or None where it mixes several."""
    is_copy = ((matrix == 0) | (matrix == 1)).all(axis=1) & (matrix.sum(axis=1) == 1)
    return tuple(int(expert) if copies else None for copies, expert in zip(is_copy, matrix.argmax(axis=1), strict=True))


def is_selection(matrix: Matrix) -> bool:
    """True where every row copies one expert, so that indices can stand in for tensors."""
    return None not in copied_experts(matrix)


@torch.no_grad()
def mix_rows(matrix: Matrix, stacked: Tensor) -> Tensor:
    """Row i of the result is sum_j matrix[i, j] * stacked[j]   (EEP eq. 6).

    matrix: (K, E). stacked: (E, ...) of any dtype. Returns (K, ...) in that dtype, accumulated in
    float32; one-hot rows are exact copies. On the CPU the bits of a row do not depend on the other rows.
    """
    assert matrix.shape[1] == stacked.shape[0], (matrix.shape, stacked.shape)
    source = stacked.detach().reshape(stacked.shape[0], -1)
    mixed = source.new_empty((matrix.shape[0], source.shape[1]))
    copies = copied_experts(matrix)
    for slot, expert in enumerate(copies):
        if expert is not None:
            mixed[slot] = source[expert]
    slots = [slot for slot, expert in enumerate(copies) if expert is None]
    if slots:
        _mix_into(mixed, slots, matrix[slots], source)
    return mixed.view(matrix.shape[0], *stacked.shape[1:])


def _mix_into(mixed: Tensor, slots: list[int], rows: Matrix, source: Tensor) -> None:
    """mixed[slots] = rows @ source, in chunks; mixed: (K, N), rows: (len(slots), E), source: (E, N)."""
    experts = np.flatnonzero((rows != 0).any(axis=0))
    if not len(experts):
        mixed[slots] = 0
        return
    groups = []
    for first in range(0, len(slots), _ROWS):
        some = slots[first : first + _ROWS]
        weights = torch.zeros((_ROWS, len(experts)), dtype=torch.float32)
        weights[: len(some)] = torch.from_numpy(rows[first : first + _ROWS, experts])
        groups.append((torch.tensor(some, device=source.device), weights.to(source.device)))
    used = torch.from_numpy(experts).to(source.device)
    for columns in _column_chunks(source):
        chunk = source[:, columns].index_select(0, used).to(torch.float32)
        target = mixed[:, columns]
        width = target.shape[1]
        chunk = chunk if width >= _COLUMNS else chunk.repeat(1, _COLUMNS)
        for places, weights in groups:
            target.index_copy_(0, places, (weights @ chunk)[: len(places), :width].to(mixed.dtype))


def _column_chunks(source: Tensor) -> Iterable[slice]:
    """Of (E, N): the same whichever experts are mixed."""
    width = max(1, _CHUNK_ELEMENTS.get(source.device.type, 1 << 24) // source.shape[0])
    return (slice(start, start + width) for start in range(0, source.shape[1], width))
