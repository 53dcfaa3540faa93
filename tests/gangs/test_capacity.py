"""How many ranks take memory side by side; how many gangs fit is tested with `moe-evo plan`."""

from __future__ import annotations

from typing import Literal

import pytest

from moe_evo.gangs.capacity import ranks_on_a_device

SMALL, LARGE = {"CPU": 4.0}, {"CPU": 16.0, "memory": 64.0}


@pytest.mark.parametrize(
    ("nodes", "bundle", "gang_size", "num_gangs", "expected"),
    [
        ([SMALL], {"CPU": 1.0}, 1, "auto", 4),
        ([SMALL, LARGE], {"CPU": 1.0}, 2, "auto", 16),  # the node where most of them fit
        ([LARGE], {"CPU": 1.0}, 2, 3, 6),
        ([LARGE], {"CPU": 1.0, "memory": 32.0}, 1, "auto", 2),
        ([{"CPU": 16.0, "GPU": 8.0}], {"CPU": 1.0, "GPU": 1.0}, 4, "auto", 1),  # each has a GPU of its own
        ([{"CPU": 16.0, "GPU": 8.0}], {"CPU": 1.0, "GPU": 0.25}, 1, "auto", 4),
        ([{"CPU": 16.0, "GPU": 8.0}], {"CPU": 1.0, "GPU": 4.0}, 1, "auto", 1),
        ([{"CPU": 1.0}], {"CPU": 2.0}, 2, "auto", 1),
    ],
)
def test_ranks_that_share_a_device(
    nodes: list[dict[str, float]],
    bundle: dict[str, float],
    gang_size: int,
    num_gangs: int | Literal["auto"],
    expected: int,
) -> None:
    assert ranks_on_a_device(nodes, bundle, gang_size, num_gangs) == expected
