"""What all errors have in common."""

from __future__ import annotations

import pickle

import pytest

from moe_evo import errors
from moe_evo.errors import MoeEvoError

KINDS = [
    one
    for one in vars(errors).values()
    if isinstance(one, type) and issubclass(one, MoeEvoError) and one is not MoeEvoError
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_one_line_whatever_it_quotes_also_after_a_way_through_another_process(
    kind: type[MoeEvoError],
) -> None:
    error = kind("a.json: a genome of version \n\x1b[2J\u202e, this\tmoe_evo reads 1")
    assert str(error) == r"a.json: a genome of version \x1b[2J\u202e, this moe_evo reads 1"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(str(kind("x" * 10**6))) < 2100
