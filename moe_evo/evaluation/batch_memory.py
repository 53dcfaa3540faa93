"""How large batches may be: what was configured, or less after memory has run out.

torch tells of it in several ways: by an error of its own on a GPU, by a RuntimeError of its allocator on
the CPU, and Python by MemoryError.
"""

from __future__ import annotations

import ctypes

import torch

from moe_evo.errors import OutOfMemory, RowOutOfMemory
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import Batch

MEMORY_ERRORS = (RuntimeError, MemoryError)
"""What may tell that memory ran out; torch.OutOfMemoryError is a RuntimeError, and so are others."""

_TIDY_EVERY = 8  # genomes
_SIGNS = ("can't allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


class BatchMemory:
    """The most tokens of a batch for a model on its device, lowered whenever they do not fit."""

    def __init__(self, batch_tokens: int, model: MoEModel) -> None:
        self.batch_tokens = batch_tokens
        self._model = model
        self._rows, self._tokens = 1, batch_tokens
        self._num_scored = 0

    def note(self, batch: Batch, copies: int = 1) -> None:
        """Remember the batch that runs now, for so many genomes: it does not fit if memory runs out."""
        self._rows = len(batch.examples) * copies
        self._tokens = batch.num_tokens * copies

    def lower_after(self, error: BaseException) -> None:
        """Halve `batch_tokens`.

        Raises `error` where it tells of something else, and OutOfMemory where the batch had one row, or
        where other ranks are waiting in the middle of a pass that this one has left.
        """
        if not _is_out_of_memory(error):
            raise error
        is_smallest = self._rows == 1 or self.batch_tokens == 1  # the latter where no batch has begun to run
        if is_smallest or self._model.ranks.size > 1:
            what = "one row in a batch" if is_smallest else f"batches of {self._tokens} tokens"
            kind = RowOutOfMemory if self._rows == 1 else OutOfMemory
            raise kind(
                f"out of memory on {self._model.device} with {what}: lower evaluation.batch_tokens (now "
                f"{self.batch_tokens}), model.merged_cache_gib or the tasks' max_length, "
                "then run the same command again"
            ) from error
        self.batch_tokens = max(min(self.batch_tokens, self._tokens) // 2, 1)

    def free(self) -> None:
        """Give back what can be built again: merged layers, and what torch keeps for later."""
        self._model.merged_cache.clear()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def tidy_after(self, num_genomes: int) -> None:
        """Called after so many were scored: from time to time, free memory on the host goes back to the system.

        Every genome routes otherwise, so tensors of ever other sizes leave holes in the heap, which grew to half as
        much again as the model and its states. Doing this for every genome would cost a few per cent of time.
        """
        self._num_scored += num_genomes
        if self._num_scored >= _TIDY_EVERY:
            self._num_scored = 0
            trim_heap()


def trim_heap() -> None:
    """Give pages that are free back to the system, where the allocator can (glibc's can)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(sign in str(error) for sign in _SIGNS)
