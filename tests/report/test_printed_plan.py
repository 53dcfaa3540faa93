"""The plan of a run as people see it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from moe_evo.commands.plan import plan
from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig
from moe_evo.config.task import TaskConfig
from moe_evo.gangs.capacity import ClusterCapacity, NodeCapacity
from moe_evo.report.plan import count_label, print_plan, size_label, time_label

CAPACITY = ClusterCapacity((NodeCapacity("a", {"GPU": 8}, {"GPU": 6}, {}),), {"GPU": 1.0})


def printed(told: dict[str, object], *, width: int = 80) -> str:
    output = io.StringIO()
    print_plan(told, "moe-evo search x.yaml", Console(file=output, width=width))
    return output.getvalue()


def test_a_good_plan_ends_with_the_search_and_cuts_no_number(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(sharding="tensor_parallel"),
        cluster=ClusterConfig(address="auto", gang_size=2),
        folder=str(tmp_path / "run"),
    )
    told = plan(config, capacity=CAPACITY, memory_gib=80, calibrate=lambda: 3.6)
    text = printed(told)
    assert text == printed(told, width=200)
    assert "parameters  3.02 M: 2.56 M in experts" in text
    assert "> tensor_parallel" in text
    assert "device memory 80.0 GiB" in text
    assert "1 node; gangs of 2 x (GPU 1), PACK: 3 fit now, 4 when all is free" in text
    assert "3.6 s an evaluation, 3 at a time: 3000 evaluations an hour" in text
    assert "export      1.74 M parameters, 6.6 MiB (loads with transformers)" in text
    assert text.rstrip().endswith("next        moe-evo search x.yaml")
    assert "…" not in text


def test_problems_are_listed_and_the_search_is_not_offered(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(path=str(tmp_path / "[red]none")),
        tasks=[TaskConfig(data="nowhere")],
        folder=str(tmp_path / "run"),
    )
    text = printed(plan(config))
    assert "problem 1   task nowhere" in text
    assert "problem 2   " in text and "[red]none" in text
    assert "moe-evo search" not in text


def test_a_mode_that_cannot_be_is_shown_as_such(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(sharding="zero3"),
        cluster=ClusterConfig(address="auto", gang_size=7),
        folder=str(tmp_path / "run"),
    )
    text = printed(plan(config))
    assert "tensor_parallel  not possible" in text
    assert "fits" not in text.split("on top")[0].split("memory")[1]


@pytest.mark.parametrize(
    ("number", "label"), [(0, ""), (7, "7 B"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")]
)
def test_bytes_are_told_in_the_largest_unit(number: int, label: str) -> None:
    assert size_label(number) == label


def test_parameters_and_times_are_told_as_people_say_them() -> None:
    assert [count_label(number) for number in (12, 3_019_904, 46_702_792_704)] == ["12", "3.02 M", "46.70 B"]
    assert [time_label(hours) for hours in (0.01, 0.5, 3, 60)] == ["36 s", "30.0 min", "3.0 h", "2.5 d"]
