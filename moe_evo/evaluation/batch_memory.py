"""`BatchMemory`: the largest batch that fits into memory, halved whenever memory runs out."""

from __future__ import annotations

import ctypes

import torch

from moe_evo.errors import OutOfMemory, RowOutOfMemory
from moe_evo.models.free_memory import is_out_of_memory
from moe_evo.models.view import MoEModel
from moe_evo.tasks.base import Batch

_TIDY_EVERY = 8  # genomes


class BatchMemory:
    """The most tokens of a batch for a model on its device, halved whenever a batch does not fit."""

    def __init__(self, batch_tokens: int, model: MoEModel) -> None:
        self.batch_tokens = batch_tokens
        self._model = model
        self._rows, self._tokens = 1, batch_tokens
        self._num_scored = 0

    def note(self, batch: Batch, copies: int = 1) -> None:
        """Remember the batch that runs now, for `copies` genomes: the one that does not fit if memory runs out next."""
        self._rows = len(batch.examples) * copies
        self._tokens = batch.num_tokens * copies

    def lower_after(self, error: BaseException) -> None:
        """Halve `batch_tokens` after `error`.

        Raises `error` where it does not mean a full memory. Raises OutOfMemory where the batch had one row, or where
        there are other ranks, which still wait in the pass that this one has left.
        """
        if not is_out_of_memory(error):
            raise error
        is_smallest = self._rows == 1 or self.batch_tokens == 1  # 1 where memory ran out before any batch ran
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
        """Free what can be built again: merged layers, and the blocks that torch has cached."""
        self._model.merged_cache.clear()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def tidy_after(self, num_genomes: int) -> None:
        """Call it after genomes were scored; every few genomes it returns free host memory to the system.

        Each genome routes tokens differently, so tensors of many sizes fragment the heap: it grew to 1.5 times the
        model and its states. Returning memory after each genome would cost a few per cent of time.
        """
        self._num_scored += num_genomes
        if self._num_scored >= _TIDY_EVERY:
            self._num_scored = 0
            trim_heap()


def trim_heap() -> None:
    """Return free pages of the heap to the system, where the C library can (glibc can)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
