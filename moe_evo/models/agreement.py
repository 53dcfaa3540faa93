"""Whether two ways to compute the same logits agree, and what is done without where they do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Relative to the largest logit. The forced hooks run the same kernels on the same numbers.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}

Part = Literal["shared layers", "shared prefixes", "shared prompts", "token trees"]

_COSTS: dict[Part, str] = {
    "shared layers": "every genome is run from the first layer on",
    "shared prefixes": "what all rows of a task begin with is read anew in every batch",
    "shared prompts": "every genome reads the prompts itself before it generates",
    "token trees": "rows that begin alike are read one by one",
}


@dataclass(frozen=True)
class SwitchedOff:
    """A way to save work that is not used with a model; scores are the same without it.

    reason: what was tried and found, or why it was not tried.
    """

    part: Part
    reason: str

    def __str__(self) -> str:
        return f"self-check: no {self.part}: {_COSTS[self.part]}, so time is lost and no score ({self.reason})"


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; NaN where either has one."""
    scale = expected.float().abs().max().clamp(min=1e-12)
    return float((got.float() - expected.float()).abs().max() / scale)


def disagreement(got: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """How far logits (..., V) are from those expected, in words; '' where a model in `dtype` may differ so much.

    In 16 bits the middle token counts: another kernel rounds otherwise, so that a few tokens are routed to other
    experts, and their logits differ by any amount. What is computed wrongly is wrong for most tokens.
    """
    if dtype.itemsize > 2:
        difference, of_what = relative_difference(got, expected), "logits differ"
    else:
        of_tokens = (got.float() - expected.float()).abs().amax(dim=-1).flatten()
        difference = float(of_tokens.median() / expected.float().abs().max().clamp(min=1e-12))
        of_what = "the logits of half of the tokens differ"
    if difference <= TOLERANCES[dtype]:
        return ""
    return f"{of_what} by {difference:.1e} of the largest, expected at most {TOLERANCES[dtype]:.0e}"
