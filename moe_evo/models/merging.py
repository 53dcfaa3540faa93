"""The arithmetic of merging: linear combinations of whatever is stacked by expert.

Pure functions. The view and the export both call them, so that what is scored is what is shipped.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from moe_evo.genome import Matrix

_CHUNK_ELEMENTS = 1 << 24  # float32 working copies stay below 64 MiB a tensor


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
    float32; one-hot rows are exact copies.
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
    weights = torch.from_numpy(rows[:, experts].copy()).to(source.device)
    for columns in _column_chunks(source.shape[1], len(experts)):
        chunk = source[experts.tolist(), columns].to(torch.float32)
        mixed[slots, columns] = (weights @ chunk).to(mixed.dtype)


def _column_chunks(num_columns: int, num_rows: int) -> Iterable[slice]:
    width = max(1, _CHUNK_ELEMENTS // num_rows)
    return (slice(start, start + width) for start in range(0, num_columns, width))
