"""When two ways to compute logits agree."""

from __future__ import annotations

import pytest
import torch

from moe_evo.models.agreement import SwitchedOff, disagreement


def logits() -> torch.Tensor:
    """(2, 8, 50), the largest is 1."""
    made = torch.rand((2, 8, 50), generator=torch.Generator().manual_seed(0))
    made[0, 0, 0] = 1.0
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_logits_agree_with_themselves_and_not_with_others(dtype: torch.dtype) -> None:
    expected = logits()
    assert disagreement(expected, expected, dtype) == ""
    assert "expected at most" in disagreement(expected.flip(1), expected, dtype)
    assert "nan" in disagreement(torch.full_like(expected, torch.nan), expected, dtype)


def test_in_16_bits_a_few_tokens_may_be_routed_otherwise_and_in_32_none() -> None:
    expected = logits()
    got = expected.clone()
    got[:, :3] += 0.5  # 6 of 16 tokens
    assert disagreement(got, expected, torch.bfloat16) == ""
    assert (
        disagreement(got, expected, torch.float32) == "logits differ by 5.0e-01 of the largest, expected at most 1e-04"
    )
    got[:, :5] += 0.5  # 10 of 16
    assert disagreement(got, expected, torch.bfloat16).startswith("the logits of half of the tokens differ by ")


def test_the_line_says_what_is_lost_and_what_is_not() -> None:
    assert str(SwitchedOff("shared prompts", "why")) == (
        "self-check: no shared prompts: every genome reads the prompts itself before it generates, so time is lost and "
        "no score (why)"
    )
