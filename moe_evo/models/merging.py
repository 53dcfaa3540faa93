"""The arithmetic of merging: linear combinations of tensors that are stacked by expert. Pure functions.

Evaluation and export call the same functions, so that the exported model computes what was scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_evo.genomes.genome import Matrix

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # of a float32 working copy: what a core's cache holds; 256 MiB
_ROWS, _COLUMNS = 8, 16  # least sizes of a multiplication: below, some CPUs' kernels give a row other last bits
_EXPERTS = 256  # most experts of a multiplication: it cuts a longer sum where their number says


def copied_experts(matrix: Matrix) -> tuple[int | None, ...]:
    """For each row of a (K, E) matrix the expert that it copies, or None where it mixes several."""
    is_copy = ((matrix == 0) | (matrix == 1)).all(axis=1) & (matrix.sum(axis=1) == 1)
    return tuple(int(expert) if copies else None for copies, expert in zip(is_copy, matrix.argmax(axis=1), strict=True))


def is_selection(matrix: Matrix) -> bool:
    """True where every row copies one expert, so that indices can stand in for tensors."""
    return None not in copied_experts(matrix)


@torch.no_grad()
def mix_rows(matrix: Matrix, stacked: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Row i of the result is sum_j matrix[i, j] * stacked[j]   (EEP eq. 6).

    matrix: (K, E). stacked: (E, ...) of any dtype. Returns (K, ...) in that dtype, accumulated in
    float32; one-hot rows are exact copies. On the CPU the bits of a row do not depend on the other rows.
    out: where to put the result, of its shape and dtype.
    """
    assert matrix.shape[1] == stacked.shape[0], (matrix.shape, stacked.shape)
    source = stacked.detach().reshape(stacked.shape[0], -1)
    shape = (matrix.shape[0], *stacked.shape[1:])
    out = source.new_empty(shape) if out is None else out
    assert out.shape == shape and out.dtype == stacked.dtype, (out.shape, shape, out.dtype)
    mixed = out.view(matrix.shape[0], -1)
    copies = copied_experts(matrix)
    for slot, expert in enumerate(copies):
        if expert is not None:
            mixed[slot] = source[expert]
    slots = [slot for slot, expert in enumerate(copies) if expert is None]
    if slots:
        _mix_into(mixed, slots, matrix[slots], source)
    return out


def _mix_into(mixed: Tensor, slots: list[int], rows: Matrix, source: Tensor) -> None:
    """mixed[slots] = rows @ source, in chunks; mixed: (K, N), rows: (len(slots), E), source: (E, N)."""
    experts = np.flatnonzero((rows != 0).any(axis=0))
    if not len(experts):
        mixed[slots] = 0
        return
    cuts = np.searchsorted(experts, range(_EXPERTS, source.shape[0], _EXPERTS))
    parts = [part for part in np.split(experts, cuts) if len(part)]
    groups = []
    num_rows = _ROWS if source.device.type == "cpu" else len(slots)  # elsewhere bits may depend on other rows
    for first in range(0, len(slots), num_rows):
        some = slots[first : first + num_rows]
        weights = torch.zeros((num_rows, source.shape[0]), dtype=torch.float32)
        weights[: len(some)] = torch.from_numpy(rows[first : first + num_rows])
        by_part = [weights[:, part].contiguous().to(source.device) for part in parts]
        groups.append((torch.tensor(some, device=source.device), by_part))
    used = [None if len(part) == len(source) else torch.from_numpy(part).to(source.device) for part in parts]
    for columns in _column_chunks(source):
        whole = source[:, columns]
        chunks = [(whole if part is None else whole.index_select(0, part)).to(torch.float32) for part in used]
        target = mixed[:, columns]
        width = target.shape[1]
        chunks = [pad(chunk, (0, max(_COLUMNS - width, 0))) for chunk in chunks]
        for places, by_part in groups:
            target.index_copy_(0, places, _sum_of_products(by_part, chunks)[: len(places), :width].to(mixed.dtype))


def _sum_of_products(weights: Sequence[Tensor], chunks: Sequence[Tensor]) -> Tensor:
    total = weights[0] @ chunks[0]
    for number in range(1, len(chunks)):
        total += weights[number] @ chunks[number]
    return total


def _column_chunks(source: Tensor) -> Iterable[slice]:
    """Of (E, N): the same whichever experts are mixed."""
    width = max(1, _CHUNK_ELEMENTS.get(source.device.type, 1 << 24) // source.shape[0])
    return (slice(start, start + width) for start in range(0, source.shape[1], width))
