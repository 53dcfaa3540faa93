"""The config of recovery."""

from __future__ import annotations

import pytest

from moe_evo.config.recover import RecoverConfig, enough_tokens
from moe_evo.errors import ConfigError


def test_the_learning_rate_falls_with_the_width_of_the_model_unless_it_is_given() -> None:
    assert RecoverConfig().rate(128) == pytest.approx(1e-3) and RecoverConfig().rate(4096) == pytest.approx(3.125e-5)
    assert RecoverConfig(learning_rate=0.5).rate(4096) == 0.5


@pytest.mark.parametrize("option", ["ridge", "learning_rate", "label_weight", "prompt_weight"])
def test_numbers_that_make_no_sense_are_refused(option: str) -> None:
    for value in (-1.0, float("inf")):
        with pytest.raises(ConfigError, match=rf"recover\.{option}: got "):
            RecoverConfig(**{option: value})


@pytest.mark.parametrize("whole", ["experts", "all"])
def test_adapters_beside_the_experts_that_they_stand_in_for_are_refused(whole: str) -> None:
    with pytest.raises(ConfigError, match=rf"recover\.train: got .*, expected adapters or {whole}: "):
        RecoverConfig(train=["adapters", "router", whole])
    assert RecoverConfig(train=["adapters", "router", "norms"], rank=2).rank == 2
    with pytest.raises(ConfigError, match=r"recover\.rank: got 0, expected 1 or more"):
        RecoverConfig(train=["adapters"], rank=0)


def test_layers_are_compared_at_four_tokens_for_each_neuron_that_a_token_may_meet_or_32768_unless_it_is_said() -> None:
    assert enough_tokens(num_kept=4, top_k=2, width=14336) == 4 * 14336 * 4 / 2
    assert enough_tokens(num_kept=3, top_k=2, width=1) == 6 and enough_tokens(num_kept=5, top_k=3, width=1) == 7
    assert RecoverConfig().most_block_tokens(832) == 32_768
    assert RecoverConfig().most_block_tokens(114_688) == 114_688
    assert RecoverConfig(block_tokens=50).most_block_tokens(114_688) == 50
    with pytest.raises(ConfigError, match=r"recover\.block_tokens: got 0, expected 1 or more"):
        RecoverConfig(block_tokens=0)


def test_what_closed_form_refits_follows_from_what_is_trained() -> None:
    assert RecoverConfig().refitted == {"experts"} == RecoverConfig(train=["adapters", "norms"]).refitted
    assert RecoverConfig(train=["router", "scales"]).refitted == {"router", "scales"}
    assert RecoverConfig(train=["all"]).refitted == {"experts", "router"}
