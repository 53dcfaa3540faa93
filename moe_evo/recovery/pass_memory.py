"""`PassMemory`: how many tokens go through a model in one pass, halved whenever memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from moe_evo.errors import OutOfMemory
from moe_evo.models.free_memory import MEMORY_ERRORS, is_out_of_memory

T = TypeVar("T")


class PassMemory:
    """batch_tokens: most tokens of a pass on `device`, which `within` lowers where memory runs out.

    advice: what else takes less memory, for the error where a single sequence does not fit.
    """

    def __init__(self, batch_tokens: int, device: torch.device, advice: str) -> None:
        self.batch_tokens = batch_tokens
        self._given = batch_tokens
        self._device = device
        self._advice = advice

    @property
    def was_halved(self) -> bool:
        """Whether memory has run out, in this process or in the one that it goes on from."""
        return self.batch_tokens < self._given

    def within(self, compute: Callable[[], T]) -> T:
        """What `compute` returns; where memory runs out it is called again with half of `batch_tokens`.

        Raises OutOfMemory where one sequence does not fit.
        """
        while True:
            try:
                return compute()
            except MEMORY_ERRORS as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_tokens == 1:
                    raise OutOfMemory(
                        f"out of memory on {self._device} with one sequence in a pass: shorten the prompts (tasks' "
                        f"max_length), {self._advice}"
                    ) from error
            # outside of `except`: the error keeps the tensors of its stack frames alive
            self.batch_tokens //= 2
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
